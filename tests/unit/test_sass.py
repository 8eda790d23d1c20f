"""The CUDA kernels compile for A100 and H100, keep everything in registers, and move 16 bytes at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zo_ds.fetch import build_once, cache_dir
from zo_ds.ops.cuda_builder import KERNELS, NVCC_FLAGS
from zo_ds.ops.sources import SOURCES

NVCC = shutil.which("nvcc")
NVDISASM = "nvidia-cuda-nvdisasm==13.5.37"

pytestmark = [pytest.mark.network, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


def nvdisasm() -> str:
    """The machine's, or NVIDIA's package from the registry, kept in the cache."""
    if found := shutil.which("nvdisasm"):
        return found

    def fetch(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), NVDISASM]
        subprocess.run(pip, check=True)

    folder = build_once(cache_dir() / "tools" / NVDISASM.replace("==", "-"), fetch)
    tool = next(path for path in folder.rglob("nvdisasm") if path.is_file())
    tool.chmod(0o755)
    return str(tool)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_keep_to_registers_and_move_16_bytes(architecture: str, tmp_path: Path) -> None:
    cubin = tmp_path / "zo.cubin"
    command = [
        str(NVCC),
        *NVCC_FLAGS,
        f"-arch={architecture}",
        "-Xptxas",
        "-v",
        str(SOURCES / KERNELS),
        "-o",
        str(cubin),
    ]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= 29
    assert set(frames) == {("0", "0", "0")}
    sass = subprocess.run([nvdisasm(), str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.DOTALL | re.MULTILINE))
    streaming = [name for name in kernels if re.match(r"zo_(perturb[14]|update)_", name) and "factored" not in name]
    assert len(streaming) == 13
    for name in streaming:
        # Updates take their addresses from a table, so theirs are generic (LD, ST).
        assert re.search(r"\bLDG?\.E\.128", kernels[name]), name
        assert re.search(r"\bSTG?\.E\.128", kernels[name]), name
    for name, text in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", text), name
