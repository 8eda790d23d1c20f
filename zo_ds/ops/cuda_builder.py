"""Compiles the CUDA kernels for the card at hand: with NVRTC, which torch's CUDA wheels bring, else with nvcc."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from zo_ds.errors import MachineError
from zo_ds.fetch import build_once, cache_dir
from zo_ds.ops.builder import WITHOUT, OpBuilder, Report, choice
from zo_ds.ops.sources import SOURCES, source_digest

_log = logging.getLogger(__name__)

KERNELS = "zo_kernels.cuh"
NVRTC_FLAGS = ("--std=c++17", "--fmad=false")
NVCC_FLAGS = ("-x", "cu", "-std=c++17", "-O3", "--fmad=false", "-cubin")


class CUDAOpBuilder(OpBuilder):
    """The kernels for the current CUDA device."""

    NAME = "zo_cuda"

    def is_compatible(self, verbose: bool = False) -> bool:
        """True with a CUDA device and NVRTC or nvcc."""
        compatible = torch.cuda.is_available() and (nvrtc() is not None or shutil.which("nvcc") is not None)
        if verbose and not compatible:
            _log.warning("%s: %s", self.NAME, _missing())
        return compatible

    def load(self) -> bytes | None:
        """The cubin for the current device; logs one warning if there is none."""
        return _load(torch.cuda.get_device_capability())[0]

    def report(self) -> Report:
        """The architecture in use, or why it is the reference."""
        if not torch.cuda.is_available():
            return Report(self.NAME, "-", "no CUDA device")
        capability = torch.cuda.get_device_capability()
        image, why = _load(capability)
        return Report(self.NAME, "torch reference" if image is None else _architecture(capability), why)


@cache
def _load(capability: tuple[int, int]) -> tuple[bytes | None, str]:
    if choice() == "reference":
        return None, "ZO_DS_OPS=reference"
    architecture = _architecture(capability)
    cached = cache_dir() / "ops" / f"zo_cuda-{architecture}-{source_digest()}" / "zo_cuda.cubin"
    try:
        if not cached.exists():
            _log.info("compiling the CUDA ops for %s, once", architecture)
            build_once(cached.parent, lambda folder: compile_cuda(folder / cached.name, architecture))
        return cached.read_bytes(), f"compiled: {cached}"
    except (MachineError, OSError) as error:
        _log.warning("no compiled CUDA ops: %s. Perturbations and updates run in torch, many times slower.", error)
        return None, str(error)


def compile_cuda(target: Path, architecture: str) -> None:
    """Compile the kernels to a cubin.

    Args:
        target: the file.
        architecture: ``sm_80``, ``sm_90``, ...

    Raises:
        MachineError: there is no compiler, or it failed.
    """
    library, command = nvrtc(), shutil.which("nvcc")
    if library is not None:
        target.write_bytes(_compile_with_nvrtc(library, architecture))
    elif command is not None:
        arguments = [command, *NVCC_FLAGS, f"-arch={architecture}", str(SOURCES / KERNELS), "-o", str(target)]
        result = subprocess.run(arguments, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            raise MachineError("nvcc failed on the CUDA ops", where=command, why=result.stderr.strip(), remedy=WITHOUT)
    else:
        raise MachineError(_missing(), remedy="install nvidia-cuda-nvrtc of torch's CUDA version with pip, or nvcc")


@cache
def nvrtc() -> ctypes.CDLL | None:
    """The run-time compiler of torch's CUDA version, from the system or from NVIDIA's wheels."""
    major = (torch.version.cuda or os.environ.get("CUDA_VERSION") or "13").split(".", 1)[0]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for path in packages.glob(f"**/libnvrtc-builtins.so.{major}*"):
        # NVRTC opens its built-ins by their bare name, which finds those of a wheel only if they are loaded already.
        with suppress(OSError):
            ctypes.CDLL(str(path))
    for name in (f"libnvrtc.so.{major}", *map(str, sorted(packages.glob(f"**/libnvrtc.so.{major}")))):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _compile_with_nvrtc(library: ctypes.CDLL, architecture: str) -> bytes:
    headers = ("zo_device.h", "zo_core.h")
    texts = [(SOURCES / name).read_bytes() for name in headers]
    program, count = ctypes.c_void_p(), len(headers)
    status = library.nvrtcCreateProgram(
        ctypes.byref(program),
        (SOURCES / KERNELS).read_bytes(),
        KERNELS.encode(),
        count,
        (ctypes.c_char_p * count)(*texts),
        (ctypes.c_char_p * count)(*[name.encode() for name in headers]),
    )
    if status:
        raise MachineError(f"NVRTC failed with code {status}", remedy=WITHOUT)
    try:
        options = [flag.encode() for flag in (*NVRTC_FLAGS, f"--gpu-architecture={architecture}")]
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise MachineError(
                "NVRTC failed on the CUDA ops", why=log.decode(errors="replace").strip("\0\n"), remedy=WITHOUT
            )
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if size_of(program, ctypes.byref(size)):
        raise MachineError("NVRTC has no result", remedy=WITHOUT)
    buffer = ctypes.create_string_buffer(size.value)
    if get(program, buffer):
        raise MachineError("NVRTC has no result", remedy=WITHOUT)
    return buffer.raw


def _architecture(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _missing() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "neither NVRTC (it comes with torch's CUDA wheels) nor nvcc was found"
