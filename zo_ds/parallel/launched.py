"""Who started this process, and as which rank: the environment that launchers set, and the channel that follows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

from zo_ds.errors import ConfigError
from zo_ds.parallel.channel import Channel, Seat, SoloChannel
from zo_ds.parallel.gloo import GlooChannel
from zo_ds.parallel.mpi import MPIChannel
from zo_ds.parallel.tcp import TCPChannel

DEFAULT_PORT = 29500
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Rank, size, rank on the node and size of the node, as Open MPI and as MPICH and Intel MPI name them."""


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ or _of_mpi(os.environ) is not None


def open_channel(timeout_s: float, kind: Literal["auto", "tcp", "gloo", "mpi"] = "auto") -> Channel:
    """The channel of this process, from the launcher's environment; a world of one without it.

    Args:
        timeout_s: how long to wait for the other ranks.
        kind: auto takes MPI if mpirun started this process and mpi4py is there, else TCP.

    Raises:
        ConfigError: MPI is wanted, but nothing that knows MPI started this process.
        MachineError, PeerError: see `TCPChannel`, `GlooChannel` and `MPIChannel`.
    """
    env = os.environ
    mpi = None if "RANK" in env else _of_mpi(env)
    if kind == "mpi" and _of_mpi(env) is None:
        raise ConfigError(
            "this process was not started by MPI",
            where="parallel.channel",
            remedy="start it with launch/mpi.sh, mpirun or deepspeed --launcher openmpi, or set parallel.channel=tcp",
        )
    if kind == "mpi" or (kind == "auto" and mpi is not None and find_spec("mpi4py") is not None):
        return MPIChannel()
    rank, world_size, local_rank, local_world_size = mpi or _of_torch(env)
    if world_size == 1:
        return SoloChannel()
    seat = Seat(
        rank,
        world_size,
        local_rank,
        local_world_size,
        env.get("MASTER_ADDR", "127.0.0.1"),
        int(env.get("MASTER_PORT", DEFAULT_PORT)),
        serve=rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )
    return GlooChannel(seat, timeout_s) if kind == "gloo" else TCPChannel(seat, timeout_s)


def _of_torch(env: Mapping[str, str]) -> tuple[int, int, int, int]:
    world_size = int(env.get("WORLD_SIZE", "1"))
    rank = int(env.get("RANK", "0"))
    # torchrun has the one name, the deepspeed launcher the other.
    local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size
    return rank, world_size, int(env.get("LOCAL_RANK", rank)), int(local_size)


def _of_mpi(env: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    for names in _MPI:
        if names[0] in env and names[1] in env:
            rank, size = int(env[names[0]]), int(env[names[1]])
            return rank, size, int(env.get(names[2], rank)), int(env.get(names[3], size))
    return None
