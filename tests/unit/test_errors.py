"""Errors tell what, where, why and what to do; the exit codes are part of the command's interface."""

from __future__ import annotations

import pytest

from zo_ds import errors

EXIT_CODES = {
    "ZODSError": 1,
    "ConfigError": 2,
    "DataError": 3,
    "MachineError": 4,
    "NonFiniteError": 5,
    "CorruptRunError": 6,
    "PeerError": 7,
    "HungError": 8,
    "StoppedError": 75,
}


def test_exit_codes_are_the_documented_ones() -> None:
    kinds = {k: v for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.ZODSError)}
    assert {name: kind.exit_code for name, kind in kinds.items()} == EXIT_CODES


def test_every_kind_can_be_caught_as_the_base() -> None:
    for name in EXIT_CODES:
        with pytest.raises(errors.ZODSError, match=r"^broken$"):
            raise getattr(errors, name)("broken")


def test_render_labels_each_part_on_its_own_line() -> None:
    error = errors.ConfigError("it broke", where="training.steps", why="a rule", remedy="repair it")
    assert error.render() == "it broke\n  where: training.steps\n  why:   a rule\n  do:    repair it"
    assert str(error) == error.render()
    assert (error.what, error.where, error.why, error.remedy) == ("it broke", "training.steps", "a rule", "repair it")


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ({}, []),
        ({"where": "a:1"}, ["  where: a:1"]),
        ({"why": "b"}, ["  why:   b"]),
        ({"remedy": "c"}, ["  do:    c"]),
        ({"where": "a:1", "remedy": "c"}, ["  where: a:1", "  do:    c"]),
    ],
)
def test_render_leaves_out_unknown_parts(parts: dict[str, str], lines: list[str]) -> None:
    assert errors.DataError("what", **parts).render().splitlines() == ["what", *lines]
