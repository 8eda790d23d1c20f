"""The population x data grid: which rank evaluates which directions on which examples.

Rank r is number r // data on the population axis and r mod data on the data axis. Who computes what changes no bit of a
step in strict mode: the unit of work (a micro-batch at a chunk of places) has one shape, and ranks take different ones.
Ranks without work are fine: a grid may have more seats than there are units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zo_ds.errors import ConfigError

LEAST_PLACES = 2
"""Of a rank: a clean place alone would be computed by other code than displaced ones."""


@dataclass(frozen=True)
class Grid:
    """The seat of a rank.

    Attributes:
        rank: of the job.
        population: ranks that share out the directions.
        data: ranks that share out the examples.
    """

    rank: int
    population: int
    data: int

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.population * self.data

    @property
    def population_rank(self) -> int:
        """Number on the population axis."""
        return self.rank // self.data

    @property
    def data_rank(self) -> int:
        """Number on the data axis."""
        return self.rank % self.data

    def of(self, rank: int) -> Grid:
        """Another rank's seat."""
        return Grid(rank, self.population, self.data)

    def units(self, count: int) -> range:
        """Numbers of the micro-batches that this rank computes: number u belongs to u mod data."""
        return range(self.data_rank, count, self.data)

    def places(self, count: int, chunk: int) -> range:
        """Numbers of the places (clean and displaced) that this rank evaluates.

        Args:
            count: places of the step.
            chunk: how many are always computed together; shares begin and end at a multiple of it.
        """
        chunks = -(-count // chunk)
        first, last = (chunks * i // self.population for i in (self.population_rank, self.population_rank + 1))
        return range(first * chunk, min(count, last * chunk))


def most_population(places: int, chunk: int) -> int:
    """The most ranks that directions can be shared out to."""
    return max(1, -(-places // chunk) if chunk >= LEAST_PLACES else places // LEAST_PLACES)


def make_grid(
    rank: int,
    world_size: int,
    *,
    population: int | None,
    data: int | None,
    units: int | None,
    places: int,
    chunk: int,
) -> Grid:
    """The grid of a job; what is None is chosen so that the busiest rank has least to do, examples before directions.

    Args:
        rank: of this process.
        world_size: ranks of the job.
        population: ranks on that axis, as the user wants them.
        data: the same of the other axis.
        units: micro-batches of a step; None if that is not known.
        places: evaluations of a step.
        chunk: places that are always computed together.

    Raises:
        ConfigError: they do not multiply to the ranks, or there are more population ranks than work for them.
    """
    most, chunks = most_population(places, chunk), math.ceil(places / chunk)
    where = "parallel.population, parallel.data"
    if population is not None and population > most:
        raise ConfigError(
            f"{population} ranks cannot share {places} evaluations of the loss",
            where="parallel.population",
            why=f"they are computed {chunk} at a time" if chunk > 1 else f"each rank takes {LEAST_PLACES} or more",
            remedy=f"use {most} or less",
        )
    fitting = [
        (p, world_size // p)
        for p in range(1, world_size + 1)
        if world_size % p == 0 and population in (None, p) and data in (None, world_size // p)
    ]
    fitting = [(p, d) for p, d in fitting if p <= most]
    if not fitting:
        raise ConfigError(
            f"population {population or 'auto'} x data {data or 'auto'} is not {world_size}, the number of ranks",
            where=where,
            remedy="choose factors of the number of ranks, or auto",
        )
    if units is None:
        # Whoever hands out micro-batches himself expects to hand them to every rank.
        chosen = fitting[0]
    else:
        chosen = min(fitting, key=lambda pd: (math.ceil(units / pd[1]) * math.ceil(chunks / pd[0]), pd[0]))
    return Grid(rank, *chosen)
