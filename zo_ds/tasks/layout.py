"""How token sequences are laid out in rows: padded, or packed several to a row, so that little padding is computed.

A `Sequence` is a prompt with branches: options that continue it, each of which sees the prompt and itself alone. In a
packed row every sequence sees only itself, by a block mask, and counts its positions from 0, so that it is computed as
if it had a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Part = dict[str, Tensor]
"""A model's inputs: ``input_ids`` and more, all [rows, ...]."""

GROUP_COST = 64
"""What another pass costs, in tokens: displaced weights are made again for it (tools/bench_step.py)."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of the options that branch off its end."""

    stem: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.stem) + sum(map(len, self.branches))

    def place(self, branch: int, token: int) -> int:
        """Where a branch's token stands; token -1 is the last of the stem."""
        if token < 0:
            return len(self.stem) + token
        return len(self.stem) + sum(map(len, self.branches[:branch])) + token


@dataclass(frozen=True)
class Layout:
    """Where every sequence is.

    Attributes:
        parts: the model's inputs, one call each.
        places: of each sequence, (part, row, column of its first token).
    """

    parts: list[Part]
    places: list[tuple[int, int, int]]


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, grouped: bool = True) -> Layout:
    """Rows of token ids padded on the right, in groups of like length.

    Args:
        rows: token ids.
        pad_id: any token; it is masked.
        grouped: in as many calls as cost least, else in one.
    """
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), number))
    lengths = [len(rows[number]) for number in order]
    parts: list[Part] = []
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(rows)
    for start, stop in _groups(lengths) if grouped else [(0, len(rows))]:
        # A single group keeps the order that it was given.
        members = order[start:stop] if stop - start < len(rows) else list(range(len(rows)))
        for row, number in enumerate(members):
            places[number] = (len(parts), row, 0)
        parts.append(pad([rows[number] for number in members], pad_id))
    return Layout(parts, places)


def _groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts of ascending lengths that make padding and the cost of groups least."""
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(lengths) + 1):
        costs = [best[start][0] + (stop - start) * lengths[stop - 1] + GROUP_COST for start in range(stop)]
        start = min(range(stop), key=lambda number: costs[number])
        best.append((costs[start], start))
    cuts: list[tuple[int, int]] = []
    stop = len(lengths)
    while stop:
        cuts.append((best[stop][1], stop))
        stop = best[stop][1]
    return cuts[::-1]


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> Part:
    """``input_ids`` and ``attention_mask``, int64 [rows, longest], padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(
    prompts: Sequence[Prompt],
    pad_id: int,
    *,
    causal: bool,
    hidden_size: int,
    first_position: int = 0,
    rows: int | None = None,
) -> Layout:
    """Sequences packed into as few tokens as pays, with ``position_ids`` and a mask [rows, 1, width, width].

    Args:
        prompts: the sequences.
        pad_id: any token; nothing but itself sees it.
        causal: whether a token sees only those before it.
        hidden_size: of the model; the longer a row is, the more its attention costs beside its products.
        first_position: what the model counts positions from.
        rows: how many; as many as cost least if None, and then padded ones if sharing rows saves nothing.
    """
    lengths = [prompt.length for prompt in prompts]
    bins, width = _best_bins(lengths, hidden_size) if rows is None else _bins(lengths, rows)
    if rows is None and len(bins) == len(prompts) and not any(prompt.branches for prompt in prompts):
        return padded([prompt.stem for prompt in prompts], pad_id)
    ids = torch.full((len(bins), width), pad_id, dtype=torch.int64)
    positions = torch.full((len(bins), width), first_position, dtype=torch.int64)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(bins), 1, 1, 1)
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(prompts)
    for row, members in enumerate(bins):
        start = 0
        for number in members:
            prompt = prompts[number]
            places[number] = (0, row, start)
            end = start + prompt.length
            ids[row, start:end] = torch.tensor([*prompt.stem, *(t for branch in prompt.branches for t in branch)])
            positions[row, start:end] = first_position + _positions(prompt)
            mask[row, 0, start:end, start:end] = _sees(prompt, causal)
            start = end
    part = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return Layout([part], places)


def _positions(prompt: Prompt) -> Tensor:
    stem = len(prompt.stem)
    branches = [torch.arange(stem, stem + len(branch)) for branch in prompt.branches]
    return torch.cat([torch.arange(stem), *branches])


def _sees(prompt: Prompt, causal: bool) -> Tensor:
    """Bool [length, length]: row i sees column j."""
    stem = len(prompt.stem)
    owner = torch.cat([torch.full((len(b),), number) for number, b in enumerate([prompt.stem, *prompt.branches])])
    sees = (owner.unsqueeze(1) == owner) | (torch.arange(len(owner)) < stem)
    return sees.tril() if causal else sees


def _best_bins(lengths: Sequence[int], hidden_size: int) -> tuple[list[list[int]], int]:
    """Rows with the numbers of their sequences, and their width, by the least cost.

    A token's products cost 24 d^2 a layer, its attention to a row of width w about 12 d w (4 d w at a third of the
    speed), so that a row costs w + w^2 / 2d.
    """
    best: tuple[float, list[list[int]], int] | None = None
    for rows in range(len(lengths), 0, -1):
        bins, width = _bins(lengths, rows)
        cost = len(bins) * (width + width * width / (2 * hidden_size))
        if best is None or cost < best[0]:
            best = (cost, bins, width)
    assert best is not None
    return best[1], best[2]


def _bins(lengths: Sequence[int], rows: int) -> tuple[list[list[int]], int]:
    """Sequences in so many rows of like length: the longest left goes into the shortest row."""
    bins: list[list[int]] = [[] for _ in range(rows)]
    fill = [0] * rows
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        row = min(range(rows), key=lambda r: (fill[r], r))
        bins[row].append(number)
        fill[row] += lengths[number]
    return [sorted(members) for members in bins], max(fill)
