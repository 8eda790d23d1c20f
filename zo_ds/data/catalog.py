"""Named data sets that come from package registries, written once as JSON lines that anyone can read.

In a configuration they are called ``catalog:NAME``; the functions here take the bare NAME.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zo_ds.errors import DataError
from zo_ds.fetch import Package, build_once, cache_dir, fetch, pick

_VADER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_VADER_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_VADER_MIN_RATING = 1.0
_VADER_NOTICE = """\
vader-movie: sentences from film reviews with crowd ratings of their sentiment.

Source: additional_resources/hutto_ICWSM_2014.tar.gz, movieReviewSnippets_GroundTruth.txt, in {filename}
(sha256 {sha256}),
the source archive of the Python package vaderSentiment 0.5.
Ratings: mean of at least 20 raters, -4 (most negative) to 4; Hutto & Gilbert, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
Licence: the packager puts files and ratings under the MIT licence (Copyright (c) 2014 cjhutto). The sentences
are Rotten Tomatoes quotes collected by Pang & Lee, who state no licence.
Changes: duplicates and sentences rated from -1 to 1 are left out; label 1 means a positive rating; train, dev
and test are drawn by a hash of the sentence. Sentences are otherwise as found.
"""


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    Args:
        package: the registry file it is read from.
        licence: one line on what the sources say about use.
        build: (downloaded file, empty folder): writes the files that ``dataset_dir`` names.
    """

    package: Package
    licence: str
    build: Callable[[Path, Path], None]


@dataclass(frozen=True)
class _Row:
    text: str
    rating: float
    digest: str

    @property
    def part(self) -> str:
        return {0: "test", 1: "dev"}.get(int(self.digest[:8], 16) % 10, "train")


def dataset_dir(name: str) -> Path:
    """The folder ``cache_dir()/data/NAME``: ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` and ``NOTICE``.

    A line is ``{"text": str, "label": 0 or 1, "rating": float}``; the split and the order of lines never
    change. The first call downloads and converts.

    Raises:
        ConfigError: no data set has that name.
        MachineError: it is not there yet and cannot be downloaded or written.
        DataError: the downloaded file is not the expected one.
    """
    dataset = pick(DATASETS, name, "data set")
    target = cache_dir() / "data" / name
    return build_once(target, lambda folder: dataset.build(fetch(dataset.package), folder))


def _build_vader_movie(sdist: Path, folder: Path) -> None:
    parts: dict[str, list[_Row]] = {"train": [], "dev": [], "test": []}
    for row in _vader_rows(sdist):
        parts[row.part].append(row)
    for part, rows in parts.items():
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for row in sorted(rows, key=lambda row: row.digest):
                line = {"text": row.text, "label": int(row.rating > 0), "rating": row.rating}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    package = DATASETS["vader-movie"].package
    notice = _VADER_NOTICE.format(filename=package.filename, sha256=package.sha256)
    (folder / "NOTICE").write_text(notice, encoding="utf-8")


def _vader_rows(sdist: Path) -> list[_Row]:
    seen: dict[str, _Row] = {}
    for number, line in enumerate(_vader_lines(sdist), start=1):
        row = _vader_row(line, f"{sdist}: {_VADER_MEMBER}:{number}")
        if abs(row.rating) > _VADER_MIN_RATING:
            seen.setdefault(row.text, row)
    return list(seen.values())


def _vader_lines(sdist: Path) -> list[bytes]:
    try:
        with zipfile.ZipFile(sdist) as outer:
            name = next((name for name in outer.namelist() if name.endswith(f"/{_VADER_ARCHIVE}")), "")
            with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as inner:
                member = inner.extractfile(_VADER_MEMBER)
                lines = member.read().splitlines() if member else []
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        KeyError,
    ) as error:
        raise _malformed(str(sdist), f"no {_VADER_MEMBER} can be read from it ({error!r})") from error
    if not lines:
        raise _malformed(f"{sdist}: {_VADER_MEMBER}", "it is empty")
    return lines


def _vader_row(line: bytes, where: str) -> _Row:
    try:
        _, rating, raw = line.split(b"\t")[:3]
        text, value = raw.decode("utf-8").strip(), float(rating)
    except ValueError as error:
        raise _malformed(where, f"expected number, rating and UTF-8 text between tabs ({error})") from error
    if not text or not math.isfinite(value):
        raise _malformed(where, "the text is empty or the rating is not finite")
    # The split was first drawn with the file misread as Latin-1; hashing it so keeps every row in its part.
    digest = hashlib.sha1(text.encode("utf-8").decode("latin-1").encode("utf-8"), usedforsecurity=False)
    return _Row(text, value, digest.hexdigest())


def _malformed(where: str, why: str) -> DataError:
    return DataError(
        "not the vaderSentiment 0.5 source archive",
        where=where,
        why=why,
        remedy="delete the file, so that it is downloaded again",
    )


DATASETS: dict[str, Dataset] = {
    "vader-movie": Dataset(
        package=Package(
            requirement="vaderSentiment==0.5",
            filename="vaderSentiment-0.5.zip",
            sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            size=2_448_964,
            sdist=True,
        ),
        licence="MIT for the ratings; none stated for the sentences (Rotten Tomatoes, by Pang & Lee)",
        build=_build_vader_movie,
    ),
}
