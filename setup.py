"""Compiles the CPU ops into the wheel; where that fails they are compiled at first use, or torch does their work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPS = Path(__file__).parent / "zo_ds" / "ops"
spec = importlib.util.spec_from_file_location("sources", OPS / "sources.py")
assert spec is not None
assert spec.loader is not None
sources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sources)


class BuildOps(build_ext):
    """A plain shared library: no module initialisation, no interpreter's name in the file name."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path below the build folder."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile with the flags of `zo_ds/ops/sources.py`."""
        target = Path(self.get_ext_fullpath(ext.name))
        command = sources.compiler()
        if command is None:
            print("zo_ds: no C++ compiler; the CPU ops are left out and compiled at first use")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            sources.compile_cpu(target, command)
        except sources.CompileError as error:
            print(f"zo_ds: the CPU ops are left out and compiled at first use, since {command} says:\n{error}")


class AnyPython(bdist_wheel):
    """The library does not depend on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """Interpreter, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("zo_ds.ops.zo_cpu", [str(p.relative_to(OPS.parents[1])) for p in OPS.glob("csrc/*.cpp")])],
    cmdclass={"build_ext": BuildOps, "bdist_wheel": AnyPython},
)
