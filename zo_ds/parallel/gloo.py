"""The channel over a gloo group of torch.distributed's that DeepSpeed does not know about.

Slower than `zo_ds.parallel.tcp`: gloo asks the receiver whether it is ready, so that an exchange takes a round trip.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from zo_ds.errors import PeerError
from zo_ds.parallel.channel import Seat, gone
from zo_ds.parallel.tcp import join_error


class GlooChannel:
    """Ranks of a launched job, joined through a store at MASTER_ADDR:MASTER_PORT.

    Args:
        seat: of this process.
        timeout_s: after how long a silent peer counts as dead.

    Raises:
        MachineError: rank 0 cannot open the port.
        PeerError: the other ranks did not join in time.
    """

    def __init__(self, seat: Seat, timeout_s: float) -> None:
        self.rank, self.world_size = seat.rank, seat.world_size
        self.local_rank, self.local_world_size = seat.local_rank, seat.local_world_size
        self.sent = 0
        timeout = timedelta(seconds=timeout_s)
        try:
            self._store = TCPStore(seat.address, seat.port, seat.world_size, seat.serve, timeout)
            prefixed = PrefixStore("zo_ds_scalars", self._store)
            self._group = ProcessGroupGloo(prefixed, seat.rank, seat.world_size, timeout)
        except RuntimeError as error:
            raise join_error(error, seat, timeout_s) from error

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
        return gone(f"rank {self.rank} of {self.world_size}", str(error).splitlines()[0])

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1))

    def close(self) -> None:
        """Leave the group once every rank is done with it."""
        self.barrier()
        self._group.shutdown()
