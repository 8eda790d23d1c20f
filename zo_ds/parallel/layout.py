"""Who holds the weights: every rank a copy, a group of ranks one in shards, or a node one in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from zo_ds.errors import ConfigError
from zo_ds.parallel.channel import Channel, apart_from_the_first

_MASK64 = 0xFFFFFFFFFFFFFFFF
ROOM_FOR_COPIES = 0.8
"""Of the memory that is free, what copies of the weights may take before ranks share one."""


class Kind(str, Enum):
    """Names of the layouts."""

    SOLO = "solo"
    SHARD_GROUP = "shard_group"
    SHARED_HOST = "shared_host"


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job hold replicas of theta.

    Attributes:
        kind: see `Kind`.
        rank: of this process.
        world_size: ranks of the job.
        size: consecutive ranks that hold one replica together.
    """

    kind: Kind
    rank: int
    world_size: int
    size: int = 1

    @property
    def member(self) -> int:
        """Number of this rank within its replica."""
        return self.rank % self.size

    @property
    def replica(self) -> int:
        """Number of the replica that this rank has a part of."""
        return self.rank // self.size

    @property
    def members(self) -> range:
        """Ranks of this rank's replica."""
        return range(self.replica * self.size, (self.replica + 1) * self.size)

    @property
    def lockstep(self) -> bool:
        """Whether the ranks of a replica must run the same forwards, since each needs the others' shards."""
        return self.kind is Kind.SHARD_GROUP and self.size > 1

    @property
    def shares_memory(self) -> bool:
        """Whether other ranks write parts of the weights that this one reads where they lie."""
        return self.kind is Kind.SHARED_HOST and self.size > 1

    def totals(self, parts: Sequence[int]) -> list[int]:
        """Sums modulo 2**64 over the ranks of each replica.

        Args:
            parts: one number for each rank.
        """
        return [sum(parts[at : at + self.size]) & _MASK64 for at in range(0, self.world_size, self.size)]


def agreed_total(channel: Channel, layout: Layout, part: int, what: str) -> int:
    """The sum of a number over the ranks of a replica, which must be the same for each replica; collective.

    Args:
        channel: to all ranks.
        layout: of the replicas.
        part: this rank's, modulo 2**64.
        what: its name in the error.

    Raises:
        PeerError: replicas differ.
    """
    raw = torch.frombuffer(bytearray(part.to_bytes(8, "little")), dtype=torch.int64)
    parts = [int(other) & _MASK64 for other in channel.all_gather(raw)]
    totals = layout.totals(parts)
    if len(set(totals)) > 1:
        raise apart_from_the_first([total for total in totals for _ in range(layout.size)], what)
    return totals[0]


def choose_layout(
    channel: Channel,
    wanted: Kind | None,
    shard_size: int | None,
    *,
    weight_bytes: int,
    stage: int,
    offload: str,
    free_bytes: int,
    device_bytes: int,
) -> Layout:
    """The layout of a job; collective.

    Args:
        channel: to all ranks.
        wanted: None: solo, unless the copies of a node's ranks would not fit beside each other.
        shard_size: ranks of a shard group; None: those of a node.
        weight_bytes: of one copy of the model.
        stage: of ZeRO.
        offload: none, cpu or nvme.
        free_bytes: of host memory on this node.
        device_bytes: free on this rank's device.

    Raises:
        ConfigError: the layout does not fit the ranks or the ZeRO settings.
    """
    mine = torch.tensor([channel.local_world_size, channel.rank - channel.local_rank])
    told = [[int(value) for value in other] for other in channel.all_gather(mine)]
    local = [size for size, _ in told]
    # The ranks of a node must follow one another. (On one node they do, in whatever order they were numbered there.)
    apart = local[0] < channel.world_size and any(first != r - r % local[0] for r, (_, first) in enumerate(told))
    node = local[0] if len(set(local)) == 1 and not apart else 1
    if wanted is None:
        memory = device_bytes if offload == "none" else free_bytes / max(1, channel.local_world_size)
        tight = stage == 3 and channel.local_world_size > 1 and weight_bytes > ROOM_FOR_COPIES * memory
        anywhere = any(bool(flag) for flag in channel.all_gather(torch.tensor([tight])))
        together = Kind.SHARD_GROUP if offload == "none" else Kind.SHARED_HOST
        wanted = together if anywhere and node > 1 else Kind.SOLO
    size = {Kind.SOLO: 1, Kind.SHARED_HOST: node, Kind.SHARD_GROUP: shard_size or node}[wanted]
    if node == 1 < max(local) and (wanted is Kind.SHARED_HOST or (wanted is Kind.SHARD_GROUP and shard_size is None)):
        raise ConfigError(
            "the nodes have unequal numbers of ranks, or a node's ranks do not follow one another",
            where=f"parallel.layout = {wanted.value}",
            why=f"ranks on the node of each rank: {local}",
            remedy="start as many ranks on every node, numbered node by node (mpirun --map-by slot), or use "
            "parallel.layout=solo",
        )
    _check(channel, wanted, size, stage, offload)
    return Layout(wanted, channel.rank, channel.world_size, size)


def _check(channel: Channel, kind: Kind, size: int, stage: int, offload: str) -> None:
    where = f"parallel.layout = {kind.value}"
    if kind is not Kind.SOLO and stage != 3:
        raise ConfigError(
            f"the layout {kind.value} needs ZeRO stage 3",
            where=where,
            why="with stage 0 every rank holds all weights on its own device",
            remedy="set deepspeed.zero_optimization.stage to 3, or parallel.layout to solo",
        )
    if kind is Kind.SHARED_HOST and offload == "none":
        raise ConfigError(
            "the layout shared_host needs weights in host memory",
            where=where,
            remedy="set deepspeed.zero_optimization.offload_param.device to cpu or nvme, or use shard_group",
        )
    if channel.world_size % size:
        raise ConfigError(
            f"shard groups of {size} do not divide {channel.world_size} ranks",
            where="parallel.shard_size",
            remedy="choose a divisor of the number of ranks",
        )
