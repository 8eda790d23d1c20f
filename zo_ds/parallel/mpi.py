"""The channel over MPI, for jobs that mpirun started (`deepspeed --launcher openmpi`, `launch/mpi.sh`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_ds.errors import MachineError


class MPIChannel:
    """All ranks of MPI's world.

    MPI ends the whole job when one of its processes dies, and knows no time-outs: a hang is left to the guard.

    Raises:
        MachineError: mpi4py cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise MachineError(
                "MPI cannot be used",
                where="parallel.channel",
                why=str(error).splitlines()[0],
                remedy="pip install 'zo_ds[mpi]' beside an MPI library, or parallel.channel=tcp",
            ) from error
        self._comm: Any = MPI.COMM_WORLD.Dup()
        self.rank, self.world_size = self._comm.Get_rank(), self._comm.Get_size()
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_world_size = node.Get_rank(), node.Get_size()
        node.Free()
        self.sent = 0

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The CPU tensor of every rank, in rank order."""
        own = values.contiguous()
        raw = own.view(-1).view(torch.uint8)
        gathered = torch.empty(self.world_size * raw.numel(), dtype=torch.uint8)
        self._comm.Allgather(raw.numpy(), gathered.numpy())
        self.sent += raw.numel() * (self.world_size - 1)
        return [part.view(own.dtype).view(own.shape) for part in gathered.view(self.world_size, -1)]

    def broadcast(self, payload: bytes) -> bytes:
        """Rank 0's bytes."""
        size = int(self.all_gather(torch.tensor([len(payload)]))[0])
        buffer = bytearray(payload if self.rank == 0 else size)
        if size:
            self._comm.Bcast(buffer, 0)
        self.sent += size * (self.world_size - 1) if self.rank == 0 else 0
        return bytes(buffer)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_gather(torch.zeros(1))

    def close(self) -> None:
        """Leave the group once every rank is done with it; MPI itself ends with the process."""
        self.barrier()
        self._comm.Free()
