"""Which ranks hold the weights together, who updates which part of them, and MPI's way of telling each other."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.launch import jobs
from zo_ds.errors import ConfigError, PeerError
from zo_ds.maths import noise
from zo_ds.parallel.layout import ROOM_FOR_COPIES, Kind, Layout, agreed_total, choose_layout
from zo_ds.stores.zero3 import Zero3Store

GB = 2**30


class Answers:
    """A channel whose other ranks give what they are told to.

    Args:
        rank: of this process.
        nodes: number of ranks of each node, which have consecutive ranks; or the node of each rank.
        others: what the other ranks give in the second exchange and later; None: the same as this one.
    """

    sent = 0

    def __init__(self, rank: int, nodes: list[int], others: list[int] | None = None, of_rank: bool = False) -> None:
        self.places = nodes if of_rank else [node for node, size in enumerate(nodes) for _ in range(size)]
        self.rank, self.world_size = rank, len(self.places)
        self.local_world_size = self.places.count(self.places[rank])
        self.local_rank = self.places[:rank].count(self.places[rank])
        self.others, self.exchanges = others, 0

    def all_gather(self, values: Tensor) -> list[Tensor]:
        self.exchanges += 1
        if self.exchanges == 1:
            assert values.tolist() == self._of(self.rank)
            return [torch.tensor(self._of(rank)) for rank in range(self.world_size)]
        given = [values.clone() for _ in self.places]
        for rank, other in enumerate(self.others or []):
            if rank != self.rank:
                given[rank] = torch.full_like(values, other)
        return given

    def _of(self, rank: int) -> list[int]:
        """Ranks on its node, and the first of them if they follow one another."""
        return [self.places.count(self.places[rank]), rank - self.places[:rank].count(self.places[rank])]

    def broadcast(self, payload: bytes) -> bytes:
        return payload

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""


def choose(channel: Answers, wanted: Kind | None = None, shard_size: int | None = None, **given: Any) -> Layout:
    defaults = {"weight_bytes": GB, "stage": 3, "offload": "cpu", "free_bytes": 100 * GB, "device_bytes": 100 * GB}
    return choose_layout(channel, wanted, shard_size, **{**defaults, **given})


def test_copies_that_fit_stay_apart() -> None:
    for rank in range(4):
        for offload in ("none", "cpu", "nvme"):
            assert choose(Answers(rank, [4]), offload=offload) == Layout(Kind.SOLO, rank, 4)


@pytest.mark.parametrize(("offload", "kind"), [("cpu", Kind.SHARED_HOST), ("nvme", Kind.SHARED_HOST)])
def test_copies_that_do_not_fit_the_host_are_shared(offload: str, kind: Kind) -> None:
    limit = int(ROOM_FOR_COPIES * 100 * GB / 4)
    assert choose(Answers(1, [4, 4]), offload=offload, weight_bytes=limit).kind is Kind.SOLO
    assert choose(Answers(1, [4, 4]), offload=offload, weight_bytes=limit + 1) == Layout(kind, 1, 8, 4)
    assert choose(Answers(1, [4, 4]), offload=offload, weight_bytes=limit + 1, device_bytes=0).size == 4


def test_copies_that_do_not_fit_the_device_are_cut_up() -> None:
    limit = int(ROOM_FOR_COPIES * 10 * GB)
    given = {"offload": "none", "device_bytes": 10 * GB}
    assert choose(Answers(5, [4, 4]), weight_bytes=limit, **given).kind is Kind.SOLO
    assert choose(Answers(5, [4, 4]), weight_bytes=limit + 1, **given) == Layout(Kind.SHARD_GROUP, 5, 8, 4)
    assert choose(Answers(5, [4, 4]), None, 2, weight_bytes=limit + 1, **given) == Layout(Kind.SHARD_GROUP, 5, 8, 2)


@pytest.mark.parametrize(
    ("nodes", "given"),
    [([1, 1], {}), ([4], {"stage": 0, "offload": "none"}), ([2, 4], {}), ([2, 4], {"offload": "none"})],
)
def test_what_does_not_fit_but_cannot_be_shared_stays_apart(nodes: list[int], given: dict[str, Any]) -> None:
    assert choose(Answers(0, nodes), weight_bytes=10**15, **given) == Layout(Kind.SOLO, 0, sum(nodes))


@given(
    rank=st.integers(0, 3),
    tight=st.lists(st.booleans(), min_size=4, max_size=4),
    offload=st.sampled_from(["none", "cpu"]),
)
def test_one_rank_without_room_is_enough_and_all_choose_alike(rank: int, tight: list[bool], offload: str) -> None:
    weights = 10**15 if tight[rank] else 1
    found = choose(Answers(rank, [2, 2], [int(flag) for flag in tight]), weight_bytes=weights, offload=offload)
    together = Kind.SHARD_GROUP if offload == "none" else Kind.SHARED_HOST
    assert found == (Layout(together, rank, 4, 2) if any(tight) else Layout(Kind.SOLO, rank, 4))


@given(rank=st.integers(0, 5), wanted=st.sampled_from([None, *Kind]), weights=st.sampled_from([1, 10**15]))
def test_every_rank_takes_part_in_the_same_exchanges(rank: int, wanted: Kind | None, weights: int) -> None:
    """One of them may be on a node of its own, and have no room."""
    channel = Answers(rank, [1, 3, 2])
    try:
        choose(channel, wanted, weight_bytes=weights)
    except ConfigError:
        assert wanted in (Kind.SHARED_HOST, Kind.SHARD_GROUP)
    assert channel.exchanges == (2 if wanted is None else 1)


@pytest.mark.parametrize(
    ("wanted", "size", "nodes", "given", "words"),
    [
        (Kind.SHARED_HOST, None, [2], {"stage": 0, "offload": "none"}, "needs ZeRO stage 3"),
        (Kind.SHARD_GROUP, None, [2], {"stage": 0, "offload": "none"}, "needs ZeRO stage 3"),
        (Kind.SHARED_HOST, None, [2], {"offload": "none"}, "needs weights in host memory"),
        (Kind.SHARED_HOST, None, [2, 4], {}, "unequal numbers of ranks"),
        (Kind.SHARD_GROUP, 3, [2, 2], {}, "shard groups of 3 do not divide 4 ranks"),
        (Kind.SHARD_GROUP, 8, [4], {}, "shard groups of 8 do not divide 4 ranks"),
    ],
)
def test_layouts_that_cannot_be(
    wanted: Kind, size: int | None, nodes: list[int], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        choose(Answers(0, nodes), wanted, size, **given)
    assert caught.value.remedy
    assert "parallel." in caught.value.where


def test_a_shard_group_that_would_be_one_rank_is_refused() -> None:
    with pytest.raises(ConfigError):
        choose(Answers(0, [2, 4]), Kind.SHARD_GROUP, weight_bytes=10**15, offload="none")


@pytest.mark.parametrize("wanted", [Kind.SHARED_HOST, None])
def test_memory_cannot_be_shared_between_nodes(wanted: Kind | None) -> None:
    """`mpirun --map-by node` numbers ranks across nodes."""
    try:
        found = choose(Answers(1, [0, 1, 0, 1], of_rank=True), wanted, weight_bytes=10**15)
    except ConfigError:
        return
    assert found.kind is Kind.SOLO


@given(
    size=st.sampled_from([1, 2, 3, 6]),
    rank=st.integers(0, 11),
    kind=st.sampled_from([Kind.SHARD_GROUP, Kind.SHARED_HOST]),
)
def test_ranks_of_a_replica(size: int, rank: int, kind: Kind) -> None:
    layout = Layout(kind, rank, 12, size)
    assert rank in layout.members
    assert layout.members[layout.member] == rank
    assert [Layout(kind, r, 12, size).replica for r in layout.members] == [layout.replica] * size
    assert layout.lockstep == (kind is Kind.SHARD_GROUP and size > 1)


@given(
    size=st.sampled_from([1, 2, 4]),
    parts=st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4),
    odd=st.integers(0, 7),
    off=st.integers(0, 2**64 - 1),
)
def test_totals_of_replicas_must_be_equal(size: int, parts: list[int], odd: int, off: int) -> None:
    """Parts may be shared out in another way in each replica."""
    replicas = [parts[:size], parts[:size][::-1]]
    every = [value for replica in replicas for value in replica]
    every[odd % len(every)] = (every[odd % len(every)] + off) % 2**64

    class Given(Answers):
        def all_gather(self, values: Tensor) -> list[Tensor]:
            return [torch.tensor([value - 2**64 if value >= 2**63 else value]) for value in every]

    layout = Layout(Kind.SHARD_GROUP, 0, 2 * size, size)
    channel = Given(0, [2 * size])
    if off:
        with pytest.raises(PeerError, match="ranks disagree on it") as caught:
            agreed_total(channel, layout, every[0], "it")
        assert caught.value.where.startswith(f"ranks {', '.join(str(r) for r in range(size, 2 * size))} ")
    else:
        assert agreed_total(channel, layout, every[0], "it") == sum(parts[:size]) % 2**64


# Who updates what


class Sharded:
    """What `Zero3Store` asks of a parameter."""

    def __init__(self, numel: int, world: int, rank: int) -> None:
        count = -(-numel // world)
        self.ds_tensor = torch.arange(rank * count, (rank + 1) * count)
        self.ds_tensor.ds_numel = count
        self.ds_numel, self.ds_zero_partition_rank, self.ds_zero_partition_world_size = numel, rank, world
        self.ds_status = None


@given(numel=st.integers(0, 5000) | st.integers(0, 40), world=st.integers(1, 5), parts=st.integers(1, 6))
def test_every_element_is_in_one_part_of_one_shard(numel: int, world: int, parts: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        for part in range(parts):
            store = Zero3Store(nn.Module(), {}, None, (part, parts))  # type: ignore[arg-type]
            sharded: Any = Sharded(numel, world, rank)
            with store.local_shard(sharded) as (start, flat):
                assert store.held(sharded) == (start, flat.numel())
                assert flat.tolist() == list(range(start, start + flat.numel()))
                assert not flat.numel() or part == 0 or (start - store_first(sharded)) % noise.TILE == 0
                seen += flat.tolist()
    assert sorted(seen) == list(range(numel))


def store_first(sharded: Any) -> int:
    return int(sharded.ds_tensor.ds_numel) * int(sharded.ds_zero_partition_rank)


# MPI

ALONE = """
import os, torch
from zo_ds.parallel.channel import agree
from zo_ds.parallel.mpi import MPIChannel
channel = MPIChannel()
assert (channel.rank, channel.world_size, channel.local_rank, channel.local_world_size) == (0, 1, 0, 1)
own = torch.arange(6).view(2, 3)
kinds = [own, own.double() / 3, own.float(), own > 2, own.t(), torch.zeros(0), torch.zeros(0, 3, dtype=torch.int64),
         torch.tensor(4), torch.tensor([True]), own.bfloat16(), own[:, 1], torch.zeros(1)]
for values in kinds:
    (found,) = channel.all_gather(values)
    assert torch.equal(found, values) and found.dtype == values.dtype and found.shape == values.shape, values
    if values.numel():
        assert found.data_ptr() != values.data_ptr()
for payload in (b"", b"x", bytes(range(256)) * 5000, memoryview(b"abc").tobytes()):
    assert channel.broadcast(payload) == payload
agree(channel, b"anything", "this")
channel.barrier()
assert channel.sent == 0
channel.close()
print("done")
"""


def test_mpi_alone() -> None:
    pytest.importorskip("mpi4py")
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, env=jobs.environment()
    )
    if "MPI cannot be used" in done.stderr:
        pytest.skip("no MPI library")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
