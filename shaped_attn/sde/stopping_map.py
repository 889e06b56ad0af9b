"""When paths of the covariance SDE leave the admissible eigenvalues, over branch gain and tau0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_numbers, fail
from .integrators import Integrator
from .paths import EIGENVALUE_RANGE, OnProgress, Stop
from .process import CovarianceSDE
from .sample import median, plain


@dataclass(frozen=True)
class StoppingTimeMap:
    """Stopping times of the covariance SDE over branch gain (rows) and temperature (columns).

    Tensors are (branch gains, tau0s) float64 on the CPU, NaN in cells that were not computed.

    Attributes:
        branch_gains, tau0s: the settings of rows and columns.
        time: up to which the paths were simulated, in depth / width.
        paths: number of paths of each cell.
        steps: steps per unit of time.
        seed: of the draws of every cell.
        median: median time at which a path is stopped, at most ``time``; in depth / width.
        median_error: its standard error; 0 where the neighbouring paths have the same time.
        stopped, stopped_error: fraction of paths that are stopped, and its standard error.
        exploded, exploded_error: fraction of paths that are stopped at the upper end.
    """

    branch_gains: tuple[float, ...]
    tau0s: tuple[float, ...]
    time: float
    paths: int
    steps: float
    seed: int
    median: Tensor
    median_error: Tensor
    stopped: Tensor
    stopped_error: Tensor
    exploded: Tensor
    exploded_error: Tensor

    @property
    def finished(self) -> Tensor:
        """(branch gains, tau0s) bool: which cells were computed."""
        return ~self.median.isnan()

    @property
    def is_complete(self) -> bool:
        """Whether all cells were computed."""
        return bool(self.finished.all())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; the NaN of cells that were not computed are strings."""
        return {**plain(self), "is_complete": self.is_complete}


def stopping_time_map(
    v0: Tensor,
    *,
    branch_gains: Sequence[float],
    tau0s: Sequence[float],
    time: float = 1.0,
    paths: int = 512,
    steps: float = 100,
    generator: torch.Generator | None = None,
    integrator: Integrator | str = "chain",
    eigenvalue_range: tuple[float, float] = EIGENVALUE_RANGE,
    on_progress: OnProgress | None = None,
    stop: Stop | None = None,
    **settings: Any,
) -> StoppingTimeMap:
    """Return the median time at which an eigenvalue of V leaves its range, as in arXiv 2306.17759.

    All cells draw from the same seed: the same noise moves the paths of each until one of them
    stops, so that neighbours differ by less than their standard errors. A path that never stops
    within ``time`` counts as stopping there.

    Args:
        v0: (m, m) the covariance of the input, as in `CovarianceSDE.sample`.
        branch_gains: the rows of the map.
        tau0s: the columns of the map.
        time: the last time, depth / width. Default 1.0.
        paths: number of paths of each cell. Default 512.
        steps: steps per unit of time. Default 100.
        generator: on any device; one number is drawn from it, the seed of all cells. Default None:
            torch's own.
        integrator: as in `CovarianceSDE.sample`. Default "chain".
        eigenvalue_range: as in `CovarianceSDE.sample`. Default (1e-4, 1e4).
        on_progress: called with the numbers of cells done and to be done.
        stop: asked before each step; True ends the computation with the cells it has.
        **settings: the other arguments of `CovarianceSDE`.

    Returns:
        The map, not complete if ``stop`` ended it.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range. Settings of all
            cells are checked before the first is computed.
    """
    for name in ("branch_gain", "tau0"):
        if name in settings:
            rule, given = f"must be given by {name}s, the cells of the map", repr(settings[name])
            fail(TypeError, name, rule, given, f"Use {name}s=[{given}].")
    rows = check_numbers("branch_gains", branch_gains, ascending=True)
    columns = check_numbers("tau0s", tau0s, ascending=True)
    cells = [
        (row, column, CovarianceSDE(branch_gain=branch_gain, tau0=tau0, **settings))
        for row, branch_gain in enumerate(rows)
        for column, tau0 in enumerate(columns)
    ]
    device = generator.device if generator is not None else None
    seed = int(torch.randint(2**53, (), generator=generator, device=device))
    empty = torch.full((len(rows), len(columns)), math.nan, dtype=torch.float64)
    names = ("median", "median_error", "stopped", "stopped_error", "exploded", "exploded_error")
    found = {name: empty.clone() for name in names}
    for done, (row, column, sde) in enumerate(cells):
        sample = sde.sample(
            v0,
            time,
            paths,
            steps,
            torch.Generator(v0.device).manual_seed(seed),
            integrator=integrator,
            snapshots=2,
            eigenvalue_range=eigenvalue_range,
            stop=stop,
        )
        if not sample.is_complete:
            break
        middle = median(sample.stop_times.clamp(max=time))
        values = (*middle, *sample.stopped_fraction(), *sample.exploded_fraction())
        for name, value in zip(names, values, strict=True):
            found[name][row, column] = value
        if on_progress is not None:
            on_progress(done + 1, len(cells))
    return StoppingTimeMap(rows, columns, float(time), paths, steps, seed, **found)
