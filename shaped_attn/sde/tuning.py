"""Which branch gain, and which tau0, keep the correlation of tokens in a band through depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_numbers, fail
from .sample import Estimate, mean_correlation, median, plain

if TYPE_CHECKING:
    from .process import CovarianceSDE

BRANCH_GAINS = (0.05, 1.0)
TAU0S = (0.1, 10.0)

# Distance of two branch gains that are told apart, and of two tau0 in steps to a decade. The coarse
# scan takes every so many of them.
_GAIN_STEP, _GAIN_SCAN = 0.01, 10
_TAU0_STEPS, _TAU0_SCAN = 48, 8

_CHUNK = 4096  # paths at a time


@dataclass(frozen=True)
class Candidate:
    """One pair of branch gain and tau0, and what it leads to at the end of depth.

    Attributes:
        branch_gain: weight of each branch.
        tau0: temperature.
        correlation: the median over paths of `mean_correlation`.
        blow_up: the fraction of paths that left the admissible eigenvalues at the upper end.
    """

    branch_gain: float
    tau0: float
    correlation: Estimate
    blow_up: Estimate


@dataclass(frozen=True)
class End:
    """One end of an interval.

    Attributes:
        candidate: the last value that was found to keep the median in the band.
        outside: the value next to it that was found not to; None if none was tried.
        is_search_limit: whether the interval ends because the search range does.
    """

    candidate: Candidate
    outside: float | None
    is_search_limit: bool


@dataclass(frozen=True)
class Interval:
    """The values of one parameter that keep the median correlation in the band.

    Where several intervals do, this is the one with the most conservative value: the smallest
    branch gain, or the largest tau0.

    Attributes:
        parameter: "branch_gain" or "tau0".
        low, high: its ends; None if no value in the search range was found to do it.
        search_range: least and largest value that the search may try.
        resolution: an end is followed to this difference (branch gain) or ratio (tau0).
        candidates: all that was tried, ascending in the parameter.
        nearest: the candidate whose median is nearest to the band; None if nothing was tried.
        is_complete: False if the search was stopped: the ends are then only as far as it came.
    """

    parameter: str
    low: End | None
    high: End | None
    search_range: tuple[float, float]
    resolution: float
    candidates: tuple[Candidate, ...]
    nearest: Candidate | None
    is_complete: bool

    @property
    def is_found(self) -> bool:
        """Whether a value that keeps the median in the band is known."""
        return self.low is not None


@dataclass(frozen=True)
class Tuning:
    """What `tune` returns.

    Attributes:
        branch_gain: the branch gains that keep the median in the band at the given tau0.
        tau0: the same of tau0 at the given branch gain; None without attention, where nothing
            depends on it, or if the search was stopped before it.
        band: least and largest admissible median correlation.
        time: depth / width at which it is judged.
        paths, steps, seed: of every candidate.
        is_complete: False if the search was stopped.
    """

    branch_gain: Interval
    tau0: Interval | None
    band: tuple[float, float]
    time: float
    paths: int
    steps: int
    seed: int
    is_complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        found = plain(self)
        for name in ("branch_gain", "tau0"):
            interval = getattr(self, name)
            if interval is not None:
                found[name]["is_found"] = interval.is_found
        return found


def tune(
    sde: CovarianceSDE,
    v0: Tensor,
    *,
    time: float = 1.0,
    band: tuple[float, float],
    paths: int = 1024,
    steps: int = 64,
    seed: int = 0,
    branch_gains: tuple[float, float] = BRANCH_GAINS,
    tau0s: tuple[float, float] = TAU0S,
    on_progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **sampling: Any,
) -> Tuning:
    """Find the branch gains, and the tau0, that keep the median correlation in a band.

    The correlation of a path is the mean of rho_ij over all pairs of tokens, at the end of depth or
    where the path stopped; its median is over all paths. Everything else of ``sde`` stays as it is,
    but the skip gain follows the branch gain.

    Each parameter is searched on its own while the other one stays at the value of ``sde``. First
    comes a coarse scan of the whole search range, which does not assume that the median rises or
    falls steadily; then the crossings of the band's ends are bisected. A crossing out of the band
    and back between two neighbours of the scan goes unseen. All candidates use the same seed. Still
    an end has the uncertainty that its median's standard error implies.

    Args:
        sde: the process; its branch gain and tau0 are the ones given.
        v0: (m, m) the covariance at the start, m at least 2.
        time: depth / width. Default 1.0.
        band: least and largest admissible median correlation.
        paths, steps: of each candidate. Defaults 1024 and 64.
        seed: of each candidate's generator. Default 0.
        branch_gains: search range, in steps of 0.01. Default 0.05 to 1.
        tau0s: search range, in 48 steps to a decade. Default 0.1 to 10.
        on_progress: called with the candidates done, and an upper bound of how many there will be.
        stop: asked between steps; if it returns True, the candidate in work is dropped and the
            result has ``is_complete`` False.
        **sampling: further arguments of ``sde.sample``, such as ``integrator``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.
    """
    band = check_band(band, tokens=v0.shape[-1])
    most = 1.0
    if sde.attention and sde.identity_gain:
        most = min(1.0, 1 / abs(sde.identity_gain))
    low, high = _check_range("branch_gains", branch_gains, 1.0)
    gains = _rungs("branch_gains", low, min(high, most), round(1 / _GAIN_STEP))
    low, high = _check_range("tau0s", tau0s, math.inf)
    temperatures = _rungs("tau0s", math.log10(low), math.log10(high), _TAU0_STEPS)
    # Rounded to three digits, so that they print as what they are.
    temperatures = [float(f"{10**exponent:.3g}") for exponent in temperatures]

    def evaluate(**change: Any) -> Candidate:
        nonlocal done
        variant = replace(sde, skip_gain=None, **change)
        sample = variant.sample(
            v0,
            time,
            paths,
            steps,
            torch.Generator(v0.device).manual_seed(seed),
            snapshots=2,
            stop=stop,
            **{"chunk": _CHUNK, **sampling},
        )
        if not sample.is_complete:
            raise _Stopped
        done += 1
        if on_progress is not None:
            on_progress(done, total)
        correlation = median(mean_correlation(sample.final))
        blow_up = sample.exploded_fraction()
        return Candidate(variant.branch_gain, variant.tau0, correlation, blow_up)

    # The most conservative value first.
    searches = [_Search("branch_gain", gains, _GAIN_SCAN, _GAIN_STEP, band, evaluate)]
    if sde.attention:
        ratio = 10 ** (1 / _TAU0_STEPS)
        searches.append(_Search("tau0", temperatures[::-1], _TAU0_SCAN, ratio, band, evaluate))
    done, total = 0, sum(search.most for search in searches)
    intervals: list[Interval] = []
    for search in searches:
        intervals.append(search.run())
        if not intervals[-1].is_complete:
            break
    is_complete = intervals[-1].is_complete
    if is_complete and on_progress is not None:
        on_progress(total, total)
    tau0 = intervals[1] if len(intervals) > 1 else None
    return Tuning(intervals[0], tau0, band, float(time), paths, steps, seed, is_complete)


class _Stopped(Exception):
    """The candidate in work was dropped."""


class _Search:
    """Finds which of ascending or descending values, the rungs, are inside of the band."""

    def __init__(
        self,
        parameter: str,
        rungs: Sequence[float],
        scan: int,
        resolution: float,
        band: tuple[float, float],
        evaluate: Callable[..., Candidate],
    ) -> None:
        self.parameter, self.rungs, self.resolution = parameter, rungs, resolution
        self.band, self.evaluate = band, evaluate
        last = len(rungs) - 1
        self.scan = [*range(0, last, scan), last]
        self.most = len(self.scan) + 2 * math.ceil(math.log2(scan))
        self.found: dict[int, Candidate] = {}

    def run(self) -> Interval:
        try:
            for index in self.scan:
                self._side(index)
            # Two neighbours on different sides: the median passes through the band in between.
            for before, index in pairwise(self.scan):
                if index < min(self._inside(), default=len(self.rungs)):
                    self._narrow(before, index)
            for direction in (-1, 1) if self._inside() else ():
                self._narrow(*self._run_end(direction))
        except _Stopped:
            return self._interval(is_complete=False)
        return self._interval(is_complete=True)

    def _side(self, index: int) -> int:
        """-1 below the band, 0 inside, 1 above."""
        if index not in self.found:
            self.found[index] = self.evaluate(**{self.parameter: self.rungs[index]})
        value = self.found[index].correlation.value
        return (value > self.band[1]) - (value < self.band[0])

    def _distance(self, candidate: Candidate) -> float:
        """Return how far the median is from the band."""
        value = candidate.correlation.value
        return max(self.band[0] - value, value - self.band[1], 0.0)

    def _inside(self) -> list[int]:
        """Return the indices inside the band, of those tried."""
        return [index for index in sorted(self.found) if self._side(index) == 0]

    def _narrow(self, first: int, second: int | None) -> None:
        """Bisect until neighbours differ in their side, as ``first`` and ``second`` may do."""
        if second is None or self._side(first) == self._side(second):
            return
        while abs(second - first) > 1:
            middle = (first + second) // 2
            if self._side(middle) == self._side(first):
                first = middle
            else:
                second = middle

    def _run_end(self, direction: int) -> tuple[int, int | None]:
        """Return the last index of the first run inside, of those tried, and the next one tried."""
        inside = first = self._inside()[0]
        for index in sorted(self.found, reverse=direction < 0):
            if (index - first) * direction <= 0:
                continue
            if self._side(index) != 0:
                return inside, index
            inside = index
        return inside, None

    def _interval(self, *, is_complete: bool) -> Interval:
        rungs = self.rungs
        ends: list[End | None] = [None, None]
        if self._inside():
            for place, (direction, last) in enumerate(((-1, 0), (1, len(rungs) - 1))):
                index, outside = self._run_end(direction)
                outside = None if outside is None else rungs[outside]
                ends[place] = End(self.found[index], outside, index == last)
        candidates = [self.found[index] for index in sorted(self.found)]
        if rungs[0] > rungs[-1]:
            ends, candidates = ends[::-1], candidates[::-1]
        return Interval(
            self.parameter,
            *ends,
            (min(rungs), max(rungs)),
            self.resolution,
            tuple(candidates),
            min(candidates, key=self._distance, default=None),
            is_complete,
        )


def _check_range(name: str, value: tuple[float, float], most: float) -> tuple[float, float]:
    low, high = check_numbers(name, value, 2)
    if not 0 < low < high <= most:
        limits = "be positive" if most == math.inf else f"lie in (0, {most:g}]"
        got, remedy = (low, high), "Give another search range."
        fail(ValueError, name, f"must ascend and {limits}", got, remedy)
    return low, high


def _rungs(name: str, low: float, high: float, steps: int) -> list[float]:
    """Return the multiples of 1 / steps from ``low`` to ``high``, at least two of them."""
    first, last = math.ceil(low * steps - 1e-9), math.floor(high * steps + 1e-9)
    if last <= first:
        rule, got = "must hold at least two values to try", f"{max(0, last - first + 1)} of them"
        remedy = "Search a wider range; branch_gain times identity_gain is at most 1."
        fail(ValueError, name, rule, got, remedy)
    return [k / steps for k in range(first, last + 1)]


def check_band(band: tuple[float, float], tokens: int) -> tuple[float, float]:
    """Check and unpack a band of mean correlations of that many tokens."""
    low, high = check_numbers("band", band, 2)
    if tokens < 2:
        fail(ValueError, "band", "needs at least 2 tokens", tokens, "One token has no correlation.")
    least = -1 / (tokens - 1)
    if not (least <= low < high <= 1):
        rule = (
            f"must ascend and lie in [{least:.3g}, 1], which is all that the mean correlation of "
            f"{tokens} tokens can be"
        )
        fail(ValueError, "band", rule, (low, high), "Give for example (0.1, 0.6).")
    return low, high
