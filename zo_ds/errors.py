"""Errors a user can act on: what happened, where, why, and what to do; one exit code per kind of trouble."""

from __future__ import annotations

import json

_OF_COLLECTIVES = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")


class ZODSError(Exception):
    """Base of every error zo_ds raises on purpose.

    Args:
        what: one sentence, what went wrong.
        where: key path (``training.steps``) or ``file:line`` the user can open; empty if there is none.
        why: the rule that was broken or the cause underneath.
        remedy: the next thing to try.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: one labelled line for each part that is known."""
        parts = [("where", self.where), ("why", self.why), ("do", self.remedy)]
        return "\n".join([self.what, *(f"  {label + ':':<7}{text}" for label, text in parts if text)])

    def to_json(self) -> str:
        """As text, for other ranks."""
        return json.dumps([self.exit_code, self.what, self.where, self.why, self.remedy])

    @staticmethod
    def from_json(text: str | bytes) -> ZODSError:
        """The error that another rank met."""
        code, what, where, why, remedy = json.loads(text)
        kind = next((kind for kind in ZODSError.__subclasses__() if kind.exit_code == code), ZODSError)
        return kind(what, where=where, why=why, remedy=remedy)


def of_a_collective(error: BaseException) -> bool:
    """Whether an error of torch tells that a rank on the other end of a collective is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_COLLECTIVES)


class ConfigError(ZODSError):
    """The configuration is wrong or contradicts itself."""

    exit_code = 2


class DataError(ZODSError):
    """A model or data file is missing, empty or malformed."""

    exit_code = 3


class MachineError(ZODSError):
    """The machine does not offer what the run needs: a free port, a package, the run directory."""

    exit_code = 4


class NonFiniteError(ZODSError):
    """Too many steps in a row could not be taken (non-finite losses, no spread)."""

    exit_code = 5


class CorruptRunError(ZODSError):
    """A journal or run directory contradicts itself or the weights."""

    exit_code = 6


class PeerError(ZODSError):
    """Another rank died, or computed something else than this one."""

    exit_code = 7


class HungError(ZODSError):
    """A rank made no progress for far longer than a step takes."""

    exit_code = 8


class StoppedError(ZODSError):
    """The run was asked to stop (SIGTERM, SIGINT); the same command goes on from here."""

    exit_code = 75
