"""The command ``shaped-attn predict``, and what it shares with ``compare``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import (
    FILE,
    INTERRUPTED,
    READABLE,
    check_files,
    device_option,
    long_work,
    resolve_device,
    usage_errors,
    write_results,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..sde.prediction import Prediction, Settings
    from ..sde.sample import CovarianceSample


# Flag, type, default to show, help. All defaults are those of prediction.Settings, which also
# checks the values, wherever they come from; here an option that is not given is None.
_MODEL_OPTIONS = (
    ("--depth", int, "64", "Number of blocks."),
    ("--width", int, "128", "Width of the model; depth / width is the time of the SDE."),
    ("--tokens", int, "4", "Number of tokens at the start."),
    ("--correlation", float, "0.2", "Correlation of any two tokens at the start."),
    ("--variance", float, "1", "Variance of each token at the start."),
    ("--v0", READABLE, None, "Their covariance instead of these three: .npy or .json."),
    ("--branch-gain", float, "0.5", "Weight of each branch; that of the skip path follows."),
    ("--tau0", float, "1", "Temperature."),
    ("--heads", int, "1", "Number of heads."),
    ("--softmax-gain", float, "1", "Weight of softmax minus its mean."),
    (
        "--out-proj",
        click.Choice(("none", "orthogonal", "gaussian")),
        "none",
        "Law of the output projection of attention.",
    ),
    ("--causal/--no-causal", bool, "no-causal", "Whether tokens see earlier ones only."),
    ("--attention/--no-attention", bool, "attention", "Whether blocks have attention."),
    ("--mlp/--no-mlp", bool, "mlp", "Whether blocks have an MLP."),
    ("--mlp-ratio", float, "1", "Hidden width of the MLP over the width."),
    ("--c-plus", float, "0", "Slope of the activation above 0: 1 + this / sqrt(width)."),
    ("--c-minus", float, "-1", "The same below 0."),
    (
        "--finite-width/--limit",
        bool,
        "finite-width",
        "Whether the width corrects the MLP, or enters as depth / width alone.",
    ),
    ("--paths", int, "4096", "Number of paths of the SDE."),
    (
        "--steps",
        int,
        "256, more at little depth, one a layer at most",
        "Steps per unit of depth / width.",
    ),
    ("--integrator", click.Choice(("chain", "euler_maruyama")), "chain", "Scheme of the SDE."),
    ("--seed", int, "0", "Seed of all draws."),
)
_TUNING_OPTIONS = (
    ("--band", (float, float), "0.05 around the start", "Median correlation to tune for."),
    ("--tune/--no-tune", bool, "tune", "Whether to look for gains that keep it there."),
)
_NETWORK_OPTIONS = (
    ("--networks", int, "1000", "Number of networks."),
    (
        "--method",
        click.Choice(("network", "chain")),
        "network",
        "Real networks, or the Markov chain that their covariance follows exactly.",
    ),
    ("--head-dim", int, "width / heads", "Size of a head's queries and keys."),
)
_OUTPUT_OPTIONS = (
    click.option(
        "--config",
        type=READABLE,
        help="Read settings from this .json or .toml file; flags win over it. Keys are the flags "
        "with underscores; on/off flags have the first name, as in mlp = false.",
    ),
    click.option("--plot", type=FILE, help="Draw the quantiles into this .png, .svg or .pdf."),
    click.option("--output", type=FILE, help="Write JSON into this file."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    device_option,
)


def settings_options(*groups: Sequence[tuple[str, Any, str | None, str]]) -> Callable:
    """Add options for settings, and for where they come from and where results go."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(_OUTPUT_OPTIONS):
            command = option(command)
        for flag, kind, default, text in reversed([row for group in groups for row in group]):
            shown = text if default is None else f"{text}  [default: {default}]"
            options = {"metavar": "LOW HIGH"} if flag == "--band" else {}
            command = click.option(flag, type=kind, default=None, help=shown, **options)(command)
        return command

    return decorate


@click.command(short_help="Predict the covariance of tokens through depth.")
@settings_options(_MODEL_OPTIONS, _TUNING_OPTIONS)
@click.pass_context
def predict(
    context: click.Context,
    config: Path | None,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
    device: str | None,
    **flags: Any,
) -> None:
    """Predict the covariance of tokens through the depth of a shaped transformer.

    Simulates the stochastic differential equation that the covariance follows at initialisation,
    and prints quantiles of correlations and variances, the probability of blow-up, and which branch
    gains and tau0 keep the median correlation in a band. Ctrl-C prints what there is; the exit code
    is then 130.
    """
    torch_device = resolve_device(device)
    check_files(plot, output)
    settings = make_settings(config, flags)

    from ..sde import prediction

    with long_work(torch_device) as work:
        result = prediction.predict(settings, device=torch_device, **work)
    samples = {"SDE": result.sample}
    write_results(result, samples, _print_prediction, plot, output, as_json)
    context.exit(0 if result.is_complete else INTERRUPTED)


def make_settings(config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Join the settings of a file with those of the command line, which win."""
    from ..config_file import naming
    from ..sde import prediction

    given = {name: value for name, value in flags.items() if value is not None}
    with usage_errors():
        if "v0" in given:
            given["v0"] = prediction.read_covariance(given["v0"])
        values = {} if config is None else prediction.read_config(config)
        with naming(config, values.keys() - given.keys()):
            return prediction.make_settings(values, given)


def _print_prediction(result: Prediction, console: Console) -> None:
    from ..sde import prediction

    settings, sample = result.settings, result.sample
    console.print(
        f"[bold]Prediction[/] for depth {settings.depth}, width {settings.width} "
        f"(depth / width {settings.time:.4g}): {count_of(sample)} paths",
        soft_wrap=True,
    )
    if sample.paths:
        console.print()
        console.print(_quantile_table(result))
        console.print()
        console.print(f"Probability of blow-up   {prediction.format_estimate(result.blow_up)}")
        console.print(f"Probability of collapse  {prediction.format_estimate(result.collapse)}")
    if result.tuning is not None:
        console.print()
        for line in prediction.tuning_lines(result.tuning):
            console.print(line, markup=False, soft_wrap=True)
    elif settings.tune and settings.tokens == 1:
        console.print("\nNothing to tune: one token has no correlation.")
    print_assumptions(settings, console)


def print_assumptions(settings: Settings, console: Console) -> None:
    """Say what a prediction rests on."""
    from ..sde import prediction

    console.print()
    for line in ("Assumed:", *prediction.assumptions(settings)):
        console.print(line, style="dim", markup=False, soft_wrap=True)


def count_of(sample: CovarianceSample) -> str:
    """Write how many paths there are, and how many were to be."""
    if sample.is_complete:
        return f"{sample.paths}"
    return f"{sample.paths} of {sample.requested}"


def _quantile_table(result: Prediction):
    """Quantiles at a few depths: one row for each depth, three columns for each statistic."""
    from rich.table import Table as RichTable

    from ..sde import prediction

    names = prediction.shown_statistics(result.sample.tokens)
    # Narrow: all of it is to fit into 80 columns.
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for header in ("\nlayer", "depth\n/ width"):
        drawn.add_column(header, justify="right", no_wrap=True)
    for name in names:
        label = "mean rho" if name == prediction.MEAN_CORRELATION else name
        for title, level in zip(("", label, ""), ("5 %", "50 %", "95 %"), strict=True):
            drawn.add_column(f"{title}\n{level}", justify="right", no_wrap=True)
    for row in result.rows():
        cells = [
            prediction.format_statistic(name, value)
            for name in names
            for value in row.quantiles[name]
        ]
        drawn.add_row(f"{row.layer:.4g}", f"{row.time:.3g}", *cells)
    return drawn
