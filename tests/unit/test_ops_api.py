"""The ops as their callers and torch see them: the state hash, registration, torch.compile, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from zo_ds.maths.directions import Site
from zo_ds.maths.update import Term, Update
from zo_ds.ops import api, cpu
from zo_ds.ops.builder import CPUOpBuilder
from zo_ds.ops.plan import Plan
from zo_ds.ops.schema import NAMES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARAM = oracle.param_id("h.0.weight")
PLAN = Plan.of(7, [Update(3, (Term(3, 0, 1e-2), Term(2, 1, -0.5)), 1e-2), Update(4, (Term(4, 0, 0.1),))])
ops = torch.ops.zo_ds


@pytest.fixture(params=["reference", "compiled"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(cpu, "_library", lambda: None)
    elif CPUOpBuilder().load() is None:
        pytest.skip("no compiled ops")
    return str(request.param)


def bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def any_bits(count: int, dtype: torch.dtype) -> Tensor:
    patterns = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count))
    words = patterns.to(torch.int32)
    return (words if dtype == torch.float32 else words.to(torch.int16)).view(dtype)


def expected_hash(theta: Tensor, site: Site) -> int:
    mask = 2**32 - 1 if theta.dtype == torch.float32 else 2**16 - 1
    return oracle.state_hash([bits & mask for bits in bits_of(theta.view(-1)).tolist()], site.param_id, site.start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_equals_the_oracle(kind: str, dtype: torch.dtype) -> None:
    rng = random.Random(1)
    for count in (0, 1, 7, 8, 41, 4095, 4096, 4097, 9000):
        for start in (0, 5, 4095, 4096 - 20, 2**40 + rng.randrange(2**20), 2**46 - 9):
            theta, site = any_bits(count, dtype), Site(rng.randrange(2**32), start)
            assert api.state_hash(theta, site) == expected_hash(theta, site)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_sees_every_flipped_bit(kind: str, dtype: torch.dtype) -> None:
    theta, site = any_bits(41, dtype), Site(PARAM, 4096 - 20)
    found, words, width = {api.state_hash(theta, site)}, bits_of(theta), 8 * theta.element_size()
    for j in range(41):
        for bit in range(width):
            changed = words.clone()
            changed[j] ^= (1 << bit) - (1 << width if bit == width - 1 else 0)  # the highest bit is the sign
            found.add(api.state_hash(changed.view(dtype), site))
    assert len(found) == 1 + 41 * width


def test_hash_sees_what_changes_places(kind: str) -> None:
    theta = any_bits(3 * 4096, torch.bfloat16)
    a, b, c = theta.split(4096)
    changed = [
        theta,
        torch.cat([b, a, c]),
        torch.cat([a, c, b]),
        torch.cat([theta[1:], theta[:1]]),
        torch.cat([theta[1:2], theta[:1], theta[2:]]),
    ]
    assert len({api.state_hash(other, Site(PARAM)) for other in changed}) == len(changed)
    p, q = Site(PARAM), Site(oracle.param_id("h.1.weight"))
    straight = (api.state_hash(a, p) + api.state_hash(b, q)) % 2**64
    assert straight != (api.state_hash(b, p) + api.state_hash(a, q)) % 2**64
    assert api.state_hash(a, p) != api.state_hash(a, Site(PARAM, 4096))


GOLDEN = {
    torch.float32: 0x5A361BAE2713A000,
    torch.bfloat16: 0x97325CE97F95CA0E,
    torch.float16: 0x8F08AA15579092E8,
}
"""By the oracle; they never change."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_is_version_1(kind: str, dtype: torch.dtype) -> None:
    theta = (torch.arange(-2500, 2500) / 8).to(dtype)
    assert api.state_hash(theta, Site(PARAM, 4000)) == GOLDEN[dtype]
    assert expected_hash(theta, Site(PARAM, 4000)) == GOLDEN[dtype]


def arguments(name: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(300, generator=generator)
    plan = (PLAN.term_counts, PLAN.shrinks, PLAN.rounding_seeds, PLAN.seeds, PLAN.directions, PLAN.coefficients)
    return {
        "perturb_": (theta.new_zeros(2, 300), theta, -5, PARAM, [0, 3], [0.1, -0.1], 5, 0, True),
        "embedding_rows_": (
            *(theta.new_zeros(2, 3, 30), theta.view(10, 30), torch.tensor([9, 0, 9])),
            *(-5, PARAM, [0, 3], [0.1, -0.1], True, False),
        ),
        "update_": (
            *([theta, theta[:50].bfloat16()], [PARAM, 1], [0, 9], [30, 0], [False, True], [True, False], *plan),
        ),
        "signs_": (torch.zeros(2, 10, dtype=torch.uint8), -5, PARAM, [0, 3], 16, 77, 1),
        "state_hash": (theta, PARAM, 5),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_registration(kind: str, name: str) -> None:
    checks = torch.library.opcheck(getattr(ops, name).default, arguments(name))
    assert set(checks.values()) == {"SUCCESS"}


def used_by_a_model(theta: Tensor, out: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moved = theta.new_empty((2, *theta.shape))
    ops.perturb_(moved, theta * 2, -5, PARAM, [0, 3], [0.1, -0.1], 5, 0, True)
    ops.perturb_(out, moved[1] + 1, 6, PARAM, [1], [0.5], 0, 30, False)
    plan = (PLAN.term_counts, PLAN.shrinks, PLAN.rounding_seeds, PLAN.seeds, PLAN.directions, PLAN.coefficients)
    ops.update_([moved[0], half], [PARAM, 1], [0, 9], [30, 0], [False, True], [True, False], *plan)
    return moved.sin(), ops.state_hash(moved, PARAM, 0) + ops.state_hash(out, PARAM, 0), half + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_gives_the_same_bits(kind: str, backend: str) -> None:
    theta = torch.randn(300, generator=torch.Generator().manual_seed(2))
    inputs = [(theta, torch.zeros(1, 300), theta[:50].bfloat16()) for _ in range(2)]
    expected = used_by_a_model(*inputs[0])
    torch.compiler.reset()
    found = torch.compile(used_by_a_model, fullgraph=True, backend=backend)(*inputs[1])
    for a, b in zip((*found, *inputs[1]), (*expected, *inputs[0]), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(inputs[1][1], torch.zeros(1, 300))
    assert not torch.equal(inputs[1][2], theta[:50].bfloat16())


W, S, IDS = torch.zeros(6, 4), Site(1), torch.tensor([0, 5])
BF16 = W.bfloat16()
WRONG = {
    "theta's dtype": (lambda: api.perturb(W.double(), S, 0, [0], [0.1]), "theta must .* fp32, bf16 or fp16.*float64"),
    "theta's layout": (lambda: api.perturb(W.t(), S, 0, [0], [0.1]), "theta must be contiguous.*not contiguous"),
    "too few eps": (lambda: api.perturb(W, S, 0, [0, 1], [0.1]), "one eps for each of 2 directions"),
    "too many eps": (lambda: api.perturb(W, S, 0, [0], [0.1, 1]), "one eps for each of 1 directions"),
    "out's shape": (lambda: api.perturb(W, S, 0, [0], [0.1], out=W), r"contiguous \[1, 6, 4\] in torch.float32"),
    "out's dtype": (lambda: api.perturb(W, S, 0, [0], [0.1], out=BF16[None]), r"in torch.float32 or fp32"),
    "out's other dtype": (lambda: api.perturb(BF16, S, 0, [0], [0.1], out=W.half()[None]), "in torch.bfloat16 or fp32"),
    "out's layout": (lambda: api.perturb(W, S, 0, [0], [0.1], out=torch.zeros(1, 4, 6).mT), "out must be contiguous"),
    "out's device": (lambda: api.perturb(W, S, 0, [0], [0.1], out=W.to("meta")[None]), "out must be on cpu"),
    "a vector as table": (lambda: api.embedding_rows(W[0], IDS, S, 0, [0], [0.1]), "whole table"),
    "a part of a table": (lambda: api.embedding_rows(W, IDS, Site(1, 4), 0, [0], [0.1]), "whole table"),
    "ids' dtype": (lambda: api.embedding_rows(W, IDS.int(), S, 0, [0], [0.1]), "int64 ids"),
    "table's dtype": (lambda: api.embedding_rows(W.int(), IDS, S, 0, [0], [0.1]), "table must be .*int32"),
    "rows' shape": (lambda: api.embedding_rows(W, IDS, S, 0, [0], [0.1], out=W[None]), r"contiguous \[1, 2, 4\]"),
    "rows' eps": (lambda: api.embedding_rows(W, IDS, S, 0, [0], []), "one eps for each of 1 directions"),
    "a site too few": (lambda: api.apply_([W, W], [S], PLAN), "2 tensors for 1 sites"),
    "one wrong tensor": (lambda: api.apply_([W, W.t()], [S, S], PLAN), "not contiguous"),
    "another dtype": (lambda: api.apply_([W.double()], [S], PLAN), "float64"),
    "the start of signs": (lambda: api.signs(Site(1, 12), 0, [0], 9), "multiple of 8, not at 12"),
    "a hash of integers": (lambda: api.state_hash(IDS, S), "theta must be .*int64"),
    "a hash of columns": (lambda: api.state_hash(W[:, :2], S), "not contiguous"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused(what: str) -> None:
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        call()
    assert not W.any()


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_ids_of_no_row_are_refused(bad: int) -> None:
    with pytest.raises(IndexError, match=r"outside 0\.\.5"):
        api.embedding_rows(W, torch.tensor([0, bad]), S, 0, [0], [0.1])


def test_nothing_is_a_valid_argument(kind: str) -> None:
    for dtype in DTYPES:
        none = torch.zeros(0, 4, dtype=dtype)
        assert api.perturb(none, Site(1, 9, 4), 0, [0, 1], [0.1, 0.2]).shape == (2, 0, 4)
        assert api.embedding_rows(W.to(dtype), IDS[:0], S, 0, [0, 1], [0.1, 0.2]).shape == (2, 0, 4)
        assert api.embedding_rows(none, IDS[:0].view(3, 0), Site(1, 0, 4), 0, [0], [0.1]).shape == (1, 3, 0, 4)
        assert api.state_hash(none, Site(1, 9)) == 0
        some = torch.ones(5, dtype=dtype)
        api.apply_([none, some, none], [Site(1, 9, 4), S, S], PLAN)
        assert not some.equal(torch.ones(5, dtype=dtype))
        before = some.clone()
        api.apply_([some], [S], Plan.of(0, []))
        assert some.equal(before)
    assert api.signs(S, 0, [0, 1], 0).shape == (2, 0)
    api.apply_([], [], PLAN)


@pytest.mark.parametrize(
    "case", ["no directions", "rows of no width", "perturbed parameters", "rows of parameters", "updated parameters"]
)
def test_the_reference_takes_what_the_compiled_ops_take(kind: str, case: str) -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    if case == "no directions":
        assert api.perturb(W, S, 0, [], []).shape == (0, 6, 4)
        assert api.embedding_rows(W, IDS, S, 0, [], []).shape == (0, 2, 4)
    elif case == "rows of no width":
        assert api.embedding_rows(torch.zeros(3, 0), torch.tensor([1]), S, 0, [0], [0.1]).shape == (1, 1, 0)
    elif case == "perturbed parameters":
        assert not api.perturb(weight, S, 0, [0], [0.1]).requires_grad
    elif case == "rows of parameters":
        assert not api.embedding_rows(weight, IDS, S, 0, [0], [0.1]).requires_grad
    else:
        api.apply_([weight], [S], PLAN)
        assert weight.detach().any()
