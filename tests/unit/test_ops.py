"""Compiled ops: the reference's bits with every instruction set and thread count, from any slice, at any address."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import oracle
import pytest
import torch
from torch import Tensor

from zo_ds.maths.directions import Site
from zo_ds.maths.noise import Stream, step_seed
from zo_ds.maths.update import Term, Update, apply_update_
from zo_ds.maths.update import perturb as perturb_in_torch
from zo_ds.ops import api, cpu, reference
from zo_ds.ops.builder import INSTRUCTION_SETS, CPUOpBuilder
from zo_ds.ops.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARY = CPUOpBuilder().load()
BEST = -1 if LIBRARY is None else LIBRARY.zo_cpu_best_isa()
RUN_SEED, SEED = 0xFEDCBA9876543210, -0x0123456789ABCDEF
PARAM = oracle.param_id("h.0.weight")
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 2.0**-15, 65519.0, 65520.0, 3.4e38, -3.4e38]
COEFFICIENTS = [0.0, -0.0, 1e-41, -1e-41, 3e38, math.inf, math.nan]

Case = Callable[[ModuleType], list[Tensor]]
"""Runs one op of a module, `cpu` or `reference`; returns whole buffers, so that a write beside a slice is seen."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(1)


def select(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "reference":
        monkeypatch.setattr(cpu, "_library", lambda: None)
    elif (number := INSTRUCTION_SETS.index(name)) > BEST:
        pytest.skip(f"this machine has no {name}, or no compiler")
    else:
        monkeypatch.setattr(cpu, "instruction_set", lambda: number)


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    select(request.param, monkeypatch)
    return str(request.param)


def bits_of(values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, except that a NaN is a NaN."""
    return a.dtype == b.dtype and bool(((bits_of(a) == bits_of(b)) | (a.isnan() & b.isnan())).all())


def plain(count: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def weights(rng: random.Random, count: int, dtype: torch.dtype) -> tuple[Tensor, slice]:
    """A buffer and the slice of it that is meant, 0 to 4 elements from an aligned address; specials among them."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    at = rng.randrange(5)
    if rng.random() < 0.3:  # any bit pattern
        patterns = torch.randint(-(2**31), 2**31, (count + at + 5,), generator=generator).to(torch.int32)
        return (patterns if dtype == torch.float32 else patterns.to(torch.int16)).view(dtype), slice(at, at + count)
    buffer = (torch.randn(count + at + 5, generator=generator) * 10 ** rng.uniform(-9, 6)).to(dtype)
    for value in rng.choices(SPECIAL, k=min(count, 40)):
        buffer[at + rng.randrange(count)] = value
    return buffer, slice(at, at + count)


def size(rng: random.Random, large: bool) -> int:
    sizes = [0, 1, 7, 8, 9, 63, rng.randrange(1, 300), rng.randrange(1, 20_000), rng.randrange(1, 50_000)]
    return 10**6 if large else rng.choice(sizes)


def place(rng: random.Random) -> tuple[int, int, bool]:
    """Start, columns, and whether directions are gaussian."""
    start = rng.choice([0, rng.randrange(100), rng.randrange(2**40), 8 * rng.randrange(2**37), 2**40 - 3])
    gaussian = rng.random() < 0.3
    return start, 0 if gaussian else rng.choice([0, rng.randrange(1, 50), rng.randrange(1, 9000), 4096, 8192]), gaussian


def key(rng: random.Random) -> int:
    return rng.randrange(-(2**63), 2**63)


def block(rng: random.Random) -> tuple[list[int], list[float]]:
    count = rng.choice([1, 2, 3, 4, 5, 8, 9])
    return rng.choices(range(2**32), k=count), rng.choices([1e-3, -1e-2, 3e38, 0.0, -0.0, 1e-41], k=count)


def perturb_case(rng: random.Random, large: bool) -> Case:
    dtype, n, where, (directions, eps) = rng.choice(DTYPES), size(rng, large), place(rng), block(rng)
    (theta, part), kind, at = weights(rng, n, dtype), rng.choice([dtype, torch.float32]), rng.randrange(5)
    seed, param = key(rng), rng.randrange(2**32)

    def run(module: ModuleType) -> list[Tensor]:
        buffer = torch.full((at + len(eps) * n + 40,), 7, dtype=kind)
        out = buffer[at : at + len(eps) * n].view(len(eps), n)
        module.perturb_(out, theta[part], seed, param, directions, eps, *where)
        return [buffer, theta.clone()]

    return run


def embedding_rows_case(rng: random.Random, large: bool) -> Case:
    dtype, rows, (directions, eps) = rng.choice(DTYPES), rng.randrange(1, 9), block(rng)
    width = 60_000 if large else rng.choice([1, 3, 8, 64, rng.randrange(1, 6000)])
    (table, part), kind, at = weights(rng, rows * width, dtype), rng.choice([dtype, torch.float32]), rng.randrange(5)
    ids = torch.tensor([rng.randrange(rows) for _ in range(rng.randrange(6))], dtype=torch.int64)
    seed, param, count = key(rng), rng.randrange(2**32), len(eps) * ids.numel() * width
    factored, gaussian = rng.choice([(False, False), (True, False), (False, True)])

    def run(module: ModuleType) -> list[Tensor]:
        buffer = torch.full((at + count + 40,), 7, dtype=kind)
        out, source = buffer[at : at + count].view(len(eps), ids.numel(), width), table[part].view(rows, width)
        module.embedding_rows_(out, source, ids, seed, param, directions, eps, factored, gaussian)
        return [buffer, table.clone()]

    return run


def plan_of(rng: random.Random, updates: int) -> list[Tensor]:
    counts = [rng.choice([0, 1, 2, 3, 8, 15, 16, 17, 33, 40]) for _ in range(updates)]
    total, seeds = sum(counts), [key(rng), -1, key(rng)]
    scales = [rng.choice(COEFFICIENTS) if rng.random() < 0.03 else rng.gauss(0, 1e-2) for _ in range(total)]
    return [
        torch.tensor(counts, dtype=torch.int64),
        torch.tensor(rng.choices([1.0, 0.999, 0.5], k=updates)),
        torch.tensor([key(rng) for _ in counts], dtype=torch.int64),
        torch.tensor(rng.choices(seeds, k=total), dtype=torch.int64),
        torch.tensor(rng.choices(range(2**32), k=total), dtype=torch.int64),
        torch.tensor(scales, dtype=torch.float32),
    ]


def updating(rng: random.Random, sizes: list[int], updates: int) -> Case:
    """An update of slices of these sizes."""
    thetas = [weights(rng, n, rng.choice(DTYPES)) for n in sizes]
    starts, columns, gaussian = zip(*[place(rng) for _ in sizes], strict=True)
    params, decays = rng.choices(range(2**32), k=len(sizes)), rng.choices([True, False], k=len(sizes))
    plan = plan_of(rng, updates)

    def run(module: ModuleType) -> list[Tensor]:
        buffers = [buffer.clone() for buffer, _ in thetas]
        own = [buffer[part] for buffer, (_, part) in zip(buffers, thetas, strict=True)]
        module.update_(own, params, starts, columns, gaussian, decays, *plan)
        return buffers

    return run


def update_case(rng: random.Random, large: bool) -> Case:
    slices, updates = rng.choice([1, 1, 2, 5, 12]), rng.choice([0, 1, 1, 2, 4])
    sizes = [size(rng, large and k == 0) if k == 0 or rng.random() < 0.2 else rng.randrange(700) for k in range(slices)]
    return updating(rng, sizes, updates)


def signs_case(rng: random.Random, large: bool) -> Case:
    n, (start, *_), (directions, _), stream = size(rng, large), place(rng), block(rng), rng.choice(list(Stream))
    seed, param, width = key(rng), rng.randrange(2**32), -(-n // 8)

    def run(module: ModuleType) -> list[Tensor]:
        buffer = torch.full((len(directions) * width + 64,), 7, dtype=torch.uint8)
        out = buffer[3 : 3 + len(directions) * width].view(-1 if width else len(directions), width)
        module.signs_(out, seed, param, directions, start // 8 * 8, n, int(stream))
        return [buffer]

    return run


def state_hash_case(rng: random.Random, large: bool) -> Case:
    (theta, part), param = weights(rng, size(rng, large), rng.choice(DTYPES)), rng.randrange(2**32)
    start, *_ = place(rng)
    return lambda module: [module.state_hash(theta[part], param, start)]


CASES = [perturb_case, embedding_rows_case, update_case, signs_case, state_hash_case]


@pytest.mark.skipif(LIBRARY is None, reason="no compiled ops")
@pytest.mark.parametrize("batch", range(6))
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_random_cases_have_the_bits_of_the_reference(
    make: Callable[[random.Random, bool], Case], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(25):
        case = make(random.Random(1000 * batch + number), number == 0 and batch % 3 == 0)
        expected = case(reference)
        for isa, name in enumerate(INSTRUCTION_SETS[: BEST + 1]):
            monkeypatch.setattr(cpu, "instruction_set", lambda isa=isa: isa)
            for count in (1, 2):
                with threads(count):
                    found = case(cpu)
                assert all(map(same, found, expected)), f"case {batch}, {number}: {name}, {count} threads"


@pytest.mark.parametrize(("columns", "gaussian"), [(0, False), (30, False), (0, True)])
def test_a_history_of_many_terms(implementation: str, columns: int, gaussian: bool) -> None:
    """More terms than one pass over factored directions takes (512), which begins and ends between updates."""
    counts = [(step, step * 16 + i, 1e-3) for step in range(50) for i in range(12)]
    updates = [Update(step, tuple(Term(*term) for term in counts if term[0] == step), 1e-3) for step in range(50)]
    site, theta = Site(PARAM, 7, columns, True, gaussian), plain(100, torch.bfloat16)
    expected = theta.clone()
    for update in updates:
        apply_update_(expected, site, RUN_SEED, update)
    api.apply_([theta], [site], Plan.of(RUN_SEED, updates))
    assert same(theta, expected)


TERMS = (Term(9, 0, 1e-3), Term(9, 2, -0.25), Term(8, 1, 3e-5))
PLAN = Plan.of(RUN_SEED, [Update(9, TERMS, 1e-2), Update(10, ()), Update(11, TERMS[::-1])])


def assert_parts_equal_the_whole(theta: Tensor, site: Site, edges: list[int]) -> None:
    moved, total, whole = api.perturb(theta, site, 5, [3, 4], [0.1, -0.1]), 0, theta.clone()
    api.apply_([whole], [site], PLAN)
    parts = [theta[a:b].clone() for a, b in pairwise(edges)]
    sites = [replace(site, start=site.start + a) for a in edges[:-1]]
    for part, own, (a, b) in zip(parts, sites, pairwise(edges), strict=True):
        assert same(api.perturb(part, own, 5, [3, 4], [0.1, -0.1]), moved[:, a:b])
        total += api.state_hash(part, own)
    assert total % 2**64 == api.state_hash(theta, site)
    api.apply_(parts, sites, PLAN)
    assert same(torch.cat(parts), whole)


PLACES = [(0, 0, False), (4096 - 20, 0, False), (11, 7, False), (5000 + 4096 - 20, 5000, False), (4096 - 20, 0, True)]


@pytest.mark.parametrize(("start", "columns", "gaussian"), PLACES)
def test_every_split_point_gives_the_same_bits(implementation: str, start: int, columns: int, gaussian: bool) -> None:
    for dtype in DTYPES:
        for cut in range(0, 42, 8 if implementation == "reference" else 1):
            assert_parts_equal_the_whole(plain(41, dtype), Site(PARAM, start, columns, True, gaussian), [0, cut, 41])


@pytest.mark.parametrize(("columns", "gaussian"), [(0, False), (3, False), (1000, False), (9000, False), (0, True)])
def test_random_splits_give_the_same_bits(implementation: str, columns: int, gaussian: bool) -> None:
    rng = random.Random(columns)
    for dtype in DTYPES:
        for number in range(1 if implementation == "reference" else 8):
            count, site = 50_000, Site(PARAM, rng.randrange(2**34), columns, True, gaussian)
            edges = [0, *sorted(rng.choices(range(count), k=rng.randrange(1, 12))), count]
            with threads(2 if number and number < 3 else 1):
                assert_parts_equal_the_whole(plain(count, dtype), site, edges)


@pytest.mark.parametrize(("columns", "gaussian"), [(0, False), (10, False), (0, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_equals_separate_calls_and_the_maths(
    implementation: str, dtype: torch.dtype, columns: int, gaussian: bool
) -> None:
    updates = [Update(step, (Term(step, 0, 1e-4), Term(step - 1, 1, -3e-3)), 1e-3 * step) for step in range(1, 7)]
    site, start = Site(PARAM, 4000, columns, True, gaussian), plain(1000, dtype)
    together, apart, expected = start.clone(), start.clone(), start.clone()
    api.apply_([together], [site], Plan.of(RUN_SEED, updates))
    for update in updates:
        api.apply_([apart], [site], Plan.of(RUN_SEED, [update]))
    for update in updates:
        apply_update_(expected, site, RUN_SEED, update)
    assert same(together, apart)
    assert same(together, expected)
    assert not same(together, start)
    seed = step_seed(RUN_SEED, 4)  # above 2**63 - 1
    moved = api.perturb(start.view(10, 100), site, seed, [5, 2], [1e-3, -0.1])
    assert seed >= 2**63
    assert same(moved[1].view(-1), perturb_in_torch(start, site, seed, 2, -0.1))
    rows = Site(PARAM, 0, columns and 100, True, gaussian)
    whole = api.perturb(start.view(10, 100), rows, seed, [5, 2], [1e-3, -0.1])
    ids = torch.tensor([[9, 0], [3, 3]])
    assert same(api.embedding_rows(start.view(10, 100), ids, rows, seed, [5, 2], [1e-3, -0.1]), whole[:, ids])
