"""DeepSpeed in a world of one: set up before anything else asks torch.distributed who is there."""

from __future__ import annotations

import os
import warnings

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from zo_ds.errors import MachineError


def enter_world_of_one() -> None:
    """Make torch.distributed and DeepSpeed see this process alone. Does nothing the second time.

    Raises:
        MachineError: torch.distributed is already set up with more than one rank.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise MachineError(
                "torch.distributed is already set up for several ranks",
                where="zo_ds.initialize",
                why="each rank runs DeepSpeed in a world of one; only scalars cross, on zo_ds's own channel",
                remedy="call zo_ds.initialize first and drop init_process_group / deepspeed.init_distributed",
            )
        return
    # DeepSpeed refuses groups that contradict these; LOCAL_RANK stays, it chooses the device.
    os.environ.update(RANK="0", WORLD_SIZE="1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # A CPU without fp16 instructions makes zero.Init turn float32 into bfloat16 (precedence bug in 0.19).
        get_accelerator().is_fp16_supported = lambda: True
        # Built by compiler on first use, and never needed by a world of one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if get_accelerator().device_name() == "cpu" else get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed(backend)


def leave_world() -> None:
    """Tear down the world of one; without this a process may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
