"""Units of work, their fixed order, and the channel on which ranks agree. Ranks are threads here, sockets are real."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import free_port, join, on_ranks
from zo_ds.errors import MachineError, PeerError, ZODSError
from zo_ds.parallel.channel import Channel, SoloChannel, agree, open_channel
from zo_ds.parallel.units import interleave, ordered_mean, units_of_rank


@given(num_units=st.integers(0, 40), world=st.integers(1, 9))
def test_every_unit_belongs_to_one_rank(num_units: int, world: int) -> None:
    shares = [units_of_rank(num_units, rank, world) for rank in range(world)]
    assert sorted(unit for share in shares for unit in share) == list(range(num_units))
    assert all(unit % world == rank for rank, share in enumerate(shares) for unit in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(per_rank=st.integers(1, 5), world=st.integers(1, 6), tail=st.sampled_from([(), (3,), (2, 3)]))
def test_interleave_undoes_the_sharing(per_rank: int, world: int, tail: tuple[int, ...]) -> None:
    units = torch.arange(per_rank * world).view(-1, *[1] * len(tail)).expand(-1, *tail)
    gathered = [units[list(units_of_rank(len(units), rank, world))] for rank in range(world)]
    assert torch.equal(interleave(gathered), units)


def plain_mean(losses: Tensor) -> list[float]:
    units, probes, examples = losses.shape
    means = []
    for probe in range(probes):
        total = 0.0
        for unit in range(units):
            for example in range(examples):
                total += float(losses[unit, probe, example])
        means.append(total / (units * examples))
    return means


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)),
    seed=st.integers(0, 2**32),
    exponent=st.integers(0, 40),
)
def test_mean_is_that_of_a_plain_loop_bit_for_bit(shape: tuple[int, int, int], seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(shape, generator=generator, dtype=torch.float64)
    losses *= 2.0 ** torch.randint(-exponent, exponent + 1, shape, generator=generator)
    assert ordered_mean(losses).tolist() == plain_mean(losses)


def test_mean_does_not_depend_on_the_number_of_ranks() -> None:
    losses = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 9
    for world in (1, 2, 3, 4, 6):
        shared = interleave([losses[list(units_of_rank(12, rank, world))] for rank in range(world)])
        assert torch.equal(ordered_mean(shared), ordered_mean(losses))
    assert not torch.equal(ordered_mean(losses.flip(0)), ordered_mean(losses))


def test_nan_and_inf_stay_in_their_probe() -> None:
    losses = torch.ones(2, 3, 2, dtype=torch.float64)
    losses[1, 0, 1], losses[0, 2, 0] = float("nan"), float("inf")
    mean = ordered_mean(losses)
    assert mean.isnan().tolist() == [True, False, False]
    assert mean[1:].tolist() == [1.0, float("inf")]


def test_world_of_one() -> None:
    channel = SoloChannel()
    assert (channel.rank, channel.world_size, channel.local_rank, channel.local_world_size) == (0, 1, 0, 1)
    values = torch.arange(3)
    (gathered,) = channel.all_gather(values)
    values += 1
    assert gathered.tolist() == [0, 1, 2]
    agree(channel, b"anything", "this")
    channel.barrier()
    channel.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_is_in_rank_order_for_every_type(ranks: int) -> None:
    def work(channel: Channel) -> list[list[Tensor]]:
        own = torch.arange(6).view(2, 3) + 10 * channel.rank
        kinds = [own, own.double() / 3, own.float(), own > 2, own.t(), torch.zeros(0), torch.tensor(channel.rank)]
        gathered = [channel.all_gather(values) for values in kinds]
        channel.close()
        return gathered

    results = on_ranks(ranks, work)
    for gathered in results:
        assert not isinstance(gathered, ZODSError)
        base = [torch.arange(6).view(2, 3) + 10 * rank for rank in range(ranks)]
        wanted = [
            base,
            [b.double() / 3 for b in base],
            [b.float() for b in base],
            [b > 2 for b in base],
            [b.t() for b in base],
            [torch.zeros(0)] * ranks,
            [torch.tensor(rank) for rank in range(ranks)],
        ]
        for found, expected in zip(gathered, wanted, strict=True):
            assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))


def test_barrier_waits_for_the_slowest() -> None:
    arrived: list[float] = [0.0] * 3

    def work(channel: Channel) -> float:
        time.sleep(0.1 * channel.rank)
        arrived[channel.rank] = time.monotonic()
        channel.barrier()
        left = time.monotonic()
        channel.close()
        return left

    left = on_ranks(3, work)
    assert all(isinstance(moment, float) and moment >= max(arrived) for moment in left)


def test_ranks_that_agree_pass() -> None:
    assert on_ranks(3, lambda channel: agree(channel, b"\x00coefficients", "step 4")) == [None] * 3


@pytest.mark.parametrize(("odd", "apart"), [({2}, "ranks 2"), ({1, 2}, "ranks 1, 2"), ({0}, "ranks 1, 2")])
def test_ranks_that_disagree_all_stop(odd: set[int], apart: str) -> None:
    errors = on_ranks(3, lambda channel: agree(channel, b"b" if channel.rank in odd else b"a", "step 4"))
    for error in errors:
        assert isinstance(error, PeerError)
        assert error.what == "ranks disagree on step 4"
        assert error.where == f"{apart} differ from rank 0"


def test_port_that_is_taken() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(MachineError) as caught:
            join(0, 2, port, timeout_s=5)
    assert caught.value.what == f"port {port} is taken"
    assert f"MASTER_PORT={port}" in caught.value.where
    assert f"--master_port {port + 1}" in caught.value.remedy


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_never_comes(rank: int) -> None:
    started = time.monotonic()
    with pytest.raises(PeerError, match=r"did not find each other within 0\.5 s") as caught:
        join(rank, 2, free_port(), timeout_s=0.5)
    assert time.monotonic() - started < 10
    assert caught.value.where.startswith(f"rank {rank}, MASTER_ADDR=127.0.0.1 MASTER_PORT=")


def test_a_peer_that_falls_silent() -> None:
    given_up = threading.Event()

    def work(channel: Channel) -> Any:
        if channel.rank == 1:
            given_up.wait(60)
            return channel
        try:
            return channel.all_gather(torch.zeros(1))
        finally:
            given_up.set()

    error, _ = on_ranks(2, work, timeout_s=1.5)
    assert isinstance(error, PeerError)
    assert (error.what, error.where) == ("another rank is gone", "rank 0 of 2")
    assert error.why


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_no_launcher_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for key in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert isinstance(open_channel(1.0), SoloChannel)


def test_channel_from_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "5"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with ThreadPoolExecutor(1) as pool:
        # Rank 1 is built directly, since threads share their environment.
        peer = pool.submit(join, 1, 2, port)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "3")
        channel = open_channel(30.0)
        numbers = (channel.rank, channel.world_size, channel.local_rank, channel.local_world_size)
        assert numbers == (0, 2, 3, 5)
        gathered = pool.submit(peer.result().all_gather, torch.tensor([7]))
        assert [int(t) for t in channel.all_gather(torch.tensor([6]))] == [6, 7]
        assert [int(t) for t in gathered.result()] == [6, 7]
