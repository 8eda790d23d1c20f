"""Steps that look back on others (momentum, fzoo_r) or twice at their batch; what was interrupted ends the same."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zo_ds
from tests.conftest import on_ranks, tiny_model, weights_of, zo_batch
from zo_ds.config.schema import JournalConfig
from zo_ds.engine.base import StepOutput
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.resume import Options, open_run
from zo_ds.journal.history import read_journal
from zo_ds.journal.records import StepRecord
from zo_ds.journal.replay import replay_
from zo_ds.maths import noise
from zo_ds.maths.estimators import SkipReason, probes, verdict
from zo_ds.parallel.channel import Channel, SoloChannel

pytestmark = pytest.mark.usefixtures("one_thread")
NEVER = JournalConfig(snapshot_replay_s=1e9)
ALWAYS = JournalConfig(snapshot_replay_s=1e-9, hash_every=1)
LAST = 9
BAD = (3, 4)
"""Steps with losses that are not finite."""

MOMENTUM = {"estimator": "mezo", "num_directions": 2, "lr": 2e-4, "momentum": 0.8, "momentum_window": 3}
FZOO_R = {"estimator": "fzoo_r", "num_directions": 3, "eps_schedule": "linear", "total_steps": 20}
CASES: dict[str, dict[str, Any]] = {
    "momentum": MOMENTUM,
    "fzoo-momentum": {"num_directions": 4, "momentum": 0.9, "momentum_window": 20},
    "fzoo_r": FZOO_R,
    "fzoo_r-mean-momentum": {**FZOO_R, "baseline": "mean", "momentum": 0.5, "momentum_window": 2},
    "cons-momentum": {"estimator": "zo_sgd_cons", "num_directions": 1, "lr": 1e-3, "momentum": 0.7},
}
each_case = pytest.mark.parametrize("case", CASES)


def scaled_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "factor"}
    return model(**inputs).loss * batch.get("factor", 1.0)


def open_engine(
    run_dir: Path | None = None, channel: Channel | None = None, model: nn.Module | None = None, **options: Any
) -> ZOEngine:
    maths = {"num_directions": 4, "lr": 5e-3, "run_seed": 3, "weight_decay": 0.3, "strict": True, **options}
    model = model or tiny_model("llama")
    channel = channel or SoloChannel()
    return zo_ds.initialize(model, {"zeroth_order": maths}, loss_fn=scaled_loss, channel=channel, run_dir=run_dir)


def units(step: int, channel: Channel | None = None) -> list[dict[str, Any]]:
    factor = math.nan if step in BAD else 1.0
    everything = [{**zo_batch(examples=2, seed=2 * step + unit), "factor": factor} for unit in range(2)]
    return everything if channel is None else everything[channel.rank :: channel.world_size]


def walk(engine: ZOEngine, last: int) -> list[StepOutput]:
    return [engine.step(units(engine.steps_done, engine.channel)) for _ in range(engine.steps_done, last)]


@cache
def digests(case: str) -> list[str]:
    """After each step of a run that nothing happens to."""
    engine = open_engine(**CASES[case])
    found = [engine.digest()]
    for last in range(1, LAST + 1):
        walk(engine, last)
        found.append(engine.digest())
    return found


def records(run: Path) -> list[StepRecord]:
    return read_journal(run / "journal").records()


def rows(record: StepRecord, count: int) -> list[list[float]]:
    """The coefficients of a record, those of one step in each row, the newest first."""
    values = [term.coefficient for term in record.update.terms]
    assert [(t.step, t.direction) for t in record.update.terms] == [
        (record.step - slot // count, slot % count) for slot in range(len(values))
    ]
    return [values[at : at + count] for at in range(0, len(values), count)]


# The same run, whatever happens to it


@each_case
@pytest.mark.parametrize("settings", [NEVER, ALWAYS], ids=["base", "snapshot"])
def test_a_run_in_pieces_is_the_run_in_one(case: str, settings: JournalConfig, tmp_path: Path) -> None:
    whole = open_engine(tmp_path / "whole", **CASES[case])
    walk(whole, LAST)
    for last in (1, 2, 4, 5, 7, LAST):
        engine = open_engine(**CASES[case])
        open_run(engine, tmp_path / "pieces", Options(settings, total_steps=LAST))
        walk(engine, last)
        assert engine.digest() == digests(case)[last]
        engine.close_journal()
    assert repr([(r.update, r.skip, r.clean_loss, r.spread) for r in records(tmp_path / "pieces")]) == repr(
        [(r.update, r.skip, r.clean_loss, r.spread) for r in records(tmp_path / "whole")]
    )
    assert (tmp_path / "pieces" / "snapshots").exists() == (settings is ALWAYS)


@each_case
def test_journal_and_base_weights_give_the_run(case: str, tmp_path: Path) -> None:
    engine = open_engine(tmp_path, **CASES[case])
    base = weights_of(engine)
    walk(engine, LAST)
    for steps in (1, 6, LAST):
        tensors = {name: tensor.clone() for name, tensor in base.items()}
        found = replay_(tensors, read_journal(tmp_path / "journal"), steps)
        assert found.weights_sha256 == digests(case)[steps]
    assert engine.digest() == digests(case)[LAST]


@each_case
def test_ranks_take_the_same_steps_and_go_on_alike(case: str, tmp_path: Path) -> None:
    """The second rank does not see the run: what steps look back on comes to it over the wire."""
    for last in (2, 6, 8):
        models = [tiny_model("llama") for _ in range(2)]

        def work(channel: Channel, models: Any = models, last: int = last) -> str:
            engine = open_engine(channel=channel, model=models[channel.rank], **CASES[case])
            open_run(engine, tmp_path / str(channel.rank), Options(NEVER))
            walk(engine, last)
            engine.close_journal()
            return engine.digest()

        assert on_ranks(2, work) == [digests(case)[last]] * 2
    assert not (tmp_path / "1").exists()


# Momentum


class Quadratic(nn.Module):
    """sum_j a_j (w_j - x_j)^2 / 2 with curvatures from 0.5 to 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12))
        self.register_buffer("curvature", torch.linspace(0.5, 2, 96).view(8, 12))

    def forward(self, target: Tensor) -> Tensor:
        return (self.curvature * (self.weight - target).square()).sum((1, 2)) / 2


@pytest.mark.parametrize("window", [2, 5, 12])
@pytest.mark.parametrize("estimator", ["fzoo", "mezo", "zo_sgd"])
def test_terms_of_past_steps_are_a_momentum_buffer(estimator: str, window: int) -> None:
    count, steps, beta = 4, 12, 0.8
    settings = {
        "estimator": estimator,
        "num_directions": count,
        "lr": 0.01,
        "eps": 1e-2,
        "momentum": beta,
        "momentum_window": window,
        "run_seed": 9,
        "forward": "sequential",
    }
    engine = zo_ds.initialize(Quadratic(), {"zeroth_order": settings}, loss_fn=lambda model, x: model(x))
    spec = engine.config.estimator_spec
    curvature = torch.linspace(0.5, 2, 96, dtype=torch.float64)
    theta = torch.linspace(-1, 1, 96).double()
    moves: list[Tensor] = []
    buffer = torch.zeros(96, dtype=torch.float64)
    for step in range(steps):
        target = torch.sin(torch.arange(96.0) * (step + 1)).view(1, 8, 12)
        seed = noise.step_seed(9, step)
        signs = torch.stack([noise.signs(seed, noise.param_id("weight"), i, 0, 96) for i in range(count)]).double()

        def loss(displaced: Tensor, target: Tensor = target) -> float:
            return float((curvature * (displaced - target.view(-1)).square()).sum() / 2)

        losses = [loss(theta + p.side * 1e-2 * signs[p.direction]) for p in probes(spec)]
        own = verdict(torch.tensor(losses, dtype=torch.float64), spec, 0.01, 1e-2).coefficients
        out = engine.step(target)
        np.testing.assert_allclose(out.coefficients, own, rtol=1e-3, atol=1e-6)
        # From here on the engine's own coefficients: its losses are fp32.
        moves.append(out.coefficients.double() @ signs)
        buffer = beta * buffer + (1 - beta) * moves[-1]
        if step >= window:
            buffer -= (1 - beta) * beta**window * moves[-1 - window]
        theta = theta - buffer
        np.testing.assert_allclose(engine.module.weight.detach().double().view(-1), theta, atol=1e-6)


def test_what_a_record_holds_of_steps_before(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, **MOMENTUM)
    outs = walk(engine, LAST)
    found = [rows(record, 2) for record in records(tmp_path)]
    # Steps 3 and 4 are skipped: they have no terms, and count as nothing later; what nothing follows is left out.
    assert [len(step) for step in found] == [1, 2, 3, 0, 0, 1, 2, 3, 3]
    open_end = open_engine(**MOMENTUM)
    assert [o.skip for o in walk(open_end, LAST)] == [SkipReason.NON_FINITE if s in BAD else None for s in range(LAST)]
    for step, each in enumerate(found):
        for age, row in enumerate(each):
            own = np.float32(0.2 * outs[step - age].coefficients.double().numpy())
            weight = 1.0 if age == 0 else 0.8 if age == 1 else 0.8 * 0.8
            assert row == np.float32(weight * own.astype(np.float64)).tolist()


def test_steps_between_skipped_ones_are_looked_back_on(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, **MOMENTUM)
    for step in range(3):
        engine.step([{**zo_batch(seed=step), "factor": math.nan if step == 1 else 1.0}])
    last = rows(records(tmp_path)[2], 2)
    assert last[1] == [0.0, 0.0]
    assert last[2] == np.float32(0.8 * 0.8 * np.array(rows(records(tmp_path)[0], 2)[0])).tolist()


def test_every_coefficient_is_below_the_cap(tmp_path: Path) -> None:
    largest = [float(out.coefficients.abs().max()) for out in walk(open_engine(**MOMENTUM), 3)]
    cap = sorted(largest)[1] * 1.0001
    engine = open_engine(tmp_path, **MOMENTUM, coefficient_cap=cap)
    walk(engine, 3)
    found = records(tmp_path)
    assert [record.skip for record in found].count(SkipReason.COEFFICIENT_CAP) >= 1
    assert max(abs(term.coefficient) for record in found for term in record.update.terms) <= cap


def test_new_weights_have_no_past() -> None:
    engine, fresh = open_engine(**MOMENTUM), open_engine(**MOMENTUM)
    base = weights_of(engine)
    walk(engine, 1)
    engine.load_weights(base)
    fresh.went_on(1, ())
    for each in (engine, fresh):
        each.step(units(1))
    assert engine.digest() == fresh.digest()


# fzoo_r


def test_the_spread_of_the_step_before_counts_at_its_own_radius(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, **FZOO_R)
    outs = walk(engine, LAST)
    plain = open_engine(**{**FZOO_R, "estimator": "zo_sgd"})  # the same places while the weights are the same
    assert plain.step(units(0)).spread == outs[0].spread
    for out, before in zip(outs, [None, *outs], strict=False):
        if out.skip is not None:
            continue
        again = open_engine(**{**FZOO_R, "estimator": "zo_sgd", "weight_decay": 0})
        again.load_weights(_weights_before(tmp_path, out.step))
        again.went_on(out.step, ())
        rises = again.step(units(out.step)).coefficients.double() * (3 * out.eps / out.lr)
        squares = [out.spread**2]
        if before is not None and before.skip is None:
            squares.append((before.spread * out.eps / before.eps) ** 2)
        wanted = out.lr * rises / (3 * math.sqrt(sum(squares) / len(squares)))
        np.testing.assert_allclose(out.coefficients, wanted, rtol=1e-5)
    assert [record.spread for record in records(tmp_path) if record.skip is None] == [
        out.spread for out in outs if out.skip is None
    ]
    assert outs[1].eps < outs[0].eps
    assert {out.forwards for out in outs} == {2 * 4}


def _weights_before(run: Path, step: int) -> dict[str, Tensor]:
    tensors = weights_of(open_engine())
    replay_(tensors, read_journal(run / "journal"), step)
    return tensors


# zo_sgd_cons


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 0.5])
def test_cons_never_raises_the_loss_of_its_batch(lr: float, tmp_path: Path) -> None:
    engine = open_engine(
        tmp_path, estimator="zo_sgd_cons", num_directions=1, lr=lr, weight_decay=0, coefficient_cap=10.0
    )
    stays = 0
    for step in range(8):
        batch = zo_batch(seed=step)
        before, digest = float(engine.losses(batch).mean()), engine.digest()
        out = engine.step(batch)
        after = float(engine.losses(batch).mean())
        assert (out.skip, out.forwards) == (None, 5)
        assert out.clean_loss == pytest.approx(before, rel=1e-6)
        assert after <= before * (1 + 1e-6)
        stays += (engine.digest() == digest) == (float(out.coefficients[0]) == 0.0) and after == before
    taken = records(tmp_path)
    assert [record.skip for record in taken] == [None] * 8
    assert [len(record.update.terms) for record in taken] == [1] * 8
    at_rest = [record for record in taken if record.update.terms[0].coefficient == 0.0]
    assert stays == len(at_rest)
    # Steps that are far too long are mostly not taken.
    assert len(at_rest) == 0 if lr == 1e-4 else len(at_rest) >= 1 if lr == 1e-2 else len(at_rest) >= 4


def test_a_second_look_that_is_not_finite_leaves_the_weights(tmp_path: Path) -> None:
    calls = 0

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        return model(**batch).loss * (math.nan if calls > 2 else 1.0)

    settings = {"estimator": "zo_sgd_cons", "num_directions": 1, "forward": "sequential"}
    engine = zo_ds.initialize(tiny_model("llama"), {"zeroth_order": settings}, loss_fn=loss, run_dir=tmp_path)
    digest = engine.digest()
    out = engine.step(zo_batch())
    assert (out.skip, out.coefficients.tolist(), engine.digest()) == (SkipReason.NON_FINITE, [0.0], digest)
    (record,) = records(tmp_path)
    assert (record.skip, record.update.terms) == (SkipReason.NON_FINITE, ())


# Forks

FORKS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "momentum": (MOMENTUM, {**MOMENTUM, "momentum": 0.5}, 1),
    "window": (MOMENTUM, {**MOMENTUM, "momentum_window": 4}, 1),
    "estimator": (MOMENTUM, {**MOMENTUM, "estimator": "zo_sgd"}, 1),
    "seed": (MOMENTUM, {**MOMENTUM, "run_seed": 4}, 1),
    "begin": ({**MOMENTUM, "momentum": 0.0}, MOMENTUM, 1),
    "end": (MOMENTUM, {**MOMENTUM, "momentum": 0.0}, 1),
    "lr": (MOMENTUM, {**MOMENTUM, "lr": 1e-4}, 3),
    "eps": (MOMENTUM, {**MOMENTUM, "eps": 2e-3}, 3),
}
"""Before, after, and how many steps the first one after looks at, itself included."""


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_looks_back_on_what_still_means_the_same(fork: str, tmp_path: Path) -> None:
    before, after, seen = FORKS[fork]
    count = before["num_directions"]
    for life in ("whole", "pieces"):
        first = open_engine(tmp_path / life, **before)
        walk(first, 3)
        first.close_journal()
        # In pieces: killed before its first step, and after each one.
        for last in (9,) if life == "whole" else (3, 4, 6, 9):
            engine = open_engine(**after)
            open_run(engine, tmp_path / life, Options(NEVER, fork=True))
            while engine.steps_done < last:
                engine.step([zo_batch(seed=engine.steps_done)])
            engine.close_journal()
    one, other = (
        [(r.update, r.skip, r.clean_loss, r.spread) for r in records(tmp_path / life)] for life in ("whole", "pieces")
    )
    assert one == other
    lengths = [len(rows(record, count)) for record in records(tmp_path / "whole")][3:]
    window = 1 if after["momentum"] == 0 else after["momentum_window"]
    assert lengths == [min(window, seen + step) for step in range(6)]
    tensors = weights_of(open_engine())
    assert replay_(tensors, read_journal(tmp_path / "pieces" / "journal")).weights_sha256 == engine.digest()


@pytest.mark.parametrize(
    ("change", "kept"),
    [({"lr": 1e-3}, True), ({"eps": 1e-2}, False), ({"spread_std": "population"}, False), ({"run_seed": 4}, False)],
    ids=["lr", "eps", "spread_std", "run_seed"],
)
def test_a_fork_of_fzoo_r_keeps_a_spread_that_means_the_same(
    change: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    base = {"estimator": "fzoo_r", "num_directions": 3}
    first = open_engine(tmp_path, **base)
    walk(first, 2)
    first.close_journal()
    for _ in range(2):  # killed before its first step
        fork = open_engine(**base, **change)
        open_run(fork, tmp_path, Options(NEVER, fork=True))
        fork.close_journal()
    fork = open_engine(**base, **change)
    open_run(fork, tmp_path, Options(NEVER))
    alone = open_engine(**base, **change)
    alone.load_weights(weights_of(fork))
    alone.went_on(2, ())
    found, without = fork.step(units(2)), alone.step(units(2))
    assert found.spread == without.spread
    assert (found.coefficients.tolist() != without.coefficients.tolist()) == kept


def test_there_and_back_is_two_forks(tmp_path: Path) -> None:
    """Even if no step was taken in between: what a life saw is what the next one sees."""
    for seed, last in ((3, 3), (4, 3), (3, 4), (3, 5)):
        engine = open_engine(**{**MOMENTUM, "run_seed": seed})
        open_run(engine, tmp_path, Options(NEVER, fork=True))
        while engine.steps_done < last:
            engine.step([zo_batch(seed=engine.steps_done)])
        engine.close_journal()
    assert [len(rows(record, 2)) for record in records(tmp_path)] == [1, 2, 3, 1, 2]


def test_a_damaged_journal_before_a_snapshot_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    engine = open_engine(**MOMENTUM)
    open_run(engine, tmp_path, Options(NEVER))
    walk(engine, 3)
    assert engine.durability is not None
    engine.durability.snapshot()
    engine.durability.wait()
    engine.close_journal()
    segment = tmp_path / "journal" / "000000.zoj"
    raw = bytearray(segment.read_bytes())
    raw[-1] ^= 1
    segment.write_bytes(raw)
    resumed = open_engine(**MOMENTUM)
    open_run(resumed, tmp_path, Options(NEVER, warn=said.append))
    assert resumed.steps_done == 3
    resumed.step([zo_batch()])
    resumed.close_journal()
    assert any("damaged before step 3: the next steps do not look back further" in text for text in said)
    (segment_read, *_) = [s for s in read_journal(tmp_path / "journal").segments if s.header.first_step == 3]
    assert [len(rows(record, 2)) for record in segment_read.records] == [1]
