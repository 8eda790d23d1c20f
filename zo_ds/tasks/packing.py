"""Whether, and how, a model takes several sequences in one row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zo_ds.forward.backbone import without_adapters
from zo_ds.tasks.layout import Prompt

log = logging.getLogger("zo_ds")

TOLERANCE = 1e-3
"""Of the largest score. A sequence that saw its neighbours would be far off."""
TOLERANCE_16_BIT = 3e-2


@dataclass(frozen=True)
class Packing:
    """How sequences share a row, see `layout.packed`.

    Attributes:
        causal: whether a token sees only those before it.
        first_position: what the model counts positions from.
        hidden_size: of the model.
        window: the longest sequence whose tokens all see each other, where layers attend to a window only.
        tolerance: of scores, see `gives`.
        rows: how many of them; as many as pay if None.
    """

    causal: bool
    first_position: int
    hidden_size: int
    window: int | None
    tolerance: float
    rows: int | None = None

    @classmethod
    def of(cls, module: nn.Module, *, causal: bool, first_position: int = 0) -> Packing:
        """What to try with a model."""
        inner: Any = without_adapters(module)
        config = inner.config.get_text_config()
        windows = [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")
        ]
        half = any(parameter.dtype.itemsize == 2 for parameter in module.parameters())
        return cls(
            causal,
            first_position,
            getattr(config, "hidden_size", None) or 768,
            min((window for window in windows if window), default=None),
            TOLERANCE_16_BIT if half else TOLERANCE,
        )

    def takes(self, prompts: Sequence[Prompt]) -> bool:
        """Whether these sequences can be packed."""
        return self.window is None or all(prompt.length <= self.window for prompt in prompts)

    def gives(self, alone: Tensor, together: Callable[[], Tensor]) -> bool:
        """Whether scores in shared rows are those of rows of one's own.

        Args:
            alone: scores in padded rows.
            together: computes them in packed rows.
        """
        try:
            gap = float((together() - alone).abs().max())
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, AttributeError) as error:
            log.debug("%s", f"sequences are not packed: {error}")
            return False
        same = gap <= self.tolerance * float(alone.abs().max())
        if not same:
            log.debug("%s", f"sequences are not packed: scores differ by {gap:.3g}")
        return same
