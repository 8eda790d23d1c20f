"""What the journal says: a header that identifies the run, and one record for every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.hashing import HASH_VERSION
from zo_ds.maths.noise import NOISE_VERSION
from zo_ds.maths.update import UPDATE_VERSION, Term, Update

_VERSIONS = {"noise_version": NOISE_VERSION, "update_version": UPDATE_VERSION, "hash_version": HASH_VERSION}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Header:
    """Everything replay needs beside the base weights; each segment of a journal begins with one.

    Attributes:
        run_id: hexadecimal, new for every run.
        run_seed: seed of all noise of this segment.
        noise: structure of the directions.
        estimator: published name, for the reader's information.
        num_directions: N; coefficient number k of step t belongs to direction k mod N of step t - k div N.
        window: how many steps' directions a record may name.
        past: what the numbers of earlier steps depend on, where later steps use them; see `zo_ds.engine.past`.
        lr: the learning rate (``value``) and ``how`` it was found, where the recipe gave no number.
        coefficient_cap: no |coefficient| of the segment is larger.
        base_sha256: digest of the trained weights before step 0, see `stores.base.weights_sha256`.
        base_model: where they come from, for people and for `zo_ds apply`: path, revision, dtype, head, classes.
        parameters: the manifest, in the model's order.
        zo_ds: version of the program that wrote the segment.
        segment: number of the segment, from 0.
        first_step: of the segment.
        chain: CRC that the segment before it ended with; 0 in the first one.
        shared: of an exported file: how many steps it has, and the weights_sha256 they lead to if that is known.
    """

    run_id: str
    run_seed: int
    noise: NoiseStructure
    estimator: str
    num_directions: int
    coefficient_cap: float
    base_sha256: str
    parameters: tuple[ParamInfo, ...]
    zo_ds: str
    base_model: Mapping[str, Any] | None = None
    window: int = 1
    segment: int = 0
    first_step: int = 0
    chain: int = 0
    shared: Mapping[str, Any] | None = None
    past: Mapping[str, Any] | None = None
    lr: Mapping[str, Any] | None = None

    @property
    def slots(self) -> int:
        """How many coefficients a record has room for."""
        return self.num_directions * self.window

    def following(self, first_step: int, chain: int) -> Header:
        """The header of the next segment."""
        return replace(self, segment=self.segment + 1, first_step=first_step, chain=chain)

    def maths(self) -> dict[str, Any]:
        """What decides how coefficients become weights, and may only change by a fork."""
        return {
            "run_seed": self.run_seed,
            "noise": self.noise.value,
            "estimator": self.estimator,
            "num_directions": self.num_directions,
            "window": self.window,
            "coefficient_cap": self.coefficient_cap,
            "past": None if self.past is None else dict(self.past),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": "zo_ds journal",
            **_VERSIONS,
            "zo_ds": self.zo_ds,
            "run_id": self.run_id,
            **{key: value for key, value in self.maths().items() if key != "past" or value is not None},
            "base_sha256": self.base_sha256,
            "base_model": dict(self.base_model) if self.base_model is not None else None,
            "parameters": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "dtype": str(p.dtype).removeprefix("torch."),
                    "param_id": p.param_id,
                }
                for p in self.parameters
            ],
            "segment": self.segment,
            "first_step": self.first_step,
            "chain": self.chain,
            **({"shared": dict(self.shared)} if self.shared is not None else {}),
            **({"lr": dict(self.lr)} if self.lr is not None else {}),
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Header:
        """The header in plain data.

        Raises:
            ValueError: it is no journal, contradicts itself, or is of a version this program does not read.
            KeyError, TypeError, AttributeError: an entry is missing or malformed.
        """
        if tree.get("format") != "zo_ds journal":
            raise ValueError("it does not start with a zo_ds journal header")
        for key, known in _VERSIONS.items():
            if tree[key] != known:
                raise ValueError(f"{key} is {tree[key]}, this zo_ds reads {known}")
        parameters = tuple(ParamInfo(p["name"], tuple(p["shape"]), _DTYPES[p["dtype"]]) for p in tree["parameters"])
        header = Header(
            tree["run_id"],
            tree["run_seed"],
            NoiseStructure(tree["noise"]),
            tree["estimator"],
            tree["num_directions"],
            tree["coefficient_cap"],
            tree["base_sha256"],
            parameters,
            tree["zo_ds"],
            tree["base_model"],
            tree["window"],
            tree["segment"],
            tree["first_step"],
            tree["chain"],
            tree.get("shared"),
            tree.get("past"),
            tree.get("lr"),
        )
        if not (header.past is None or isinstance(header.past, Mapping)):
            raise ValueError("its entry 'past' is malformed")
        rate = 1.0 if header.lr is None else header.lr["value"]
        if not (isinstance(rate, float) and 0 < rate < math.inf):
            raise ValueError("its entry 'lr' is malformed")
        if (
            not 0 < header.coefficient_cap < math.inf
            or header.num_directions < 1
            or header.window < 1
            or min(header.segment, header.first_step) < 0
        ):
            raise ValueError("a number in the header is out of range")
        return header


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step.

    Attributes:
        update: what was applied; without terms if the step was skipped.
        skip: None, or why.
        clean_loss: l_0.
        spread: standard deviation of the perturbed losses.
        state_hash: of the weights that the step started from, None where it was not taken.
    """

    update: Update
    skip: SkipReason | None
    clean_loss: float
    spread: float
    state_hash: int | None = None

    @property
    def step(self) -> int:
        """0-based number of the step."""
        return self.update.step

    def to_json(self) -> dict[str, Any]:
        """Plain data for people and scripts; NaN and infinities as Python's json writes them."""
        return {
            "step": self.step,
            "skip": self.skip.value if self.skip else None,
            "coefficients": [term.coefficient for term in self.update.terms],
            "decay": self.update.decay,
            "clean_loss": self.clean_loss,
            "spread": self.spread,
            "state_hash": None if self.state_hash is None else f"{self.state_hash:016x}",
        }


def direction_of(slot: int, step: int, num_directions: int) -> tuple[int, int]:
    """(step, direction) whose noise coefficient number ``slot`` of a step multiplies."""
    return step - slot // num_directions, slot % num_directions


def terms_of(step: int, coefficients: list[float], num_directions: int) -> tuple[Term, ...]:
    """The terms of a step from its coefficients, in the order of the record."""
    return tuple(Term(*direction_of(slot, step, num_directions), c) for slot, c in enumerate(coefficients))
