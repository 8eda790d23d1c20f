"""The channel over a gloo group of torch.distributed's that DeepSpeed does not know about.

Slower than `zo_ds.parallel.tcp`: gloo asks the receiver whether it is ready, so that an exchange takes a round trip.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from zo_ds.errors import PeerError
from zo_ds.parallel.tcp import join_error


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
        self.sent = 0
        timeout = timedelta(seconds=timeout_s)
        try:
            self._store = TCPStore(address, port, world_size, serve, timeout)
            prefixed = PrefixStore("zo_ds_scalars", self._store)
            self._group = ProcessGroupGloo(prefixed, rank, world_size, timeout)
        except RuntimeError as error:
            raise join_error(error, address, port, rank, timeout_s) from error

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The CPU tensor of every rank, in rank order.

        Raises:
            PeerError: a rank died or stayed silent for the time-out.
        """
        own = values.contiguous()
        flat = own.view(-1)
        gathered = flat.new_empty(self.world_size * flat.numel())
        try:
            # Straight from each rank to each other one: a ring, as in gloo's all-gather, has their latencies added up.
            self._group.alltoall_base(gathered, flat.repeat(self.world_size), [], []).wait()  # type: ignore[attr-defined]  # not in torch's stubs
        except RuntimeError as error:
            raise self._gone(error) from error
        self.sent += flat.nbytes * (self.world_size - 1)
        return [part.view(own.shape) for part in gathered.view(self.world_size, -1)]

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
        self.sent += size * (self.world_size - 1) if self.rank == 0 else 0
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
