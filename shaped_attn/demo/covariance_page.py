"""The section of the demo's page on the covariance of tokens: predicted and measured."""

from __future__ import annotations

import html
from collections.abc import Sequence

from torch import Tensor

from ..sde import Comparison, CovarianceSample, Estimate, StatisticComparison
from ..sde.paths import EIGENVALUE_RANGE
from ..commands.common import format_estimate, format_number
from ..commands.predict import _format_statistic as format_statistic
from . import figures
from .covariance import CORRELATION, VARIANCE, CovarianceResult

_MARKERS = 17  # about as many that a chart has room for
_PARALLEL = 0.01  # median 1 - rho below which tokens are called parallel


def section(result: CovarianceResult) -> str:
    """Return the section; after an interruption it shows what there is."""
    if not result.prediction.paths:
        return f"""<section>
<h2>{_TITLE}</h2>
<p>Interrupted before the first path was finished: there is nothing to show.</p>
</section>"""
    return f"""<section>
<h2>{_TITLE}</h2>
{_introduction(result)}
{_legend(result)}
<div class="charts">{_correlation_chart(result)}{_variance_chart(result)}</div>
<p class="note">Over depth, in units of the width: medians and the range from 5 to 95 % of all
{"paths and networks" if result.networks.paths else "paths"}.</p>
{_verdict(result)}
{_plain_text(result)}
{_tables(result)}
</section>"""


_TITLE = "What depth does to tokens, predicted and measured"


def _introduction(result: CovarianceResult) -> str:
    config = result.config
    return f"""<p>Before training, the covariance of the tokens, V = X X<sup>T</sup> / n, changes at
random from block to block. When depth and width n grow together, it follows a stochastic
differential equation, which has no weights in it (arXiv 2306.17759). Here the equation predicts V,
and real networks are run beside it: width {config.width}, {config.depth} blocks of shaped
attention (one head) and a shaped MLP, every weight drawn, branch gain {config.branch_gain:g},
τ<sub>0</sub> = {config.tau0:g}. They start from {config.tokens} tokens of variance 1, any two of
correlation {config.correlation:g}.</p>"""


def _legend(result: CovarianceResult) -> str:
    marks = [f'<i class="shaped band"></i>predicted, {_count(result.prediction, "paths")}']
    if result.networks.paths:
        marks.append(
            f'<i class="ink dots"></i><i class="ink dashed"></i>{_count(result.networks)}, shaped'
        )
    if result.plain.paths:
        marks.append(
            '<i class="plain"></i><i class="plain dashed"></i>'
            f"{_count(result.plain)}, plain attention"
        )
    return f'<div class="legend">{"".join(f"<span>{mark}</span>" for mark in marks)}</div>'


def _count(sample: CovarianceSample, noun: str = "networks") -> str:
    if sample.is_complete:
        return f"{sample.paths:,} {noun}"
    return f"{sample.paths:,} of {sample.requested:,} {noun}"


def _correlation_chart(result: CovarianceResult) -> str:
    bands, lines = _drawn(result, CORRELATION)
    if result.plain.paths:
        low, middle, high = _curves(result.plain, CORRELATION)
        lines += [
            figures.Line(low, "plain", width=1.3, dashed=True),
            figures.Line(high, "plain", width=1.3, dashed=True),
            figures.Line(middle, "plain"),
        ]
    svg = figures.line_chart(
        lines,
        bands=bands,
        title="Correlation of two tokens over depth, predicted and measured",
        x_label="depth / width",
        y_label="correlation of tokens 1 and 2",
        y_range=(-1.04, 1.04),
    )
    return f"<figure><b>Correlation</b>{svg}</figure>"


def _variance_chart(result: CovarianceResult) -> str:
    bands, lines = _drawn(result, VARIANCE)
    svg = figures.line_chart(
        lines,
        bands=bands,
        title="Variance of a token over depth, predicted and measured",
        x_label="depth / width",
        y_label="variance of token 1",
        y_log=True,
    )
    return f"<figure><b>Variance</b>{svg}</figure>"


def _drawn(result: CovarianceResult, name: str) -> tuple[list[figures.Band], list[figures.Line]]:
    low, middle, high = _curves(result.prediction, name)
    edges = [(x, lower, upper) for (x, lower), (_, upper) in zip(low, high, strict=True)]
    lines = [figures.Line(middle, "shaped")]
    if result.networks.paths:
        low, middle, high = _curves(result.networks, name)
        stride = max(1, round((len(middle) - 1) / (_MARKERS - 1)))
        lines += [
            figures.Line(low, "ink", width=1.3, dashed=True),
            figures.Line(high, "ink", width=1.3, dashed=True),
            figures.Line(middle[::stride], "ink", joined=False),
        ]
    return [figures.Band(edges, "shaped")], lines


def _curves(sample: CovarianceSample, name: str) -> list[list[tuple[float, float]]]:
    """The lower, middle and upper quantile of a statistic, each as points over depth / width."""
    quantiles: Tensor = sample.quantiles()[name]
    times = sample.times.tolist()
    return [list(zip(times, column.tolist(), strict=True)) for column in quantiles.unbind(-1)]


def _verdict(result: CovarianceResult) -> str:
    comparison = result.comparison
    if comparison is None:
        return "<p>Interrupted before the first networks were finished.</p>"
    largest, networks = comparison.largest, _count(result.networks)
    statistics = comparison.statistics.values()
    failed = [statistic for statistic in statistics if not statistic.agrees]
    if result.agrees is None:
        return (
            f"<p>{networks} are too few to tell: no Kolmogorov-Smirnov distance can exceed its "
            "critical value.</p>"
        )
    if not failed:
        return (
            f"<p>At the last block {networks} cannot be told from the prediction: none of the "
            f"{len(statistics)} Kolmogorov-Smirnov distances exceeds its critical value; that of "
            f"{_symbol(largest.name)} comes nearest, {largest.ratio:.2f} of it.</p>"
        )
    return (
        f'<p><b class="bad">The networks disagree with the prediction:</b> {len(failed)} of '
        f"{len(statistics)} Kolmogorov-Smirnov distances exceed their critical value, that of "
        f"{_symbol(largest.name)} most, {largest.ratio:.2f} times. The equation is the limit of "
        f"large width and depth, and these networks, {networks}, have width "
        f"{result.config.width}.</p>"
    )


def _plain_text(result: CovarianceResult) -> str:
    plain, shaped = result.distance_from_one("plain"), result.distance_from_one("networks")
    if plain is None:
        return ""
    outcome = ""
    if plain[1] < _PARALLEL:
        outcome = "the tokens become parallel, and V approaches rank one: "
    against = ""
    if shaped is not None:
        against = f", against {_range(shaped)} with shaped attention"
    return (
        '<p>With <b class="plain">plain</b> attention in otherwise the same blocks (gains 0, 1, 0 '
        f"and logits divided by √n<sub>k</sub>) {outcome}the median of 1 − ρ<sub>12</sub> at the "
        f"last block is {_range(plain)}{against}.</p>"
    )


def _range(quantiles: Sequence[float]) -> str:
    low, middle, high = map(format_number, quantiles)
    return f"{middle} (5 to 95 %: {low} to {high})"


def _tables(result: CovarianceResult) -> str:
    comparison = result.comparison
    if comparison is None:
        return ""
    low, high = EIGENVALUE_RANGE
    shown = [comparison.statistics[name] for name in (CORRELATION, VARIANCE)]
    others = _table(list(comparison.statistics.values()), "")
    return f"""{_table(shown, _stopped_row(comparison))}
<p class="note">At depth / width = {comparison.time:g}; ± is the standard error. KS is the
Kolmogorov-Smirnov distance, the largest difference between the two distribution functions. If the
laws were equal, at most {comparison.level:.0%} of all runs would have any of the
{len(comparison.statistics)} above its critical value. Stopped: fraction with an eigenvalue of V
outside [{low:g}, {high:g}]; these paths and networks count with their last V inside. Plain networks
are not stopped when they collapse.</p>
<details><summary>All {len(comparison.statistics)} correlations and variances</summary>{others}
</details>"""


def _table(statistics: Sequence[StatisticComparison], last: str) -> str:
    rows = "".join(_row(statistic) for statistic in statistics)
    return (
        '<div class="scroll"><table><thead><tr><th>at the last block</th><th>predicted median</th>'
        "<th>5 to 95 %</th><th>networks' median</th><th>5 to 95 %</th><th>KS</th>"
        f"<th>critical</th></tr></thead><tbody>{rows}{last}</tbody></table></div>"
    )


def _row(statistic: StatisticComparison) -> str:
    cells = []
    for values, errors in zip(statistic.quantiles, statistic.quantile_errors, strict=True):
        low, _, high = (format_statistic(statistic.name, value) for value in values)
        cells += [format_estimate(Estimate(values[1], errors[1])), f"{low} to {high}"]
    body = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    mark = "" if statistic.agrees else ' class="bad"'
    return (
        f"<tr><td>{_symbol(statistic.name)}</td>{body}"
        f"<td{mark}>{format_number(statistic.ks)}</td>"
        f"<td>{format_number(statistic.critical)}</td></tr>"
    )


def _stopped_row(comparison: Comparison) -> str:
    first, second = comparison.stopped.first, comparison.stopped.second
    return (
        f"<tr><td>stopped</td><td>{format_estimate(first)}</td><td></td>"
        f"<td>{format_estimate(second)}</td><td></td><td></td><td></td></tr>"
    )


def _symbol(name: str) -> str:
    """``rho_12`` as HTML."""
    symbol, _, index = name.partition("_")
    return f"{'ρ' if symbol == 'rho' else html.escape(symbol)}<sub>{html.escape(index)}</sub>"
