"""A step: losses, agreement, a record on disk, the update; and a run that can be replayed from its scalars alone."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_ds
from tests.conftest import STORES, on_ranks, tiny_model, weights_of, zo_batch
from zo_ds.config.schema import JournalConfig
from zo_ds.engine.base import StepOutput
from zo_ds.engine.engine import ZOEngine
from zo_ds.engine.resume import Options, open_run
from zo_ds.errors import ConfigError, CorruptRunError, MachineError, NonFiniteError, PeerError, ZODSError
from zo_ds.journal.history import read_journal
from zo_ds.journal.replay import replay_
from zo_ds.maths.estimators import EstimatorSpec, Probe, SkipReason, probes, verdict
from zo_ds.maths.noise import step_seed
from zo_ds.maths.update import Term, Update, apply_update_, perturb
from zo_ds.parallel.channel import Channel
from zo_ds.stores.base import trainable_parameters


def scaled_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's loss times a factor that comes with the batch: nan and 0 make steps that cannot be taken."""
    inputs = {key: value for key, value in batch.items() if key != "factor"}
    return model(**inputs).loss * batch.get("factor", 1.0)


def open_engine(
    model: nn.Module | None = None,
    store: str = "resident",
    channel: Channel | None = None,
    population: int = 1,
    **options: Any,
) -> ZOEngine:
    settings = {"num_directions": 4, "lr": 5e-3, "run_seed": 3, **options}
    config = {"zero_optimization": STORES[store], "zeroth_order": settings}
    parallel = {"population": population}
    model = model or tiny_model("llama")
    return zo_ds.initialize(model, config, loss_fn=scaled_loss, channel=channel, parallel=parallel)


def start_journal(engine: ZOEngine, path: Path) -> None:
    open_run(engine, path)


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def weights(engine: ZOEngine) -> dict[str, Tensor]:
    return weights_of(engine)


@pytest.mark.parametrize("estimator", ["fzoo", "mezo", "zo_sgd"])
def test_a_step_is_what_the_formulas_say(estimator: str) -> None:
    spec = EstimatorSpec(zo_ds.ZerothOrderConfig(estimator=estimator).estimator, 4)
    engine = open_engine(estimator=estimator, lr=1e-3, eps=2e-3, weight_decay=0.5, forward="sequential")
    plain = tiny_model("llama").eval()
    infos = trainable_parameters(plain)
    for step in range(2):
        batches = [zo_batch(seed=10 * step), zo_batch(seed=10 * step + 1)]
        theta = {p: p.data for p in infos}

        def at(probe: Probe, theta: Any = theta, step: int = step, batches: Any = batches) -> float:
            for p, info in infos.items():
                place = (info.site(engine.store.structure), step_seed(3, step), probe.direction)
                p.data = perturb(theta[p], *place, probe.side * 2e-3) if probe.side else theta[p]
            with torch.no_grad():
                return sum(float(plain(**batch).loss) for batch in batches) / 2

        losses = torch.tensor([at(probe) for probe in probes(spec)], dtype=torch.float64)
        wanted = verdict(losses, spec, 1e-3, 2e-3)
        terms = tuple(Term(step, i, float(c)) for i, c in enumerate(wanted.coefficients))
        for p, info in infos.items():
            p.data = theta[p].clone()
            apply_update_(p.data, info.site(engine.store.structure), 3, Update(step, terms, 1e-3 * 0.5))
        out = engine.step(batches)
        assert torch.equal(out.coefficients, wanted.coefficients)
        assert (out.step, out.skip, out.lr, out.eps, out.forwards) == (step, None, 1e-3, 2e-3, 2 * len(losses))
        assert (out.clean_loss, out.spread) == (wanted.clean_loss, wanted.spread)
        assert all(torch.equal(p.data, weights(engine)[info.name]) for p, info in infos.items())


def test_sixty_steps_learn_a_batch() -> None:
    engine = open_engine(num_directions=8, lr=6e-2, lr_schedule="linear", total_steps=60)
    batch = zo_batch()
    outs = [engine.step(batch) for _ in range(60)]
    assert outs[-1].clean_loss < 0.7 * outs[0].clean_loss
    assert outs[0].lr == 6e-2
    assert outs[-1].lr == pytest.approx(6e-3)
    assert float(engine.losses(batch)) < 0.7 * outs[0].clean_loss


@pytest.mark.parametrize(
    ("store", "dtype", "noise"),
    [
        ("resident", torch.float32, "dense"),
        ("zero3-cpu", torch.bfloat16, "factored"),
        ("zero3", torch.float32, "factored"),
    ],
)
def test_journal_and_base_weights_give_the_run_at_every_step(
    store: str, dtype: torch.dtype, noise: str, tmp_path: Path
) -> None:
    engine = open_engine(tiny_model("llama", dtype=dtype), store, noise=noise, weight_decay=0.3)
    base, digests = weights(engine), [engine.digest()]
    start_journal(engine, tmp_path / "j")
    outs: list[StepOutput] = []
    for step in range(6):
        batch = {**zo_batch(seed=step), "factor": {2: math.nan, 3: 0.0}.get(step, 1.0)}
        outs.append(engine.step(batch))
        digests.append(engine.digest())
    journal = read_journal(tmp_path / "j" / "journal")
    records = journal.records()
    reasons = [None, None, SkipReason.NON_FINITE, SkipReason.ZERO_SPREAD, None, None]
    assert [record.skip for record in records] == [out.skip for out in outs] == reasons
    assert [len(record.update.terms) for record in records] == [0 if reason else 4 for reason in reasons]
    assert [record.clean_loss for record in records][:2] == [out.clean_loss for out in outs][:2]
    assert digests[2] == digests[3] == digests[4]
    assert len(set(digests)) == 5
    done: list[str] = []
    for steps in (*range(7), None):
        tensors = {name: tensor.clone() for name, tensor in base.items()}
        found = replay_(tensors, journal, steps, progress=done.append)
        assert found.weights_sha256 == digests[6 if steps is None else steps]
    assert done[-len(journal.header.parameters) :] == [info.name for info in journal.header.parameters]
    assert all(torch.equal(tensors[info.name], weights(engine)[info.name]) for info in journal.header.parameters)
    with pytest.raises(ConfigError, match="has 6 steps, not 7"):
        replay_(base, journal, 7)

    resumed = open_engine(tiny_model("llama", dtype=dtype), noise=noise, weight_decay=0.3)
    engine.close_journal()
    open_run(resumed, tmp_path / "j")
    assert (resumed.steps_done, resumed.digest()) == (6, engine.digest())
    assert torch.equal(resumed.step(zo_batch()).coefficients, engine.step(zo_batch()).coefficients)


def test_replay_on_other_weights_is_refused(tmp_path: Path) -> None:
    engine = open_engine()
    base = weights(engine)
    start_journal(engine, tmp_path / "j")
    engine.step(zo_batch())
    journal, norm = read_journal(tmp_path / "j" / "journal"), base["model.norm.weight"]
    for change, why in (
        (torch.nextafter(norm, norm + 1), "SHA-256"),
        (norm.bfloat16(), "'model.norm.weight' is"),
        (norm[:-1], r"'model\.norm\.weight' is \(15,\)"),
        (None, "'model.norm.weight' is missing"),
    ):
        other = {**base, "model.norm.weight": change}
        if change is None:
            del other["model.norm.weight"]
        with pytest.raises(CorruptRunError, match=why):
            replay_(other, journal)


@pytest.mark.parametrize(
    ("factor", "options", "reason", "why"),
    [
        (math.nan, {}, SkipReason.NON_FINITE, "non-finite in every evaluation, the unperturbed one too, for 1 of 1"),
        (math.inf, {}, SkipReason.NON_FINITE, "non-finite in every evaluation"),
        (0.0, {}, SkipReason.ZERO_SPREAD, "losses between 0 and 0"),
        (1.0, {"coefficient_cap": 1e-9}, SkipReason.COEFFICIENT_CAP, "losses between"),
    ],
)
def test_steps_that_cannot_be_taken(
    factor: float, options: dict[str, Any], reason: SkipReason, why: str, tmp_path: Path
) -> None:
    engine = open_engine(**options, weight_decay=0.5)
    start_journal(engine, tmp_path / "j")
    digest = engine.digest()
    bad = {**zo_batch(), "factor": factor}
    for step in range(4):
        out = engine.step(bad)
        assert (out.step, out.skip) == (step, reason)
        assert out.coefficients.tolist() == [0.0] * 4
    with pytest.raises(NonFiniteError, match="the last 5 steps were all skipped") as caught:
        engine.step(bad)
    assert caught.value.where == "step 4"
    assert caught.value.why.startswith(f"{reason.value}: {why}")
    assert caught.value.remedy
    assert engine.digest() == digest
    records = read_journal(tmp_path / "j" / "journal").records()
    assert [(r.step, r.skip, r.update.terms) for r in records] == [(step, reason, ()) for step in range(5)]


def test_a_step_that_is_taken_starts_the_count_anew() -> None:
    engine = open_engine(max_consecutive_skips=2)
    for factor in (math.nan, 1.0, math.nan, 1.0, math.nan):
        engine.step({**zo_batch(), "factor": factor})
    with pytest.raises(NonFiniteError, match="the last 2 steps"):
        engine.step({**zo_batch(), "factor": math.nan})


def test_full_disk_stops_the_step_before_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = open_engine(), open_engine()
    start_journal(engine, tmp_path / "j")
    engine.step(zo_batch())
    digest = engine.digest()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(MachineError, match="cannot write the journal: No space left"):
            engine.step(zo_batch(seed=1))
    assert (engine.digest(), engine.steps_done) == (digest, 1)
    assert len(read_journal(tmp_path / "j" / "journal").records()) == 1
    engine.step(zo_batch(seed=1))
    for seed in (0, 1):
        other.step(zo_batch(seed=seed))
    assert engine.digest() == other.digest()
    assert len(read_journal(tmp_path / "j" / "journal").records()) == 2


def test_a_disk_that_fills_up_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, said = open_engine(), list[str]()
    open_run(
        engine,
        tmp_path / "j",
        Options(JournalConfig(snapshot_replay_s=1e-9, hash_every=1), total_steps=4, warn=said.append),
    )
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    for seed in range(4):
        engine.step(zo_batch(seed=seed))
    engine.close_journal()
    assert len(said) == 3
    assert all("no snapshot: cannot begin a segment" in text for text in said)
    assert len(read_journal(tmp_path / "j" / "journal").records()) == 4


def test_units_of_different_size_are_refused() -> None:
    engine = zo_ds.initialize(nn.Linear(4, 3), {"zeroth_order": {}}, loss_fn=lambda m, x: m(x).mean(1))
    digest = engine.digest()
    with pytest.raises(PeerError, match="units of work differ in size") as caught:
        engine.step([torch.ones(3, 4), torch.ones(2, 4)])
    assert "[2, 3] examples here" in caught.value.where
    assert (engine.digest(), engine.steps_done) == (digest, 0)


def test_ranks_share_the_units_and_take_the_same_step() -> None:
    units = [zo_batch(seed=seed) for seed in range(8)]
    alone, models = open_engine(), [tiny_model("llama") for _ in range(2)]
    wanted = [alone.step(units[at : at + 4]) for at in (0, 4)]

    def work(channel: Channel) -> tuple[list[StepOutput], str]:
        engine = open_engine(models[channel.rank], channel=channel)
        return [engine.step(units[at + channel.rank : at + 4 : 2]) for at in (0, 4)], engine.digest()

    for result in on_ranks(2, work):
        assert not isinstance(result, ZODSError)
        assert result[1] == alone.digest()
        for out, same in zip(result[0], wanted, strict=True):
            assert torch.equal(out.coefficients, same.coefficients)
            assert replace(out, coefficients=0, seconds=0, sent=0) == replace(same, coefficients=0, seconds=0)


@pytest.mark.parametrize(
    ("odd", "kinds", "words"),
    [
        ("lr", [PeerError, PeerError], "ranks disagree on step 0"),
        ("number", [PeerError, PeerError], "units of work differ in size or number"),
        ("disk", [MachineError, PeerError], "write the journal"),
    ],
)
def test_no_rank_applies_a_step_that_one_cannot_take(
    odd: str, kinds: list[type[ZODSError]], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_engine()  # enters DeepSpeed's world, which all threads share
    models = [tiny_model("llama") for _ in range(2)]

    def work(channel: Channel) -> tuple[ZODSError, bool]:
        last = channel.rank == 1
        lr, population = (1e-2 if last and odd == "lr" else 5e-3), (2 if odd == "number" else 1)
        engine = open_engine(models[channel.rank], channel=channel, population=population, lr=lr)
        before = engine.digest()
        start_journal(engine, tmp_path / "j")
        if odd == "disk" and not last:
            monkeypatch.setattr(os, "fsync", refuse)  # the other rank writes nothing
        with pytest.raises(ZODSError) as caught:
            engine.step([zo_batch()] * (2 if last and odd == "number" else 1))
        return caught.value, engine.digest() == before and engine.steps_done == 0

    results = on_ranks(2, work)
    assert [type(result[0]) for result in results if isinstance(result, tuple)] == kinds
    assert all(isinstance(result, tuple) and words in result[0].what and result[1] for result in results)
    assert read_journal(tmp_path / "j" / "journal").records() == []
