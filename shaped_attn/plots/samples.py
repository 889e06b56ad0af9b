"""What the figures of `CovarianceSample` share: arguments, names, and how each sample looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..checks import check_kind, check_not_empty, fail
from ..sde.sample import CovarianceSample
from . import style

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

    @property
    def line(self) -> dict[str, Any]:
        """How a line looks: told apart from others of its kind without colours too."""
        return {"color": style.color(self.index), "linestyle": style.dashes(self.rank)}

    @property
    def points(self) -> dict[str, Any]:
        """How points with error bars look."""
        look = {"color": style.color(self.index), "fmt": style.marker(self.index), "zorder": 3}
        return {"label": self.name, **look, **style.POINTS}


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


def check_named(argument: str, values: Mapping, kind: type, makers: str) -> None:
    """Raise the TypeError or ValueError of what does not map names to at least one of a class."""
    check_kind(argument, values, Mapping, f'Give for example {{"a name": ...}}. {makers}')
    for name, value in check_not_empty(argument, values).items():
        check_kind(f"{argument}[{name!r}]", value, kind, makers)


def check_samples(samples: Mapping[str, CovarianceSample]) -> None:
    """Raise the TypeError or ValueError of a figure without samples that have a path."""
    makers = "CovarianceSDE.sample and FiniteNetwork.sample return one."
    check_named("samples", samples, CovarianceSample, makers)
    for name, sample in samples.items():
        if sample.paths == 0:
            rule = "must have at least one path"
            remedy = "A simulation that was interrupted too early has none; let it run longer."
            fail(ValueError, f"samples[{name!r}]", rule, "none", remedy)


def find(
    samples: Mapping[str, CovarianceSample], statistics: Sequence[str], *, last_only: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics, each (K, paths) by the name of its sample."""
    check_samples(samples)
    if isinstance(statistics, str):
        remedy = f"Write ({statistics!r},)."
        fail(TypeError, "statistics", "must be a sequence of names", repr(statistics), remedy)
    check_not_empty("statistics", statistics)
    found: dict[str, dict[str, Tensor]] = {statistic: {} for statistic in statistics}
    for name, sample in samples.items():
        known = (sample.at(-1) if last_only else sample).statistics()
        for statistic in statistics:
            if statistic not in known:
                names = [*list(known)[:6], "..."] if len(known) > 6 else list(known)
                rule = f"must be among those of samples[{name!r}], {', '.join(names)}"
                remedy = f"It has {sample.tokens} tokens, counted from 1."
                fail(ValueError, "statistics", rule, repr(statistic), remedy)
            found[statistic][name] = known[statistic]
    return found
