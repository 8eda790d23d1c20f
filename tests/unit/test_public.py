"""The public surface: what `zo_ds` offers, and that asking for it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zo_ds

NAMES = ["StepOutput", "ZOConfig", "ZODSError", "ZOEngine", "ZerothOrderConfig", "__version__", "initialize", "reward"]


def test_names_are_frozen() -> None:
    assert sorted(zo_ds.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name: str) -> None:
    value = getattr(zo_ds, name)
    assert isinstance(value, str) if name == "__version__" else value.__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zo_ds.nothing
    with pytest.raises(ImportError):
        from zo_ds import nothing  # noqa: F401


def test_import_is_light() -> None:
    heavy = "{'torch', 'deepspeed', 'transformers', 'pydantic', 'numpy', 'yaml'}"
    program = f"import sys, zo_ds; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_light() -> None:
    program = (
        "import sys, zo_ds.cli\n"
        "try: zo_ds.cli.main(['--help'])\n"
        "except SystemExit: print('\\n', sorted({'torch', 'deepspeed', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "replay" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "[]"


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert zo_ds.__version__ == version("zo_ds")
