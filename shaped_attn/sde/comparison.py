"""Whether two samples of the token covariance have one law at the end of their depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_kind, check_number, fail
from .sample import LEVELS, CovarianceSample, Estimate, plain, quantile, quantile_error

_TIME_TOLERANCE = 1e-6  # relative; depths and widths are whole numbers, so others differ by more


@dataclass(frozen=True)
class StatisticComparison:
    """One correlation or variance of two samples. Pairs are (first, second).

    Attributes:
        name: "rho_12" is the correlation of tokens 1 and 2, "V_11" the variance of token 1.
        ks: the largest distance between the two empirical distribution functions, from 0 to 1.
            NaN where neither sample has a finite value.
        critical: what ``ks`` exceeds by chance, at the corrected level.
        uncorrected_critical: the same if this were the only statistic.
        quantiles: of both samples at `Comparison.quantile_levels`; NaN or infinite where one falls
            on values that are not finite.
        quantile_errors: their standard errors.
        not_finite: number of paths whose value is NaN or infinite.
    """

    name: str
    ks: float
    critical: float
    uncorrected_critical: float
    quantiles: tuple[tuple[float, ...], tuple[float, ...]]
    quantile_errors: tuple[tuple[float, ...], tuple[float, ...]]
    not_finite: tuple[int, int]

    @property
    def ratio(self) -> float:
        """``ks`` in units of the critical value."""
        return self.ks / self.critical

    @property
    def agrees(self) -> bool:
        """Whether ``ks`` is below the critical value; False where it is NaN."""
        return self.ks < self.critical


@dataclass(frozen=True)
class FractionComparison:
    """The fraction of paths to which something happened, in two samples."""

    first: Estimate
    second: Estimate

    @property
    def difference(self) -> Estimate:
        """First minus second."""
        return Estimate(
            self.first.value - self.second.value,
            math.hypot(self.first.standard_error, self.second.standard_error),
        )

    @property
    def z_score(self) -> float:
        """The difference in units of its standard error; beyond 3 it is hardly chance."""
        difference = self.difference
        return difference.value / difference.standard_error


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Pairs are (first, second).

    Attributes:
        sources: what was compared, as in `CovarianceSample`.
        paths: numbers of paths.
        requested: numbers of paths asked for; more than ``paths`` after an interruption.
        tokens: m.
        time: the last time, where the laws are compared, in depth / width.
        level: probability that samples of one law disagree somewhere.
        critical: critical value of all KS statistics at ``level``, corrected for their number.
        uncorrected_critical: critical value of one KS statistic alone.
        quantile_levels: of the quantiles in ``statistics``.
        statistics: by name; correlations, then variances.
        stopped: fractions of paths that were frozen.
        exploded: fractions of paths that were frozen at the upper end.
    """

    sources: tuple[str, str]
    paths: tuple[int, int]
    requested: tuple[int, int]
    tokens: int
    time: float
    level: float
    critical: float
    uncorrected_critical: float
    quantile_levels: tuple[float, ...]
    statistics: dict[str, StatisticComparison]
    stopped: FractionComparison
    exploded: FractionComparison

    @property
    def largest(self) -> StatisticComparison:
        """The statistic with the largest KS in units of its critical value, NaN above all."""
        return max(
            self.statistics.values(),
            key=lambda statistic: math.inf if math.isnan(statistic.ks) else statistic.ratio,
        )

    @property
    def agrees(self) -> bool:
        """Whether every KS is below its critical value.

        It means that these numbers of paths do not tell the two laws apart. Look at `can_disagree`
        if they are few.
        """
        return all(statistic.agrees for statistic in self.statistics.values())

    @property
    def can_disagree(self) -> bool:
        """Whether there are enough paths: a KS statistic is at most 1."""
        return self.critical < 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that JSON lacks (NaN, infinity) become strings."""
        found = plain(self)
        for name, statistic in self.statistics.items():
            found["statistics"][name].update(ratio=plain(statistic.ratio), agrees=statistic.agrees)
        for name in ("stopped", "exploded"):
            pair: FractionComparison = getattr(self, name)
            found[name].update(difference=plain(pair.difference), z_score=plain(pair.z_score))
        found.update(largest=self.largest.name, agrees=self.agrees, can_disagree=self.can_disagree)
        return found


def compare(first: CovarianceSample, second: CovarianceSample, level: float = 0.01) -> Comparison:
    """Compare every correlation and variance of two samples at their last time.

    Two-sample Kolmogorov-Smirnov tests, with the critical value:

        sqrt(-log(alpha / 2) / 2) sqrt(1/N1 + 1/N2),      alpha = level / (number of statistics)

    for N1 and N2 paths. Dividing by the number of statistics (Bonferroni) makes ``level`` a bound
    on the probability that samples of one law disagree in any of them. Frozen paths take part with
    their last admissible V.

    A value that is NaN or infinite is an outcome like any other: infinities are where they belong,
    NaN is above all numbers. So all paths count, and two laws agree only if they give such values
    equally often. The tests are meant for continuous laws; one that is a single point, as at
    ``branch_gain=0``, shows the rounding of the two simulations.

    Args:
        first, second: samples of the same number of tokens up to the same depth / width.
        level: probability of finding a difference between samples of one law, between 0 and 1.
            Default 0.01.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a sample has no path, the samples differ in tokens or last time, or the level is
            out of its range.
    """
    _check(first, second, level)
    # The last time alone: statistics of all times take as much memory as the sample.
    finals = [sample.at(-1).statistics() for sample in (first, second)]
    paths = (first.paths, second.paths)
    critical = critical_value(level / len(finals[0]), *paths)
    uncorrected = critical_value(level, *paths)
    statistics = {
        name: _compare_statistic(
            name, (finals[0][name][0], finals[1][name][0]), critical, uncorrected
        )
        for name in finals[0]
    }
    return Comparison(
        sources=(first.source, second.source),
        paths=paths,
        requested=(first.requested, second.requested),
        tokens=first.tokens,
        time=float(first.times[-1]),
        level=float(level),
        critical=critical,
        uncorrected_critical=uncorrected,
        quantile_levels=LEVELS,
        statistics=statistics,
        stopped=FractionComparison(first.stopped_fraction(), second.stopped_fraction()),
        exploded=FractionComparison(first.exploded_fraction(), second.exploded_fraction()),
    )


def critical_value(level: float, first_paths: int, second_paths: int) -> float:
    """Return what the KS statistic of two samples of one law exceeds with probability ``level``.

    The leading term of its limit law for many paths.
    """
    return math.sqrt(-math.log(level / 2) / 2) * math.sqrt(1 / first_paths + 1 / second_paths)


def _compare_statistic(
    name: str, values: tuple[Tensor, Tensor], critical: float, uncorrected: float
) -> StatisticComparison:
    not_finite = tuple(int((~value.isfinite()).sum()) for value in values)
    is_empty = all(count == len(value) for count, value in zip(not_finite, values, strict=True))
    return StatisticComparison(
        name=name,
        ks=math.nan if is_empty else _ks(*map(_ordered, values)),  # 0 would say that they agree
        critical=critical,
        uncorrected_critical=uncorrected,
        quantiles=tuple(tuple(quantile(value, LEVELS).tolist()) for value in values),
        quantile_errors=tuple(tuple(quantile_error(value, LEVELS).tolist()) for value in values),
        not_finite=not_finite,
    )


def _ks(first: Tensor, second: Tensor) -> float:
    """Return the largest distance between the distribution functions of two ordered samples."""
    both = torch.cat((first, second))
    below = [torch.searchsorted(x, both, right=True).double() / len(x) for x in (first, second)]
    return float((below[0] - below[1]).abs().max())


def _ordered(values: Tensor) -> Tensor:
    """Return values in ascending order, with a number above all others in place of NaN."""
    largest = torch.finfo(torch.float64).max
    values = values.detach().cpu().double()
    return values.nan_to_num(nan=math.inf, posinf=largest, neginf=-largest).sort().values


def _check(first: CovarianceSample, second: CovarianceSample, level: float) -> None:
    for name, sample in (("first", first), ("second", second)):
        check_kind(name, sample, CovarianceSample, "The methods `sample` return one.")
        if sample.paths == 0 or len(sample.times) == 0:
            got = f"{sample.paths} paths, {len(sample.times)} times"
            remedy = "A simulation that was interrupted too early has no path; let it run longer."
            fail(ValueError, name, "must have at least one path and one time", got, remedy)
    if first.tokens != second.tokens:
        rule, got = "must have the same number of tokens", f"{first.tokens} and {second.tokens}"
        fail(ValueError, "first and second", rule, got, "Simulate both from the same v0.")
    times = float(first.times[-1]), float(second.times[-1])
    if not math.isclose(*times, rel_tol=_TIME_TOLERANCE):
        rule, got = "must end at the same depth / width", f"{times[0]:.9g} and {times[1]:.9g}"
        remedy = "Simulate the SDE up to time = depth / width of the network."
        fail(ValueError, "first and second", rule, got, remedy)
    check_number("level", level)
    if not 0 < level < 1:
        fail(ValueError, "level", "must be between 0 and 1", level, "The default is 0.01.")
