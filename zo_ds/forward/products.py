"""Matrix products of the batched forward, by the fastest library that torch carries."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@cache
def _onednn() -> Any:
    """The fp32 product of oneDNN, or None.

    torch hands fp32 products on the CPU to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN
    takes AVX-512 wherever there is any (a step takes half the time on Zen 5: tools/bench_step.py, opt125m).
    """
    backend: Any = torch.backends.mkldnn
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if backend.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``.

    Args:
        x: [rows, in], contiguous.
        weight: [out, in] in x's dtype, any strides.
        bias: [out] in x's dtype.

    Returns:
        [rows, out], contiguous.
    """
    onednn = _onednn() if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() else None
    if onednn is None:
        return F.linear(x, weight, bias)
    result: Tensor = onednn(x, weight, bias, "none", [], "")
    return result
