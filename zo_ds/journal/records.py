"""What the journal says: a header that identifies the run, and one record for every step."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.estimators import SkipReason
from zo_ds.maths.noise import NOISE_VERSION
from zo_ds.maths.update import UPDATE_VERSION, Term, Update

JOURNAL_VERSION = 1


@dataclass(frozen=True)
class Header:
    """Everything replay needs beside the base weights.

    Attributes:
        run_id: hexadecimal, new for every run.
        run_seed: seed of all noise.
        noise: structure of the directions.
        estimator: published name, for the reader's information.
        base_sha256: digest of the trained weights before step 0, see `stores.base.weights_sha256`.
        parameters: the manifest, in the model's order.
        zo_ds: version of the program that wrote the journal.
    """

    run_id: str
    run_seed: int
    noise: NoiseStructure
    estimator: str
    base_sha256: str
    parameters: tuple[ParamInfo, ...]
    zo_ds: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": "zo_ds journal",
            "journal_version": JOURNAL_VERSION,
            "noise_version": NOISE_VERSION,
            "update_version": UPDATE_VERSION,
            "zo_ds": self.zo_ds,
            "run_id": self.run_id,
            "run_seed": self.run_seed,
            "noise": self.noise.value,
            "estimator": self.estimator,
            "base_sha256": self.base_sha256,
            "parameters": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "dtype": str(p.dtype).removeprefix("torch."),
                    "param_id": p.param_id,
                }
                for p in self.parameters
            ],
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Header:
        """The header in plain data.

        Raises:
            ValueError: it is no journal, or one of a version this program does not read.
            KeyError: an entry is missing.
        """
        if tree.get("format") != "zo_ds journal":
            raise ValueError("it does not start with a zo_ds journal header")
        for key, known in (
            ("journal_version", JOURNAL_VERSION),
            ("noise_version", NOISE_VERSION),
            ("update_version", UPDATE_VERSION),
        ):
            if tree[key] != known:
                raise ValueError(f"{key} is {tree[key]}, this zo_ds reads {known}")
        parameters = tuple(
            ParamInfo(p["name"], tuple(p["shape"]), getattr(torch, p["dtype"])) for p in tree["parameters"]
        )
        return Header(
            tree["run_id"],
            tree["run_seed"],
            NoiseStructure(tree["noise"]),
            tree["estimator"],
            tree["base_sha256"],
            parameters,
            tree["zo_ds"],
        )


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step.

    Attributes:
        update: what was applied; without terms if the step was skipped.
        skip: None, or why.
        clean_loss: l_0.
        spread: standard deviation of the perturbed losses.
    """

    update: Update
    skip: SkipReason | None
    clean_loss: float
    spread: float

    @property
    def step(self) -> int:
        """0-based number of the step."""
        return self.update.step

    def to_json(self) -> dict[str, Any]:
        """Plain data; coefficients as the hexadecimal bits of fp32, so that no decimal can round them."""
        return {
            "step": self.step,
            "skip": self.skip.value if self.skip else None,
            "terms": [[t.step, t.direction, _bits(t.coefficient)] for t in self.update.terms],
            "decay": self.update.decay,
            "clean_loss": _finite(self.clean_loss),
            "spread": _finite(self.spread),
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> StepRecord:
        """The record in plain data.

        Raises:
            ValueError, KeyError, TypeError: it is malformed.
        """
        terms = tuple(Term(int(step), int(direction), _unbits(bits)) for step, direction, bits in tree["terms"])
        update = Update(int(tree["step"]), terms, float(tree["decay"]))
        skip = SkipReason(tree["skip"]) if tree["skip"] else None
        return StepRecord(update, skip, float(tree["clean_loss"]), float(tree["spread"]))


def _bits(value: float) -> str:
    return struct.pack(">f", value).hex()


def _unbits(text: str) -> float:
    raw = bytes.fromhex(text)
    if len(raw) != 4:
        raise ValueError(f"{len(raw)} bytes are no fp32")
    (value,) = struct.unpack(">f", raw)
    return float(value)


def _finite(value: float) -> float | str:
    # JSON has no NaN; float() reads these strings back.
    return value if math.isfinite(value) else str(value)
