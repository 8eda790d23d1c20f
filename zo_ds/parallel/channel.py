"""The scalar channel between replicas: a gloo group that DeepSpeed does not know about.

DeepSpeed and torch.distributed see a world of one in every process, so that they never send weights, and ranks that
do unequal work cannot hang each other inside DeepSpeed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from zo_ds.errors import MachineError, PeerError, ZODSError

DEFAULT_PORT = 29500
Result = TypeVar("Result")


class Channel(Protocol):
    """What replicas use to agree on scalars."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

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


class SoloChannel:
    """A world of one: nothing to exchange, no port needed."""

    rank, world_size, local_rank, local_world_size = 0, 1, 0, 1

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


class GlooChannel:
    """Ranks of a launched job, joined through a store at MASTER_ADDR:MASTER_PORT.

    Args:
        rank, world_size, local_rank, local_world_size: as the launcher numbered them.
        address, port: where rank 0 listens.
        timeout_s: after how long a silent peer counts as dead.
        serve: whether this process opens the port (rank 0, unless the launcher's agent already serves it).

    Raises:
        MachineError: rank 0 cannot open the port.
        PeerError: the other ranks did not join in time.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        local_rank: int,
        local_world_size: int,
        address: str,
        port: int,
        timeout_s: float,
        serve: bool,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        timeout = timedelta(seconds=timeout_s)
        try:
            self._store = TCPStore(address, port, world_size, serve, timeout)
            prefixed = PrefixStore("zo_ds_scalars", self._store)
            self._group = ProcessGroupGloo(prefixed, rank, world_size, timeout)
        except RuntimeError as error:
            raise _join_error(error, address, port, rank, timeout_s) from error

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The CPU tensor of every rank, in rank order.

        Raises:
            PeerError: a rank died or stayed silent for the time-out.
        """
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        try:
            self._group.allgather([gathered], [values.contiguous()]).wait()  # type: ignore[attr-defined]  # not in torch's stubs
        except RuntimeError as error:
            raise self._gone(error) from error
        return gathered

    def broadcast(self, payload: bytes) -> bytes:
        """Rank 0's bytes.

        Raises:
            PeerError: a rank died or stayed silent for the time-out.
        """
        size = int(self.all_gather(torch.tensor([len(payload)]))[0])
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0 and size:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        try:
            self._group.broadcast([buffer]).wait()  # type: ignore[attr-defined]  # not in torch's stubs
        except RuntimeError as error:
            raise self._gone(error) from error
        return buffer.numpy().tobytes()

    def _gone(self, error: RuntimeError) -> PeerError:
        return PeerError(
            "another rank is gone",
            where=f"rank {self.rank} of {self.world_size}",
            why=str(error).splitlines()[0],
            remedy="look for the first error in the other ranks' logs (log-rankN.txt in the run directory)",
        )

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1))

    def close(self) -> None:
        """Leave the group once every rank is done with it."""
        self.barrier()
        self._group.shutdown()


def _join_error(error: RuntimeError, address: str, port: int, rank: int, timeout_s: float) -> MachineError | PeerError:
    reason = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return MachineError(
            f"port {port} is taken",
            where=f"MASTER_PORT={port} on {address}",
            why=reason,
            remedy=f"choose another one: deepspeed --master_port {port + 1} ... (or torchrun --master_port)",
        )
    return PeerError(
        f"the ranks did not find each other within {timeout_s:g} s",
        where=f"rank {rank}, MASTER_ADDR={address} MASTER_PORT={port}",
        why=reason,
        remedy="check that every rank was started and that the address is reachable from all nodes",
    )


def open_channel(timeout_s: float) -> Channel:
    """The channel of this process, from the launcher's environment (deepspeed, torchrun); a world of one without it.

    Raises:
        MachineError, PeerError: see `GlooChannel`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return SoloChannel()
    rank = int(os.environ["RANK"])
    return GlooChannel(
        rank,
        world_size,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", DEFAULT_PORT)),
        timeout_s,
        serve=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
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
    apart = [rank for rank, vote in enumerate(votes) if vote != votes[0]]
    if apart:
        raise PeerError(
            f"ranks disagree on {what}",
            where=f"ranks {', '.join(map(str, apart))} differ from rank 0",
            why="replicas must compute identical scalars; other hardware, libraries, threads or data break that",
            remedy="make the ranks alike; nothing was applied, and the journal holds every agreed step",
        )
