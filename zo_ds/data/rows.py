"""Rows of a data set, with the place each was found at, so that whatever is wrong with one can be named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zo_ds.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row as it was stored.

    Attributes:
        values: by column.
        where: file and line (JSON lines) or file and row number (parquet), from 1.
    """

    values: Mapping[str, Any]
    where: str

    def has(self, column: str) -> bool:
        """Whether there is such a column, with something in it."""
        return self.values.get(column) is not None

    def value(self, column: str) -> Any:
        """What a column holds; a dot leads into a nested object, unless a column has it in its name.

        Raises:
            DataError: the row has no such column.
        """
        found: Any = self.values
        for part in (column,) if column in found else column.split("."):
            if not isinstance(found, Mapping) or part not in found:
                names = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
                raise DataError(
                    f"the row has no '{column}'",
                    where=self.where,
                    why=f"it has: {names}",
                    remedy="check task.name and data.path; data.text_field and data.label_field name other columns of "
                    "a classification task",
                )
            found = found[part]
        return found

    def text(self, column: str, *, empty: bool = False) -> str:
        """A text.

        Args:
            column: see `value`.
            empty: whether nothing but white space will do.

        Raises:
            DataError: it is none.
        """
        found = self.value(column)
        if not isinstance(found, str) or not (empty or found.strip()) or not _is_unicode(found):
            raise DataError(f"'{column}' is not a text", where=self.where, why=f"found {found!r}")
        return found

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts, one or more.

        Raises:
            DataError: it is none.
        """
        found = self.value(column)
        if not isinstance(found, Sequence) or isinstance(found, str) or not found:
            raise DataError(f"'{column}' is not a list of texts", where=self.where, why=f"found {found!r}")
        if not all(isinstance(entry, str) and _is_unicode(entry) for entry in found):
            raise DataError(f"'{column}' holds something that is not a text", where=self.where, why=f"found {found!r}")
        return tuple(found)

    def label(self, column: str, names: Sequence[str]) -> int:
        """A class, given by its number from 0 or by its name.

        Args:
            column: see `value`.
            names: of the classes.

        Raises:
            DataError: it is none of them.
        """
        found = self.value(column)
        if isinstance(found, str) and found in names:
            return list(names).index(found)
        if isinstance(found, int) and (len(names) == 2 or not isinstance(found, bool)) and 0 <= found < len(names):
            return int(found)
        unlabelled = "; -1 marks rows whose answers are not published, use another split" if found == -1 else ""
        raise DataError(
            f"the label {found!r} is not one of the task's",
            where=self.where,
            why=f"labels are 0..{len(names) - 1}, or {', '.join(names)}{unlabelled}",
            remedy="correct the row or task.label_words",
        )


def _is_unicode(text: str) -> bool:
    # JSON can write half of a pair of surrogates, which no tokenizer takes.
    return not any("\ud800" <= character <= "\udfff" for character in text)
