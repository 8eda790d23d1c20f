"""The registry of layers that a batched forward computes for all replicas at once, by type.

A leaf takes activations whose first axis is replica-major (``R * n``) and gives what the module would give if each
replica ran alone at its own weights. It reads parameters through `Replicas`, and never writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from zo_ds.forward import products
from zo_ds.forward.modules import Forward, own_parameters
from zo_ds.forward.replicas import LostAxisError, Replicas
from zo_ds.maths.directions import NoiseStructure
from zo_ds.maths.noise import Stream

Leaf = Callable[[Any, Replicas, Forward, Tensor], Tensor]
"""(module, replicas, the module's own forward, input) -> output."""


class NotALeafError(Exception):
    """The module does something else with its parameters than its leaf expects."""


def leaf_of(module: nn.Module) -> Leaf | None:
    """How a module is computed for many replicas, None if the registry does not know.

    A subclass counts as its base unless it has a forward of its own.
    """
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None  # it writes to its table
    # Not so if the weight is computed from others (parametrizations).
    plain = set(module._parameters) <= {"weight", "bias"} and "weight" in module._parameters
    forward = type(module).forward
    for base, leaf in _LEAVES.items():
        if plain and isinstance(module, base) and forward is base.forward:
            return leaf
    if plain and isinstance(module, nn.Embedding):
        return _embedding_within
    # By name, since this layer does without transformers.
    if plain and f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D":
        return _conv1d
    vectors = own_parameters(module)
    if vectors and not list(module.children()) and all(p.dim() == 1 for p in vectors):
        return elementwise
    return None


def _linear(module: nn.Linear, replicas: Replicas, original: Forward, x: Tensor) -> Tensor:
    return _product(module, replicas, x, module.weight, module.bias, transposed=False)


def _conv1d(module: Any, replicas: Replicas, original: Forward, x: Tensor) -> Tensor:
    return _product(module, replicas, x, module.weight, module.bias, transposed=True)


def _product(
    module: nn.Module, replicas: Replicas, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    """``x (W + eps_i u_i)^T + b_i``; transposed: W is [in, out], as in GPT-2."""
    replicas.check(module, x)
    dtype = compute_dtype(x)
    fan_in, fan_out = weight.shape if transposed else weight.shape[::-1]
    inputs = x.to(dtype).reshape(replicas.count, -1, fan_in).contiguous()
    biases = None
    shared = replicas.theta(bias).to(dtype) if bias is not None else None
    if bias is not None and replicas.displaces(bias):
        biases, shared = replicas.all(bias).to(dtype), None
    factored = replicas.structure is NoiseStructure.FACTORED
    if replicas.displaces(weight) and not factored and not replicas.loses_eps(dtype):
        result = _by_copies(replicas, inputs, weight, shared if biases is None else biases, transposed=transposed)
    else:
        theta = replicas.theta(weight).to(dtype)
        flat = products.linear(inputs.view(-1, fan_in), theta.t() if transposed else theta, shared)
        result = flat.view(replicas.count, -1, fan_out)
        if replicas.displaces(weight):
            add = _add_factored if factored else _add_products
            add(replicas, result, inputs, weight, transposed=transposed)
        if biases is not None:
            result.add_(biases.unsqueeze(1))
    return result.view(*x.shape[:-1], fan_out)


def _by_copies(replicas: Replicas, inputs: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """One product for each replica and block of weights, with a displaced copy of the block."""
    fan_out = weight.shape[1 if transposed else 0]
    result = inputs.new_empty((replicas.count, inputs.shape[1], fan_out))
    # A block of rows of [in, out] is a part of every sum.
    for rows, block in replicas.blocks(weight, whole=transposed):
        outputs = slice(None) if transposed else rows
        for number in range(replicas.count):
            copy = replicas.copy(number, block).to(inputs.dtype)
            own = bias if bias is None or bias.dim() == 1 else bias[number]
            own = None if own is None else own[outputs]
            piece = products.linear(inputs[number], copy.t() if transposed else copy, own)
            if replicas.count == 1 and piece.shape[1] == fan_out:
                return piece.unsqueeze(0)
            result[number, :, outputs] = piece
    return result


def _add_factored(replicas: Replicas, result: Tensor, inputs: Tensor, weight: Tensor, *, transposed: bool) -> None:
    """``Y_i += eps_i (X_i b_i) a_i^T``: what a rank-1 direction adds to a product."""
    rows, columns = weight.shape
    left = replicas.signs(weight, Stream.LEFT, rows, inputs.dtype)
    right = replicas.signs(weight, Stream.RIGHT, columns, inputs.dtype)
    inner, outer = (left, right) if transposed else (right, left)
    sums = torch.stack([inputs[number] @ inner[number] for number in range(replicas.count)])
    radii = torch.tensor(replicas.radii, dtype=torch.float32, device=sums.device).view(-1, 1, 1)
    result.addcmul_((sums.unsqueeze(-1) * radii).to(result.dtype), outer.unsqueeze(1))


def _add_products(replicas: Replicas, result: Tensor, inputs: Tensor, weight: Tensor, *, transposed: bool) -> None:
    """``Y_i += eps_i X_i u_i^T``, where 16-bit copies would lose eps; u_i has no eps to lose, see `Replicas.noise`."""
    for rows, block in replicas.blocks(weight, whole=transposed):
        outputs = slice(None) if transposed else rows
        for number, eps in enumerate(replicas.radii):
            if eps:
                noise = replicas.noise(number, block).to(inputs.dtype)
                piece = products.linear(inputs[number], noise.t() if transposed else noise)
                result[number, :, outputs].add_(piece, alpha=eps)


def _embedding(module: nn.Embedding, replicas: Replicas, original: Forward, ids: Tensor) -> Tensor:
    return _gather(module, replicas, ids) if replicas.displaces(module.weight) else _tensor(original(ids))


def _gather(module: nn.Embedding, replicas: Replicas, ids: Tensor) -> Tensor:
    """Rows of the table for each replica, whose ids may be given once for all of them (positions)."""
    table, count = module.weight, replicas.count
    dtype = torch.float32 if replicas.loses_eps(table.dtype) else table.dtype
    if count > 1 and replicas.is_shared(module, ids):
        if ids.dim() == 0:
            raise LostAxisError(f"the input of a {type(module).__name__} is one number for all examples")
        rows = replicas.rows(table, ids, dtype)
        rows = rows if ids.dim() > 1 and ids.shape[0] == 1 else rows.unsqueeze(1)
        examples = replicas.together.examples
        return rows.expand(count, examples, *rows.shape[2:]).reshape(count * examples, *rows.shape[2:])
    replicas.check(module, ids)
    each = ids.reshape(count, -1)
    if bool((each == each[0]).all()):
        rows = replicas.rows(table, each[0], dtype)
    else:
        rows = torch.stack([replicas.rows(table, own, dtype)[number] for number, own in enumerate(each)])
    return rows.view(*ids.shape, table.shape[1])


class _Gathers(TorchFunctionMode):
    """Answers the table look-ups of one embedding module."""

    def __init__(self, module: nn.Embedding, replicas: Replicas) -> None:
        super().__init__()
        self._module, self._replicas = module, replicas

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.embedding and args[1] is self._module.weight:
            return _gather(self._module, self._replicas, args[0])
        if any(arg is self._module.weight for arg in args) and getattr(func, "__name__", "") != "__get__":
            raise NotALeafError
        return func(*args, **(kwargs or {}))


def _embedding_within(module: nn.Embedding, replicas: Replicas, original: Forward, ids: Tensor) -> Tensor:
    """A subclass with a forward of its own (positions with an offset, scaled rows): only its look-up is replaced."""
    if not replicas.displaces(module.weight):
        return _tensor(original(ids))
    with _Gathers(module, replicas):
        return _tensor(original(ids))


def _layer_norm(module: nn.LayerNorm, replicas: Replicas, original: Forward, x: Tensor) -> Tensor:
    if not replicas.displaces(module.weight) and not replicas.displaces(module.bias):
        return _tensor(original(x))
    replicas.check(module, x)
    wide = x.float()
    normal = F.layer_norm(wide, module.normalized_shape, None, None, module.eps)
    return _affine(replicas, normal, module.weight, module.bias).to(norm_dtype(x)).view(x.shape)


def _rms_norm(module: nn.RMSNorm, replicas: Replicas, original: Forward, x: Tensor) -> Tensor:
    if not replicas.displaces(module.weight):
        return _tensor(original(x))
    replicas.check(module, x)
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    normal = F.rms_norm(x.float(), list(module.normalized_shape), None, eps)
    return _affine(replicas, normal, module.weight, None).to(norm_dtype(x)).view(x.shape)


def _affine(replicas: Replicas, normal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``g_i * x + b_i`` over the last axes, in fp32."""
    rows = normal.view(replicas.count, -1, weight.numel())
    scale = replicas.all(weight).view(replicas.count, 1, -1)
    if bias is None:
        return rows.mul_(scale)
    return torch.addcmul(replicas.all(bias).view(replicas.count, 1, -1), rows, scale, out=rows)


def elementwise(module: nn.Module, replicas: Replicas, original: Forward, x: Tensor) -> Tensor:
    """Vectors only, such as every RMSNorm class: each becomes [R, 1, d] against activations [R, m, d]."""
    vectors = own_parameters(module)
    width = x.shape[-1]
    if not any(replicas.displaces(vector) for vector in vectors):
        return _tensor(original(x))
    if any(vector.numel() != width for vector in vectors):
        raise NotALeafError
    replicas.check(module, x)
    theta = [vector.data for vector in vectors]
    try:
        for vector in vectors:
            vector.data = replicas.all(vector).view(replicas.count, 1, width)
        result = _tensor(original(x.reshape(replicas.count, -1, width)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise NotALeafError from error
    finally:
        for vector, data in zip(vectors, theta, strict=True):
            vector.data = data
    if result.numel() != x.numel():
        raise NotALeafError
    return result.reshape(x.shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype matrix products take place: autocast's if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def norm_dtype(x: Tensor) -> torch.dtype:
    """What normalisation gives under the autocast policy: fp32 on CUDA, the input's dtype on the CPU."""
    autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if autocast else x.dtype


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise NotALeafError
    return output


_LEAVES: dict[type[nn.Module], Leaf] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
}
