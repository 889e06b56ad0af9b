"""What every simulation of the token covariance returns, whichever way it was simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import fail

LEVELS = (0.05, 0.5, 0.95)


class Estimate(NamedTuple):
    """A number found by simulation, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class CovarianceSample:
    """Paths of the token covariance V = X X^T / n over depth / width.

    A path that leaves the admissible eigenvalues is frozen: from then on it keeps the last
    admissible V. Compare medians and quantiles, not means: the attention branch has heavy tails.

    Attributes:
        source: "sde", "network" (real networks) or "chain" (the exact Markov chain of a width).
        times: (K,) float64, ascending, in units of depth / width; the first is 0.
        covariances: (K, paths, m, m) the covariance of m tokens, at each time.
        stop_times: (paths,) float64: when the path left the admissible eigenvalues, inf if never.
        exploded: (paths,) bool: whether it left them at the upper end, or was no longer finite.
        requested: how many paths were asked for; more than ``paths`` after an interruption.
    """

    source: str
    times: Tensor
    covariances: Tensor
    stop_times: Tensor
    exploded: Tensor
    requested: int

    @property
    def paths(self) -> int:
        """Number of paths, or of networks."""
        return self.covariances.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens m."""
        return self.covariances.shape[-1]

    @property
    def is_complete(self) -> bool:
        """Whether all requested paths are there."""
        return self.paths == self.requested

    @property
    def final(self) -> Tensor:
        """(paths, m, m) the covariance at the last time, frozen where stopped."""
        return self.covariances[-1]

    @property
    def stopped(self) -> Tensor:
        """(paths,) bool: whether the path was frozen."""
        return self.stop_times.isfinite()

    @property
    def collapsed(self) -> Tensor:
        """(paths,) bool: whether the path was frozen at the lower end of the eigenvalues."""
        return self.stopped & ~self.exploded

    def correlations(self) -> dict[str, Tensor]:
        """Return rho_ij = V_ij / sqrt(V_ii V_jj), i < j, each (K, paths), by names as "rho_12"."""
        scale = self.covariances.diagonal(dim1=-2, dim2=-1).rsqrt()
        rho = self.covariances * scale[..., :, None] * scale[..., None, :]
        return {
            statistic_name("rho", i + 1, j + 1, self.tokens): rho[..., i, j]
            for i in range(self.tokens)
            for j in range(i + 1, self.tokens)
        }

    def variances(self) -> dict[str, Tensor]:
        """Return V_ii, each (K, paths), by names as "V_11"."""
        return {
            statistic_name("V", i + 1, i + 1, self.tokens): self.covariances[..., i, i]
            for i in range(self.tokens)
        }

    def statistics(self) -> dict[str, Tensor]:
        """Return all correlations, then all variances."""
        return {**self.correlations(), **self.variances()}

    def quantiles(self, levels: Sequence[float] = LEVELS) -> dict[str, Tensor]:
        """Return the quantiles over paths of every statistic, each (K, levels), by its name."""
        _check_levels(levels, self.paths)
        return {name: quantile(values, levels) for name, values in self.statistics().items()}

    def quantile_errors(self, levels: Sequence[float] = LEVELS) -> dict[str, Tensor]:
        """Return the standard errors of `quantiles`, each (K, levels).

        The number of paths below a quantile is binomial. The error is half the distance between the
        order statistics one standard deviation of that number to either side, which assumes nothing
        about the law of the statistic.
        """
        _check_levels(levels, self.paths)
        return {name: quantile_error(values, levels) for name, values in self.statistics().items()}

    def stopped_fraction(self) -> Estimate:
        """Return the fraction of paths that were frozen."""
        return fraction(self.stopped)

    def exploded_fraction(self) -> Estimate:
        """Return the fraction of paths that were frozen at the upper end: the blow-ups."""
        return fraction(self.exploded)

    def at(self, index: int) -> CovarianceSample:
        """Return the sample with only the time ``times[index]``."""
        index = range(len(self.times))[index]
        one = slice(index, index + 1)
        return replace(self, times=self.times[one], covariances=self.covariances[one])

    def of_paths(self, begin: int, end: int) -> CovarianceSample:
        """Return the sample of paths ``begin`` to ``end`` - 1, which shares this one's memory."""
        return replace(
            self,
            covariances=self.covariances[:, begin:end],
            stop_times=self.stop_times[begin:end],
            exploded=self.exploded[begin:end],
        )


def statistic_name(symbol: str, i: int, j: int, tokens: int) -> str:
    """Return the name of an entry, counted from 1: "rho_12", from ten tokens on "rho_1_2"."""
    return f"{symbol}_{i}{'' if tokens < 10 else '_'}{j}"


def mean_correlation(v: Tensor) -> Tensor:
    """Return the mean over pairs i < j of rho_ij, (...), of V (..., m, m)."""
    tokens = v.shape[-1]
    scale = v.diagonal(dim1=-2, dim2=-1).rsqrt()  # (..., m)
    total = (scale * (v @ scale[..., None])[..., 0]).sum(-1)
    return (total - tokens) / (tokens * (tokens - 1))


def quantile(values: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the quantiles of (..., paths) as (..., levels), interpolated between neighbours."""
    ordered = values.double().sort(dim=-1).values
    position = torch.tensor(levels, dtype=torch.float64, device=values.device)
    position = position * (ordered.shape[-1] - 1)
    low = position.floor().long()
    high = position.ceil().long()
    return torch.lerp(ordered[..., low], ordered[..., high], position - low)


def quantile_error(values: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the standard errors of `quantile`, (..., levels); see `quantile_errors`."""
    count = values.shape[-1]
    ordered = values.double().sort(dim=-1).values
    errors = []
    for level in levels:
        deviation = math.sqrt(count * level * (1 - level))
        low = max(0, math.floor(level * (count - 1) - deviation))
        high = min(count - 1, math.ceil(level * (count - 1) + deviation))
        errors.append((ordered[..., high] - ordered[..., low]) / 2)
    return torch.stack(errors, dim=-1)


def median(values: Tensor) -> Estimate:
    """Return the median of (paths,) and its standard error."""
    return Estimate(*(float(f(values, (0.5,))) for f in (quantile, quantile_error)))


def fraction(is_true: Tensor) -> Estimate:
    """Return the fraction of (paths,) that is True.

    Half a hit is added to both outcomes in its standard error, so that it is not 0 at 0 and 1.
    """
    count = is_true.numel()
    if count == 0:
        return Estimate(math.nan, math.nan)
    hits = int(is_true.sum())
    p = (hits + 0.5) / (count + 1)
    return Estimate(hits / count, math.sqrt(p * (1 - p) / (count + 1)))


def plain(value: Any) -> Any:
    """Return nested data as JSON has it.

    What has fields becomes a dict, a tuple or a Tensor a list, and NaN and infinity strings.
    """
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _check_levels(levels: Sequence[float], paths: int) -> None:
    if not levels or not all(0 <= level <= 1 for level in levels):
        remedy = "Give for example (0.05, 0.5, 0.95)."
        fail(ValueError, "levels", "must be numbers from 0 to 1", list(levels), remedy)
    if paths == 0:
        got = "a sample that was interrupted before its first"
        remedy = "Let the simulation run longer, or ask for fewer paths."
        fail(ValueError, "quantiles", "need at least one path", got, remedy)
