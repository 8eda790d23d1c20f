"""The scalar channel between ranks, which DeepSpeed does not know about, and what they agree on over it.

DeepSpeed and torch.distributed see this process's shard group alone (a world of one, unless weights are sharded), so
that no weights cross between replicas, and replicas that do unequal work cannot hang each other inside DeepSpeed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from zo_ds.errors import PeerError, ZODSError

Result = TypeVar("Result")


class Channel(Protocol):
    """What ranks use to agree on scalars.

    Attributes:
        rank, world_size: of the job.
        local_rank, local_world_size: of this node.
        sent: bytes that this rank has given to others so far, without what the network adds.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    sent: int

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The CPU tensor of every rank, in rank order. All ranks give the same shape and dtype."""
        ...

    def broadcast(self, payload: bytes) -> bytes:
        """Rank 0's bytes; what the others give is not looked at."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


@dataclass(frozen=True)
class Seat:
    """What a launcher told a process.

    Attributes:
        rank, world_size: of the job.
        local_rank, local_world_size: of this node.
        address, port: where rank 0 listens.
        serve: whether this process opens the port (rank 0, unless the launcher's agent already serves it).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    serve: bool


class SoloChannel:
    """A world of one: nothing to exchange, no port needed."""

    rank, world_size, local_rank, local_world_size, sent = 0, 1, 0, 1, 0

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The only rank's tensor."""
        return [values.clone()]

    def broadcast(self, payload: bytes) -> bytes:
        """The only rank's bytes."""
        return payload

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""


def gone(where: str, why: str, what: str = "another rank") -> PeerError:
    """The error of a rank that cannot go on without another one."""
    return PeerError(
        f"{what} is gone",
        where=where,
        why=why,
        remedy="look for the first error in the other ranks' logs (log-rankN.txt in the run directory)",
    )


def on_rank_0(channel: Channel, work: Callable[[], Result]) -> Result | None:
    """Let rank 0 do something alone; what it cannot do ends every rank with the same error.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ZODSError: as rank 0 met it.
    """
    result: Result | None = None
    failure: ZODSError | None = None
    if channel.rank == 0:
        try:
            result = work()
        except ZODSError as error:
            failure = error
    told = channel.broadcast(failure.to_json().encode() if failure is not None else b"")
    if failure is not None:
        raise failure
    if told:
        raise ZODSError.from_json(told)
    return result


def agree(channel: Channel, payload: bytes, what: str) -> None:
    """Check that every rank computed the same.

    Args:
        channel: to the other ranks.
        payload: canonical bytes of what must be equal.
        what: its name in the error.

    Raises:
        PeerError: the digests differ; the message tells which ranks stand apart from rank 0.
    """
    digest = torch.frombuffer(bytearray(hashlib.sha256(payload).digest()[:8]), dtype=torch.int64)
    votes = [int(vote) for vote in channel.all_gather(digest)]
    if len(set(votes)) > 1:
        raise apart_from_the_first(votes, what)


def apart_from_the_first(votes: Sequence[int], what: str) -> PeerError:
    """The error that tells which ranks' votes are others than rank 0's."""
    apart = [rank for rank, vote in enumerate(votes) if vote != votes[0]]
    return PeerError(
        f"ranks disagree on {what}",
        where=f"ranks {', '.join(map(str, apart))} differ from rank 0",
        why="replicas must compute identical scalars; other hardware, libraries, threads or data break that",
        remedy="make the ranks alike; nothing was applied, and the journal holds every agreed step",
    )
