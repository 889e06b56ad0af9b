"""What the figures of `CovarianceSample` share: arguments, names, and how each sample looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..checks import fail
from ..sde.sample import CovarianceSample

DEPTH = "depth / width"


class Series(NamedTuple):
    """A sample and how it looks."""

    name: str
    sample: CovarianceSample
    index: int  # among all samples
    rank: int  # among those of its kind, predictions or networks
    peers: int  # how many of its kind there are

    @property
    def is_prediction(self) -> bool:
        """Whether it is of the SDE rather than of networks."""
        return self.sample.source == "sde"


def series_of(samples: Mapping[str, CovarianceSample]) -> list[Series]:
    """Return the samples, each with its place among all and among its kind."""
    kinds = [sample.source == "sde" for sample in samples.values()]
    return [
        Series(name, sample, index, kinds[:index].count(kinds[index]), kinds.count(kinds[index]))
        for index, (name, sample) in enumerate(samples.items())
    ]


def is_variance(statistic: str) -> bool:
    """Whether it is a variance, which has a logarithmic axis, rather than a correlation."""
    return statistic.startswith("V")


def label(statistic: str, is_math: bool = True) -> str:
    """Return "correlation rho_12" or "variance V_11", typeset."""
    symbol, _, indices = statistic.partition("_")
    kind = "variance" if is_variance(statistic) else "correlation"
    if not is_math:
        return f"{kind} {statistic}"
    symbol = symbol if is_variance(statistic) else rf"\{symbol}"
    return rf"{kind} ${symbol}_{{{indices.replace('_', ',')}}}$"


def describe(levels: tuple[float, float, float]) -> str:
    """Return what the legend says of the quantiles."""
    low, middle, high = (f"{100 * level:.4g}" for level in levels)
    middle = "median" if levels[1] == 0.5 else f"{middle} % quantile"
    return f"{middle}, and {low} to {high} % of paths"


def array(values: Tensor) -> np.ndarray:
    """Return the values for matplotlib."""
    return values.detach().cpu().numpy()


def check_samples(samples: Mapping[str, CovarianceSample]) -> None:
    """Raise the TypeError or ValueError of a figure without samples that have a path."""
    if not isinstance(samples, Mapping):
        fail(
            TypeError,
            "samples",
            "must be a mapping from names to samples",
            type(samples).__name__,
            'Give for example {"prediction": sample}.',
        )
    if not samples:
        fail(ValueError, "samples", "must not be empty", "none", "Give at least one sample.")
    for name, sample in samples.items():
        if not isinstance(sample, CovarianceSample):
            fail(
                TypeError,
                f"samples[{name!r}]",
                "must be a CovarianceSample",
                type(sample).__name__,
                "CovarianceSDE.sample and FiniteNetwork.sample return one.",
            )
        if sample.paths == 0:
            fail(
                ValueError,
                f"samples[{name!r}]",
                "must have at least one path",
                "none",
                "A simulation that was interrupted too early has none; let it run longer.",
            )


def find(
    samples: Mapping[str, CovarianceSample], statistics: Sequence[str], *, last_only: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics, each (K, paths) by the name of its sample."""
    check_samples(samples)
    if isinstance(statistics, str):
        fail(
            TypeError,
            "statistics",
            "must be a sequence of names",
            repr(statistics),
            f"Write ({statistics!r},).",
        )
    if not statistics:
        fail(ValueError, "statistics", "must not be empty", "none", "Give at least one name.")
    found: dict[str, dict[str, Tensor]] = {statistic: {} for statistic in statistics}
    for name, sample in samples.items():
        known = (sample.at(-1) if last_only else sample).statistics()
        for statistic in statistics:
            if statistic not in known:
                names = [*list(known)[:6], "..."] if len(known) > 6 else list(known)
                fail(
                    ValueError,
                    "statistics",
                    f"must be among those of samples[{name!r}], {', '.join(names)}",
                    repr(statistic),
                    f"It has {sample.tokens} tokens, counted from 1.",
                )
            found[statistic][name] = known[statistic]
    return found
