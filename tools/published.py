"""A step as MeZO and as released FZOO take it: in-place sweeps over the weights with torch's noise, one forward each.

Written from their descriptions, to be timed beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Noise = Callable[[nn.Parameter], Tensor]


def normal(parameter: nn.Parameter) -> Tensor:
    """MeZO's noise: Gaussian, from the generator that was seeded last."""
    return torch.normal(
        mean=0, std=1, size=parameter.data.size(), device=parameter.data.device, dtype=parameter.data.dtype
    )


def rademacher(parameter: nn.Parameter) -> Tensor:
    """Released FZOO's noise: signs from integers."""
    bits = torch.randint(0, 2, parameter.data.shape, device=parameter.data.device)
    return bits.to(parameter.data.dtype) * 2 - 1


def _sweep(parameters: Sequence[nn.Parameter], noise: Noise, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data = parameter.data + scale * noise(parameter)


@torch.inference_mode()
def mezo_step(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], eps: float, lr: float) -> None:
    """Two forwards, at +eps and -eps, and four sweeps."""
    _sweep(parameters, normal, 1, eps)
    above = float(loss())
    _sweep(parameters, normal, 1, -2 * eps)
    below = float(loss())
    _sweep(parameters, normal, 1, eps)
    _sweep(parameters, normal, 1, -lr * (above - below) / (2 * eps))


@torch.inference_mode()
def fzoo_step(
    parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], eps: float, lr: float, directions: int
) -> None:
    """A clean forward and one for each direction; three sweeps for each direction."""
    clean = float(loss())
    losses = []
    for direction in range(directions):
        _sweep(parameters, rademacher, direction, eps)
        losses.append(float(loss()))
        _sweep(parameters, rademacher, direction, -eps)
    spread = float(torch.tensor(losses).std())
    for direction, value in enumerate(losses):
        _sweep(parameters, rademacher, direction, -lr * (value - clean) / (directions * max(spread, 1e-8)))
