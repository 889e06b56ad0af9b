"""The command ``shaped-attn predict``, and what it shares with ``compare``."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..checks import fail
from ..destination import check_file
from ..sde import prediction
from ..sde.prediction import MEAN_CORRELATION, NetworkComparison, Prediction, Settings
from ..sde.sample import LEVELS, CovarianceSample, Estimate, fraction, quantile, statistic_name
from ..sde.tuning import Candidate, End, Interval, Tuning
from . import common
from .settings import by_field, config_option, naming, read, setting_options

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

# On a prediction; training takes them from its file.
_WITHOUT_EFFECT = ("impl", "deterministic", "preserves_variance")
_START = {"tokens", "correlation", "variance"}
_ROWS = 4  # of the table, beside the start

_output_options = (
    config_option,
    click.option(
        "--plot", type=common.FILE, help="Draw the quantiles into this .png, .svg or .pdf."
    ),
    click.option("--output", type=common.FILE, help="Write JSON into this file."),
    common.json_option,
    common.device_option,
)


class Outcome(NamedTuple):
    """What a command of settings found.

    Attributes:
        result: of the function of `shaped_attn.sde.prediction`.
        samples: those to plot, by name.
        show: prints the result on a console.
        code: of the exit, unless it was interrupted.
    """

    result: Prediction | NetworkComparison
    samples: dict[str, CovarianceSample]
    show: Callable[[Any, Console], None]
    code: int = 0


def from_settings(*left_out: str) -> Callable[[Callable[..., Outcome]], Callable]:
    """Give a function of settings and a device the options for them, and for where results go."""

    def decorate(run: Callable[..., Outcome]) -> Callable:
        @functools.wraps(run)
        def command(
            config: Path | None,
            plot: Path | None,
            output: Path | None,
            as_json: bool,
            device: str | None,
            **flags: Any,
        ) -> None:
            torch_device = common.resolve_device(device)
            _check_files(plot, output)
            outcome = run(_make_settings(config, flags), torch_device)
            _write(outcome, plot, output, as_json)
            code = outcome.code if outcome.result.is_complete else common.INTERRUPTED
            click.get_current_context().exit(code)

        for option in reversed(_output_options):
            command = option(command)
        changes = {"v0": {"type": common.READABLE}, "band": {"metavar": "LOW HIGH"}}
        return setting_options(Settings, *_WITHOUT_EFFECT, *left_out, **changes)(command)

    return decorate


@click.command(short_help="Predict the covariance of tokens through depth.")
@from_settings("networks", "against")
def predict(settings: Settings, device: torch.device) -> Outcome:
    """Predict the covariance of tokens through the depth of a shaped transformer.

    Simulates the stochastic differential equation that the covariance follows at initialisation,
    and prints quantiles of correlations and variances, the probability of blow-up, and which branch
    gains and tau0 keep the median correlation in a band. Ctrl-C prints what there is; the exit code
    is then 130.
    """
    with common.long_work(device) as work:
        result = prediction.predict(settings, device=device, **work)
    return Outcome(result, {"SDE": result.sample}, _print_prediction)


def _make_settings(config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Join the settings of a file with those of the command line, which win.

    A start of the command line replaces that of the file as a whole, be it ``v0`` or a correlation.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    with common.usage_errors():
        if "v0" in given:
            given["v0"] = _read_covariance(given["v0"])
        values = {} if config is None else _read_config(config, given)
        replaced = ("v0",) if _START & given.keys() else _START if "v0" in given else ()
        values = {name: value for name, value in values.items() if name not in replaced}
        with naming(config, values.keys() - given.keys()):
            return Settings(**{**values, **given})


def _read_config(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    model, others = read(path, given)
    values = by_field(path, {**others, **model}, Settings)
    if isinstance(values.get("v0"), str):  # a file, relative to the folder of this one
        values["v0"] = _read_covariance(path.parent / values["v0"])
    return values


def _read_covariance(path: Path) -> tuple[tuple[float, ...], ...]:
    """Read an (m, m) matrix from a .npy or .json file, as its rows.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no square matrix of numbers.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".npy"):
        fail(ValueError, "v0", "must be a .npy or .json file", path.name, "Convert it.")
    try:
        if suffix == ".npy":
            from numpy.lib.format import read_array

            # Not numpy.load, which takes other formats too, and advises to unpickle what is none.
            with path.open("rb") as file:
                matrix = read_array(file, allow_pickle=False).tolist()
        else:
            matrix = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        fail(type(error), "v0", "must be a file that can be read", got, "Check its path.")
    except ValueError as error:
        remedy = "Write it with numpy.save, or as JSON: a list of rows."
        fail(ValueError, "v0", f"must be a whole {suffix} file", f"{path} ({error})", remedy)
    return prediction.check_matrix(f"v0 of {path}", matrix)


def _check_files(plot: Path | None, output: Path | None) -> None:
    """Find out now, rather than after minutes, that a result has nowhere to go."""
    for name, path in (("--plot", plot), ("--output", output)):
        if path is not None:
            with common.usage_errors():
                check_file(path, name)
    if plot is not None:
        from ..plots import SUFFIXES

        if plot.suffix.lower() not in SUFFIXES:
            choices = ", ".join(SUFFIXES)
            raise click.BadParameter(
                f"{plot.name} must end in one of {choices}", param_hint="--plot"
            )


def _write(outcome: Outcome, plot: Path | None, output: Path | None, as_json: bool) -> None:
    """Print a result and write its files, as far as there is one."""
    from rich.console import Console

    result = outcome.result
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    if as_json:
        click.echo(text)
    else:
        console = Console(highlight=False)
        outcome.show(result, console)
        console.print()
        for line in ("Assumed:", *prediction.assumptions(result.settings)):
            console.print(line, style="dim", markup=False, soft_wrap=True)
    samples = {name: sample for name, sample in outcome.samples.items() if sample.paths}
    try:
        if output is not None:
            output.write_text(text + "\n", encoding="utf-8")
        if plot is not None and samples:
            from .. import plots

            names = shown_statistics(result.settings.tokens)
            statistics = [name for name in names if name != MEAN_CORRELATION]
            plots.save(plots.plot_covariance(samples, statistics), plot)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for name, path in (("Plot", plot if samples else None), ("Numbers", output)):
        if path is not None:
            click.echo(f"{name}: {path}", err=as_json)
    if not result.is_complete:
        click.echo("Interrupted: these results are partial.", err=True)


def _print_prediction(result: Prediction, console: Console) -> None:
    settings, sample = result.settings, result.sample
    console.print(
        f"[bold]Prediction[/] for depth {settings.depth}, width {settings.width} "
        f"(depth / width {settings.time:.4g}): {count_of(sample)} paths",
        soft_wrap=True,
    )
    if sample.paths:
        console.print()
        console.print(_quantile_table(sample, settings.width))
        console.print()
        console.print(f"Probability of blow-up   {format_estimate(sample.exploded_fraction())}")
        console.print(f"Probability of collapse  {format_estimate(fraction(sample.collapsed))}")
    if result.tuning is not None:
        console.print()
        for line in tuning_lines(result.tuning):
            console.print(line, markup=False, soft_wrap=True)
        console.print(_recommendation(result), soft_wrap=True)
    elif settings.tune and settings.tokens == 1:
        console.print("\nNothing to tune: one token has no correlation.")


def _recommendation(result: Prediction) -> str:
    if result.recommended is None:
        return "Recommended: none of these; train would take what was asked for."
    names = ("branch_gain", "tau0")
    changed = [
        f"{name} {result.recommended[name]:g} (asked: {getattr(result.settings, name):g})"
        for name in names
        if result.recommended[name] != getattr(result.settings, name)
    ]
    text = " and ".join(changed) or "the gains that were asked for"
    return f"Recommended: {text}; train --config takes it from the file of --output."


def tuning_lines(tuning: Tuning) -> list[str]:
    """Say in plain words which branch gains and tau0 keep the correlation in the band."""
    low, high = tuning.band
    found = [
        f"To keep the median of mean rho in [{low:.3g}, {high:.3g}] at the last layer:",
    ]
    for interval in (tuning.branch_gain, tuning.tau0):
        if interval is not None:
            found += _interval_lines(interval)
    if tuning.tau0 is None:
        why = (
            "has no effect without attention" if tuning.is_complete else "not searched: interrupted"
        )
        found.append(f"  tau0: {why}")
    found.append(
        f"  ({tuning.paths} paths and {tuning.steps} steps per unit of depth / width for each "
        "value tried; the number of blow-ups depends on the steps)"
    )
    return found


def _interval_lines(interval: Interval) -> list[str]:
    name = interval.parameter.replace("_", " ")
    least, most = interval.search_range
    nearest = interval.nearest
    if nearest is None:
        return [f"  {name}: interrupted before the first value was tried"]
    if not interval.is_found:
        tried = f"no value from {least:g} to {most:g} does"
        if not interval.is_complete:
            tried = f"interrupted; none of the {len(interval.candidates)} values tried does"
        return [f"  {name}: {tried}; nearest:", _candidate_line(nearest, interval)]
    other = "tau0" if interval.parameter == "branch_gain" else "branch_gain"
    fixed = getattr(nearest, other)
    ends = [interval.low, interval.high]
    low, high = (f"{getattr(end.candidate, interval.parameter):g}" for end in ends)
    lines = [f"  {name}: from {low} to {high}, at {other.replace('_', ' ')} {fixed:g}"]
    for end in ends if low != high else ends[:1]:
        lines.append(_candidate_line(end.candidate, interval) + _end_note(end, interval))
    return lines


def _candidate_line(candidate: Candidate, interval: Interval) -> str:
    return (
        f"    at {getattr(candidate, interval.parameter):g}: median "
        f"{format_estimate(candidate.correlation)}, blow-up {format_estimate(candidate.blow_up)}"
    )


def _end_note(end: End, interval: Interval) -> str:
    if end.is_search_limit:
        return "; bounded by the search range"
    if end.outside is None:
        return "; interrupted there"
    return "" if interval.is_complete else f"; {end.outside:g} is outside, between them interrupted"


def count_of(sample: CovarianceSample) -> str:
    """Write how many paths there are, and how many were to be."""
    if sample.is_complete:
        return f"{sample.paths}"
    return f"{sample.paths} of {sample.requested}"


def _quantile_table(sample: CovarianceSample, width: int) -> Table:
    """Quantiles at a few depths: one row for each depth, three columns for each statistic."""
    names, found = shown_statistics(sample.tokens), prediction.statistics_of(sample)
    columns = ["\nlayer", "depth\n/ width"]
    for name in names:
        label = "mean rho" if name == MEAN_CORRELATION else name
        columns += ["\n5 %", f"{label}\n50 %", "\n95 %"]
    # All of it is to fit into 80 columns.
    drawn = common.empty_table(*columns, words=(), padding=(0, 1, 0, 0))
    parts = [float(sample.times[-1]) * part / _ROWS for part in range(_ROWS + 1)]
    for k in sorted({int((sample.times - time).abs().argmin()) for time in parts}):
        cells = [
            _format_statistic(name, value)
            for name in names
            for value in quantile(found[name][k], LEVELS).tolist()
        ]
        time = float(sample.times[k])
        drawn.add_row(f"{time * width:.4g}", f"{time:.3g}", *cells)
    return drawn


def shown_statistics(tokens: int) -> list[str]:
    """Return the names of the statistics for a table or a plot, of those of `statistics_of`."""
    if tokens == 1:
        return ["V_11"]
    names = [statistic_name("rho", 1, 2, tokens), statistic_name("V", 1, 1, tokens)]
    return names if tokens == 2 else [MEAN_CORRELATION, *names]


def _format_statistic(name: str, value: float) -> str:
    """A correlation with three decimals, a variance as `format_number`."""
    return format_number(value) if name.startswith("V_") else f"{value:.3f}"


def format_number(value: float) -> str:
    """Three decimals, or few digits and an exponent where that says too little or too much."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 5e-3 <= abs(value) < 100:
        return f"{value:.3f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_estimate(estimate: Estimate) -> str:
    """A value and its standard error, both to the second digit of the error."""
    value, error = estimate
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.3g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}" if value else f"0 ± {error:.{decimals}f}"
