"""Counts what is allocated on the meta device, for `prove.py`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
aten: Any = torch.ops.aten


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage on the meta device for as long as it lives.

    Args:
        labelled: how many positions a question for non-zero labels finds.
    """

    def __init__(self, labelled: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._labelled, self._kind = labelled, "activations"
        self._known: set[int] = set()
        self.live: dict[str, int] = {}
        self.parts: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        self.peak, self.largest, self.largest_is = 0, 0, ""

    def start(self) -> None:
        """Forget the peak, not what is alive."""
        self.peak, self.parts = 0, {}

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        """What is allocated within this context is of this kind."""
        outside, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = outside

    def ignore(self, tensor: Tensor) -> None:
        """Not count a tensor that was there before: it stands for something that is counted otherwise."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known, result = self._stand_in(func, args, kwargs)
        if not known:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._note(leaf, func)
        return result

    def _stand_in(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether an operation cannot run without values, and what it gives then."""
        packet = func.overloadpacket
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func.namespace == "zo_ds":
            return True, None
        if first is None or first.device.type != "meta":
            return False, None
        if packet in (aten.equal, aten.allclose):
            return True, args[0].shape == args[1].shape
        if packet is aten._local_scalar_dense:
            # A mask is never "all ones": it is made.
            return True, False if first.dtype == torch.bool else 1.0
        if packet is aten.nonzero:
            return True, torch.empty((self._labelled, first.dim()), dtype=torch.int64, device=META)
        device = kwargs.get("device")
        if packet is aten._to_copy and device is not None and torch.device(device).type == "cpu":
            return True, torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        return False, None

    def _note(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key, size, kind = storage._cdata, storage.nbytes(), self._kind
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, kind, size)
        self.live[kind] = self.live.get(kind, 0) + size
        self.highest[kind] = max(self.highest.get(kind, 0), self.live[kind])
        if size > self.largest:
            self.largest, self.largest_is = size, f"{kind}, by {func}"
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.parts = total, dict(self.live)

    def _forget(self, key: int, kind: str, size: int) -> None:
        self._known.discard(key)
        self.live[kind] -= size
