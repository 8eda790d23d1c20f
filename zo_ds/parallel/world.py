"""The world that DeepSpeed sees: this rank alone, or its shard group; set up before anything else asks for it."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from zo_ds.errors import MachineError, PeerError
from zo_ds.parallel.channel import Channel
from zo_ds.parallel.layout import Layout

_NAME_BYTES = 256

_given: dict[str, str | None] = {}
"""What the launcher had set where DeepSpeed was told something else."""


def enter_world(layout: Layout, channel: Channel, timeout_s: float) -> None:
    """Make torch.distributed and DeepSpeed see this rank's replica alone; collective. Does nothing the second time.

    A shard group is a world of its own, not a subgroup of one: no collective of DeepSpeed's can leave it.

    Raises:
        MachineError: torch.distributed is already set up in another way.
        PeerError: the ranks of a shard group did not find each other.
    """
    members, number = (layout.size, layout.member) if layout.lockstep else (1, 0)
    if dist.is_initialized():
        if dist.get_world_size() != members:
            raise MachineError(
                f"torch.distributed is already set up for {dist.get_world_size()} ranks",
                where="zo_ds.initialize",
                why=f"DeepSpeed has to see {members} of them; scalars cross on zo_ds's own channel",
                remedy="call zo_ds.initialize first and drop init_process_group / deepspeed.init_distributed",
            )
        return
    store = HashStore() if members == 1 else _shared_store(layout, channel, timeout_s)
    # DeepSpeed refuses groups that contradict these; LOCAL_RANK stays, it chooses the device.
    _given.update({name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")})
    os.environ.update(RANK=str(number), WORLD_SIZE=str(members))
    os.environ.setdefault("LOCAL_RANK", str(channel.local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # A CPU without fp16 instructions makes zero.Init turn float32 into bfloat16 (precedence bug in 0.19).
        get_accelerator().is_fp16_supported = lambda: True
        # Built by compiler on first use, and never needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if get_accelerator().device_name() == "cpu" else get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=store, rank=number, world_size=members, timeout=timedelta(seconds=timeout_s))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed(backend)


def _shared_store(layout: Layout, channel: Channel, timeout_s: float) -> Any:
    """A store that the first rank of each shard group serves, on a port that it tells the others of."""
    timeout, store = timedelta(seconds=timeout_s), None
    if layout.member == 0:
        store = TCPStore("0.0.0.0", 0, layout.size, True, timeout, wait_for_workers=False)
    port = 0 if store is None else store.port
    ports = torch.cat(channel.all_gather(torch.tensor([port])))
    name = socket.gethostname().encode()[:_NAME_BYTES]
    names = channel.all_gather(torch.tensor(list(name.ljust(_NAME_BYTES, b"\0")), dtype=torch.uint8))
    leader = layout.members[0]
    host = bytes(names[leader].tolist()).rstrip(b"\0").decode()
    near = channel.local_world_size == channel.world_size or leader >= layout.rank - channel.local_rank
    host = "127.0.0.1" if near and host == name.decode() else host
    try:
        return store or TCPStore(host, int(ports[leader]), layout.size, False, timeout)
    except RuntimeError as error:
        raise PeerError(
            "the ranks of a shard group did not find each other",
            where=f"rank {layout.rank}, looking for rank {leader} at {host}:{int(ports[leader])}",
            why=str(error).splitlines()[0],
            remedy="check that nodes can reach each other by host name, or keep shard groups within a node",
        ) from error


def leave_world() -> None:
    """Tear down DeepSpeed's world: a process may abort at exit without this, and another engine may follow after it."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if not _given:
        return
    import deepspeed.comm.comm
    import deepspeed.utils.groups

    # DeepSpeed 0.19 keeps these, and would hand out groups of the world that is gone.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    for name, value in _given.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _given.clear()
