"""Errors a user can act on: what happened, where, why, and what to do; one exit code per kind of trouble."""

from __future__ import annotations


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
    """Another rank died, hung, or computed something else than this one."""

    exit_code = 7
