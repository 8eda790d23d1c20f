"""Registration with torch: ``torch.ops.zo_ds.*``, one schema, CPU and CUDA kernels, and fake ones for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_ds.ops import cpu, cuda

_SCHEMAS = (
    "perturb_(Tensor(a!) out, Tensor theta, int seed, int param, int[] directions, float[] eps, int start,"
    " int columns, bool gaussian) -> ()",
    "embedding_rows_(Tensor(a!) out, Tensor table, Tensor ids, int seed, int param, int[] directions, float[] eps,"
    " bool factored, bool gaussian) -> ()",
    "update_(Tensor(a!)[] thetas, int[] params, int[] starts, int[] columns, bool[] gaussian, bool[] decays,"
    " Tensor term_counts, Tensor shrinks, Tensor rounding_seeds, Tensor seeds, Tensor directions,"
    " Tensor coefficients) -> ()",
    "signs_(Tensor(a!) out, int seed, int param, int[] directions, int start, int count, int stream) -> ()",
    "state_hash(Tensor theta, int param, int start) -> Tensor",
)
NAMES = tuple(schema.split("(", 1)[0] for schema in _SCHEMAS)

_registry: Any = torch.library
_library = _registry.Library("zo_ds", "DEF")


def _no_result(*_: object) -> None:
    """What an op that writes in place returns under torch.compile."""


def _fake_hash(theta: Tensor, param: int, start: int) -> Tensor:
    return theta.new_empty((), dtype=torch.int64)


for _schema, _name in zip(_SCHEMAS, NAMES, strict=True):
    _library.define(_schema)
    _library.impl(_name, getattr(cpu, _name), "CPU")
    _library.impl(_name, getattr(cuda, _name), "CUDA")
    _registry.register_fake(f"zo_ds::{_name}", _fake_hash if _name == "state_hash" else _no_result, lib=_library)
