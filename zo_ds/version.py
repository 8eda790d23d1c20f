"""The version of the program, for those who may not import the whole package."""

VERSION = "0.1.0"
