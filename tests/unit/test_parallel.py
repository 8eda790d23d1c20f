"""Units of work, their fixed order, and the channel on which ranks agree. Ranks are threads here, sockets are real."""

from __future__ import annotations

import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import free_port, join, on_ranks
from zo_ds.errors import ConfigError, MachineError, PeerError, ZODSError
from zo_ds.parallel.channel import Channel, SoloChannel, agree
from zo_ds.parallel.grid import LEAST_PLACES, make_grid, most_population
from zo_ds.parallel.launched import open_channel
from zo_ds.parallel.sums import add, exact_sums, from_words, mean, to_words


@given(
    world=st.integers(1, 12), units=st.integers(1, 12), places=st.integers(5, 33), strict=st.booleans(), data=st.data()
)
def test_a_grid_covers_every_unit_at_every_place_once(
    world: int, units: int, places: int, strict: bool, data: st.DataObject
) -> None:
    chunk = 3 if strict else 1
    factors = [p for p in range(1, world + 1) if world % p == 0 and p <= most_population(places, chunk)]
    population = data.draw(st.sampled_from([None, *factors]))
    seat = make_grid(0, world, population=population, data=None, units=units, places=places, chunk=chunk)
    assert seat.population * seat.data == world
    done = [
        (unit, place)
        for rank in range(world)
        for unit in seat.of(rank).units(units)
        for place in seat.of(rank).places(places, chunk)
    ]
    assert sorted(done) == [(unit, place) for unit in range(units) for place in range(places)]
    shares = [seat.of(rank).places(places, chunk) for rank in range(world)]
    assert all(share.start % chunk == 0 and len(share) >= LEAST_PLACES - (places % chunk == 1) for share in shares)


@pytest.mark.parametrize(
    ("world", "units", "chunk", "expected"),
    [(2, 4, 1, (1, 2)), (4, 2, 1, (2, 2)), (4, 4, 1, (1, 4)), (2, 1, 1, (2, 1)), (4, 1, 3, (2, 2)), (3, 2, 3, (3, 1))],
)
def test_auto_takes_the_grid_with_the_least_to_do(
    world: int, units: int, chunk: int, expected: tuple[int, int]
) -> None:
    seat = make_grid(0, world, population=None, data=None, units=units, places=9, chunk=chunk)
    assert (seat.population, seat.data) == expected


def test_without_a_known_batch_every_rank_gets_examples() -> None:
    seat = make_grid(3, 4, population=None, data=None, units=None, places=9, chunk=1)
    assert (seat.population, seat.data, seat.data_rank) == (1, 4, 3)


@pytest.mark.parametrize(
    ("population", "data", "words"),
    [
        (3, None, "population 3 x data auto is not 4"),
        (2, 4, "population 2 x data 4"),
        (8, None, "8 ranks cannot share 9"),
    ],
)
def test_grids_that_cannot_be(population: int | None, data: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        make_grid(0, 4, population=population, data=data, units=4, places=9, chunk=1)
    assert error.value.remedy


def exact(values: list[float]) -> Fraction:
    return sum((Fraction(math.floor(abs(v) * 2**64), 2**64) * (-1 if v < 0 else 1) for v in values), Fraction(0))


@given(
    rows=st.lists(
        st.lists(st.floats(-1e9, 1e9) | st.floats(-1e-15, 1e-15), min_size=1, max_size=8), min_size=1, max_size=6
    )
)
def test_mean_is_the_correctly_rounded_one_of_exact_rationals(rows: list[list[float]]) -> None:
    parts = [exact_sums(torch.tensor([row], dtype=torch.float64))[0] for row in rows]
    sent = from_words(to_words(parts))
    assert sent == parts
    every = [value for row in rows for value in row]
    assert mean(add(sent), len(every)) == float(exact(every) / len(every))


def test_mean_does_not_depend_on_who_added_what() -> None:
    losses = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 9
    found = set()
    for size in (1, 2, 3, 5, 8, 24):
        for order in (losses, losses.flip(0), losses[torch.randperm(24, generator=torch.Generator().manual_seed(1))]):
            parts = [exact_sums(part[None])[0] for part in order.split(size)]
            found.add(mean(add(parts), 24))
    assert len(found) == 1
    sums = {float(sum(order.tolist())) for order in (losses, losses.flip(0))}
    assert len(sums) == 2  # which plain floating-point sums do


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, -(2.0**63)])
def test_what_is_not_finite_stays_in_its_place_and_gets_across(bad: float) -> None:
    losses = torch.tensor([[1.0, bad], [1.0, 2.0]], dtype=torch.float64)
    sums = from_words(to_words(exact_sums(losses)))
    assert sums[0] is None
    assert add([sums[0], 5]) is None
    assert math.isnan(mean(sums[0], 2))
    assert mean(sums[1], 2) == 1.5


def test_16_bytes_a_place_whatever_the_examples() -> None:
    for examples in (1, 1000):
        words = to_words(exact_sums(torch.full((9, examples), 1e12, dtype=torch.float64)))
        assert words.nbytes == 16 * 9


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
    assert (error.what, error.where) == ("another rank is gone", "rank 0 of 2, about rank 1")
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


def test_more_than_the_system_buffers_crosses_both_ways() -> None:
    size = 8 * 2**20

    def work(channel: Channel) -> tuple[bool, bytes]:
        gathered = channel.all_gather(torch.full((size,), channel.rank, dtype=torch.uint8))
        right = all(bool((part == rank).all()) for rank, part in enumerate(gathered))
        return right, channel.broadcast(bytes([channel.rank + 7]) * size)[-3:]

    assert on_ranks(3, work) == [(True, b"\x07\x07\x07")] * 3


def test_ranks_at_different_exchanges_do_not_take_one_for_the_other() -> None:
    def work(channel: Channel) -> Any:
        return channel.all_gather(torch.zeros(1 + channel.rank))

    for error in on_ranks(2, work):
        assert isinstance(error, PeerError)


def test_strangers_at_the_port_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port scanners knock at every open port."""
    made = socket.create_server
    knocked = []

    def create(address: Any, **how: Any) -> socket.socket:
        listener = made(address, **how)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b""):
            stranger = socket.create_connection(listener.getsockname())
            stranger.sendall(words)
            knocked.append(stranger)
        return listener

    monkeypatch.setattr(socket, "create_server", create)
    monkeypatch.setattr("zo_ds.parallel.tcp._GREETING_S", 0.2)
    assert on_ranks(2, lambda channel: [int(v) for v in channel.all_gather(torch.tensor(channel.rank))]) == [[0, 1]] * 2
    assert len(knocked) == 4


def test_gloo_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import conftest
    from zo_ds.parallel.gloo import GlooChannel

    def work(channel: Channel) -> tuple[Any, ...]:
        values = torch.arange(6, dtype=torch.float64).view(2, 3) * (channel.rank + 1)
        gathered = channel.all_gather(values)
        return [part.tolist() for part in gathered], channel.broadcast(b"word" * 9), channel.sent

    by_tcp = on_ranks(3, work)
    monkeypatch.setattr(conftest, "TCPChannel", GlooChannel)
    assert on_ranks(3, work) == by_tcp
