"""What files of real jobs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks
