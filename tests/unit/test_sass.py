"""The CUDA kernels compile for A100 and H100, keep everything in registers, and move 16 bytes at a time.

By nvcc where there is one, and by NVRTC, which is what compiles them on a user's machine. No GPU is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from zo_ds.fetch import build_once, cache_dir
from zo_ds.ops.cuda_builder import KERNELS, NVCC_FLAGS
from zo_ds.ops.sources import SOURCES

NVCC = shutil.which("nvcc")
NVDISASM = "nvidia-cuda-nvdisasm==13.5.37"  # 5 MB
NVRTC = "nvidia-cuda-nvrtc==13.0.88"  # 90 MB; the one release whose library does not find its built-ins by itself
KINDS = ("f32_f32", "bf16_bf16", "bf16_f32", "f16_f16", "f16_f32")
PERTURBING = ("perturb1", "perturb4", "perturb_factored", "perturb_gaussian", "embedding", "embedding_gaussian")
MOVERS = [f"zo_{op}_{kind}" for op in PERTURBING for kind in KINDS]
MOVERS += [f"zo_update_{noise}{kind}" for noise in ("", "factored_", "gaussian_") for kind in ("f32", "bf16", "f16")]
ENTRY_POINTS = {*MOVERS, "zo_signs", "zo_hash_f32", "zo_hash_half"}
COMPILE_WITH_NVRTC = """
import sys, sysconfig
from pathlib import Path
sysconfig.get_paths = lambda: {"purelib": sys.argv[1]}
from zo_ds.ops import cuda_builder
assert cuda_builder.nvrtc() is not None
cuda_builder.compile_cuda(Path(sys.argv[2]), sys.argv[3])
"""
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
compilers = pytest.mark.parametrize("compiler", [pytest.param("nvcc", marks=needs_nvcc), "nvrtc"])
architectures = pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])

pytestmark = pytest.mark.network


def package(requirement: str) -> Path:
    """A folder with one of NVIDIA's packages from the registry, kept in the cache."""

    def fetch(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
        subprocess.run(pip, check=True)

    return build_once(cache_dir() / "tools" / requirement.replace("==", "-"), fetch)


@pytest.fixture(scope="session")
def nvdisasm() -> str:
    if found := shutil.which("nvdisasm"):
        return found
    return str(next(path for path in package(NVDISASM).rglob("nvdisasm") if path.is_file()))


def compile_with_nvcc(target: Path, architecture: str) -> str:
    """What ptxas says of the kernels."""
    how = [*NVCC_FLAGS, f"-arch={architecture}", "-Xptxas", "-v", str(SOURCES / KERNELS), "-o", str(target)]
    return subprocess.run([str(NVCC), *how], capture_output=True, text=True, check=True).stderr


def compile_with_nvrtc(target: Path, architecture: str) -> None:
    """By the package's own functions, in a process that has loaded nothing of NVIDIA's before."""
    command = [sys.executable, "-c", COMPILE_WITH_NVRTC, str(package(NVRTC)), str(target), architecture]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class Code:
    """Machine code of every kernel, compiled once for all tests."""

    def __init__(self, nvdisasm: str, folder: Path) -> None:
        self._nvdisasm, self._folder = nvdisasm, folder
        self.of = cache(self._of)

    def _of(self, compiler: str, architecture: str) -> dict[str, str]:
        cubin = self._folder / f"{compiler}-{architecture}.cubin"
        (compile_with_nvcc if compiler == "nvcc" else compile_with_nvrtc)(cubin, architecture)
        sass = subprocess.run([self._nvdisasm, str(cubin)], capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="session")
def code(nvdisasm: str, tmp_path_factory: pytest.TempPathFactory) -> Code:
    return Code(nvdisasm, tmp_path_factory.mktemp("cubin"))


@needs_nvcc
@architectures
def test_nothing_is_spilled(architecture: str, tmp_path: Path) -> None:
    log = compile_with_nvcc(tmp_path / "zo.cubin", architecture)
    frames = re.findall(
        r"Function properties for (\w+)\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )  # fmt: skip
    assert sorted(frames) == [(name, "0", "0", "0") for name in sorted(ENTRY_POINTS)]


@compilers
@architectures
def test_no_kernel_touches_local_memory(compiler: str, architecture: str, code: Code) -> None:
    kernels = code.of(compiler, architecture)
    assert kernels.keys() == ENTRY_POINTS
    assert not [name for name, text in kernels.items() if re.search(r"\b(LDL|STL)\b", text)]


@compilers
@architectures
def test_runs_move_16_bytes_at_a_time(compiler: str, architecture: str, code: Code) -> None:
    kernels = code.of(compiler, architecture)
    for name in MOVERS:
        assert re.search(r"\bLDG\.E\.128", kernels[name]), name
        assert re.search(r"\bSTG\.E\.128", kernels[name]), name
        # Beside whole runs there are only single elements: a compiler that splits a store leaves pieces of 4 bytes.
        size = 4 if name.endswith("f32") else 2
        whole, single = r"\bSTG?\.E\.128", r"\bSTG?\.E " if size == 4 else r"\bSTG?\.E\.U16"
        stores = len(re.findall(r"\bSTG?\.E", kernels[name]))
        counts = len(re.findall(whole, kernels[name])), len(re.findall(single, kernels[name]))
        assert counts == (stores * size // (16 + size), stores * 16 // (16 + size)), name


@compilers
@architectures
def test_no_product_is_fused_with_a_sum(compiler: str, architecture: str, code: Code) -> None:
    kernels = code.of(compiler, architecture)
    assert not [name for name, text in kernels.items() if re.search(r"\b[FH]FMA", text)]
    assert all(re.search(r"\bFMUL\b.*\bFADD\b", kernels[name], re.DOTALL) for name in MOVERS if "gaussian" in name)
