"""Runs many paths of a covariance at once, records them, and freezes those that leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..checks import check_int, check_number, check_size, fail
from .sample import CovarianceSample

EIGENVALUE_RANGE = (1e-4, 1e4)

OnProgress = Callable[[int, int], None]
Stop = Callable[[], bool]


class Simulation(Protocol):
    """One way to move a covariance through depth. A state is a Tensor with paths as its rows."""

    def start(self, paths: int) -> Tensor:
        """Return the state of ``paths`` paths at time 0."""

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return the state after step ``index``, counted from 0; rows are independent."""

    def covariance(self, state: Tensor) -> Tensor:
        """Return V of each path, (paths, m, m)."""


@torch.no_grad()
def run(
    simulation: Simulation,
    *,
    source: str,
    paths: int,
    steps: int,
    time: float,
    snapshots: int,
    eigenvalue_range: tuple[float, float],
    chunk: int,
    on_progress: OnProgress | None = None,
    stop: Stop | None = None,
) -> CovarianceSample:
    """Run ``paths`` paths over ``steps`` equal steps, ``chunk`` of them at a time.

    Args:
        simulation: what moves a path.
        source, paths: as in `CovarianceSample`, which gets ``requested = paths``.
        steps: number of steps, over which ``time`` passes.
        time: the last time, in depth / width.
        snapshots: number of times to record, spread evenly, the first and the last among them.
        eigenvalue_range: a path is frozen before the step that takes an eigenvalue of V out of it.
            A lower end of 0 puts no bound there.
        chunk: paths to run at a time: a bound on memory, and what an interruption may cost.
        on_progress: called with the steps of paths done and to be done.
        stop: asked before each step; if it returns True the unfinished chunk is dropped.
    """
    check_size("chunk", chunk)
    check_int("snapshots", snapshots, low=2)
    low, high = check_range(eigenvalue_range)
    recorded = sorted({round(i * steps / (snapshots - 1)) for i in range(snapshots)})
    # In this order the last one is exactly ``time``.
    times = torch.tensor(recorded, dtype=torch.float64) / steps * time
    done = 0
    while done < paths:
        count = min(chunk, paths - done)
        state = simulation.start(count)  # of the paths that are alive
        current = simulation.covariance(state).clone()  # (count, m, m)
        alive = torch.arange(count, device=current.device)
        if done == 0:
            sample = CovarianceSample(
                source,
                times,
                current.new_empty(len(times), paths, *current.shape[1:]),
                torch.full((paths,), torch.inf, dtype=torch.float64, device=current.device),
                torch.zeros(paths, dtype=torch.bool, device=current.device),
                paths,
            )
        part = sample.of_paths(done, done + count)
        part.covariances[0] = current
        for index in range(steps):
            if stop is not None and stop():
                return sample.of_paths(0, done)
            if alive.numel() > 0:
                state = simulation.step(state, index)
                proposed = simulation.covariance(state)
                is_inside, is_above = locate(proposed, low, high)
                if not is_inside.all():
                    left = alive[~is_inside]
                    part.stop_times[left] = (index + 1) / steps * time
                    part.exploded[left] = is_above[~is_inside]
                    alive, state, proposed = (x[is_inside] for x in (alive, state, proposed))
                if alive.numel() == count:
                    current = proposed
                else:
                    current.index_copy_(0, alive, proposed)
            if index + 1 in recorded:
                part.covariances[recorded.index(index + 1)] = current
            if on_progress is not None:
                on_progress(done * steps + count * (index + 1), paths * steps)
        done += count
    return sample


def check_range(eigenvalue_range: tuple[float, float]) -> tuple[float, float]:
    """Check and unpack the admissible eigenvalues."""
    name, remedy = "eigenvalue_range", "The paper's is (1e-4, 1e4)."
    try:
        low, high = eigenvalue_range
    except (TypeError, ValueError):
        fail(TypeError, name, "must be a pair of numbers", repr(eigenvalue_range), remedy)
    check_number(f"{name}[0]", low)
    if high != torch.inf:
        check_number(f"{name}[1]", high)
    if not 0 <= low < high:
        fail(ValueError, name, "must ascend and not be negative", (low, high), remedy)
    return float(low), float(high)


def locate(v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return which of (paths, m, m) have all eigenvalues in (low, high), and which do not above.

    All of them exceed ``low`` if V - low I has a Cholesky factor. A matrix that is not finite
    counts as above.
    """
    v = v.double()
    identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    size = v.diagonal(dim1=-2, dim2=-1).sum(-1)
    is_above = ~v.sum((-2, -1)).isfinite()
    is_large = ~(size <= high) & ~is_above  # the trace bounds the largest eigenvalue
    if is_large.any():
        is_above[is_large] = torch.linalg.cholesky_ex(high * identity - v[is_large]).info != 0
    is_inside = ~is_above
    if low > 0:
        is_inside &= torch.linalg.cholesky_ex(v - low * identity).info == 0
    return is_inside, is_above
