"""`python -m zo_ds`."""

from zo_ds.cli import main

if __name__ == "__main__":
    main()
