"""The command ``shaped-attn``: ``bench``, ``check``, ``compare``, ``demo``, ``env``, and more.

Exit codes: 0 done, 1 a check exceeded its budget, a comparison found a difference or the command
failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .destination import check_file
from .train.command import train

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .fidelity import FidelityReport, Table
    from .sde.comparison import Comparison
    from .sde.prediction import NetworkComparison, Prediction, Settings
    from .sde.sample import CovarianceSample

IMPLS = ("triton", "torch", "reference")
FAMILIES = ("auto", "portable", "hopper")  # those of kernels.families, which imports Triton
INTERRUPTED = 130

_MOST_ROWS = 21  # of a comparison: what 6 tokens have

# Whether this process is the command, and not a program that calls it.
_is_program = False


def main() -> None:
    """Entry point of the console script and of ``python -m shaped_attn``."""
    global _is_program
    _is_program = True
    try:
        code = cli.main(prog_name="shaped-attn", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shaped-attn")
def cli() -> None:
    """Shaped attention: identity + softmax - mean, in one fused pass."""


cli.add_command(train)


_device_option = click.option(
    "--device",
    default=None,
    help="torch device, such as cpu or cuda:0.  [default: cuda if present]",
)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Print what a bug report needs."""
    from . import environment

    collected = environment.collect()
    if as_json:
        click.echo(json.dumps(collected, indent=1))
        return
    pairs = environment.lines(collected)
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        click.echo(f"{name:{width}}  {text}")


@cli.command(short_help="Measure errors against float64, beside their budgets.")
@click.option(
    "--impl",
    "impls",
    multiple=True,
    type=click.Choice(IMPLS),
    help="Implementation to check; may be repeated.  [default: triton, on a CPU torch and triton]",
)
@_device_option
@click.option(
    "--length",
    type=click.IntRange(min=16),
    help="Sequence length.  [default: 512; 128 under Triton's interpreter]",
)
@click.option("--quick", is_flag=True, help="Fewer logit scales; inputs without mean or sink.")
@click.option(
    "--family",
    type=click.Choice(FAMILIES),
    default="auto",
    envvar="SHAPED_ATTN_FAMILY",
    show_default=True,
    show_envvar=True,
    help="Family of kernels; hopper is checked in calls of every kind that it takes.",
)
@click.option(
    "--watchdog",
    "limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds without a result after which kernels on a GPU hang.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(
    context: click.Context,
    impls: tuple[str, ...],
    device: str | None,
    length: int | None,
    quick: bool,
    family: str,
    limit: float,
    seed: int,
    as_json: bool,
) -> None:
    """Measure relative errors against float64, and compare them with their budgets.

    Each quantity has the error of shaped_attn and, below it, that of composing torch's softmax
    attention with a mean in the same dtype. The exit code is 1 if an error exceeds its budget, or
    if a kernel hangs.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from . import fidelity, watchdog

    torch_device = _resolve_device(device)
    if family == "hopper":
        impls = impls or ("triton",)
        if set(impls) != {"triton"}:
            raise click.UsageError(
                f"--family hopper must have --impl triton alone, got {', '.join(impls)}; drop one"
            )
    impls = impls or _default_impls(torch_device)
    _prepare_kernels(impls, torch_device)
    options: dict[str, Any] = {"device": torch_device, "seed": seed, "family": family}
    if "triton" in impls:
        with usage_errors():
            fidelity.check_family(family, torch_device)
    measure: Callable[..., FidelityReport] = fidelity.measure
    if family == "hopper":
        measure = fidelity.measure_calls
        calls = fidelity.hopper_calls() if length is None else fidelity.hopper_calls(length)
        options["calls"] = calls
        if quick:
            options["logit_stds"] = fidelity.QUICK_CALL_LOGIT_STDS
    else:
        options |= {"impls": impls, "length": length}
        if quick:
            options |= {"logit_stds": fidelity.QUICK_LOGIT_STDS, "regimes": ("plain",)}
    if _may_hang(impls, torch_device):
        options["run"] = partial(watchdog.run, processes=_processes(), limit=limit)
    with Progress(
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("measuring", total=None)
        try:
            report = measure(
                **options,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except watchdog.HangError as error:
            beside = f" (beside it ran: {'; '.join(error.beside)})" if error.beside else ""
            raise click.ClickException(
                f"no report in {error.seconds:g} s from: {error.late}{beside}. Its kernel hangs, "
                "or takes longer to compile, for which there is --watchdog. To do without the "
                "kernels for Hopper, set the environment variable SHAPED_ATTN_FAMILY=portable."
            ) from error
        except watchdog.JobError as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        console = Console(highlight=False)
        console.print(_CALLS_LEGEND if family == "hopper" else _LEGEND)
        for table in fidelity.tables(report):
            console.print(_render(table, torch_device))
        _print_summary(report, console)
    context.exit(1 if report.failures else 0)


@cli.command(short_help="Check, train on Python's own source, write a page.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("shaped-attn-demo"),
    show_default=True,
    help="Folder for index.html and metrics.json.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=100.0,
    show_default=True,
    help="Time for training both models; the number of steps follows from it.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), help="Number of steps, instead of a time: reproducible."
)
@_device_option
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of weights, batches, samples."
)
@click.pass_context
def demo(
    context: click.Context,
    output: Path,
    seconds: float,
    steps: int | None,
    device: str | None,
    seed: int,
) -> None:
    """Check the operator, run deep networks, train on Python's own source, and write a page.

    The covariance of tokens over depth is predicted, and measured in real networks at
    initialisation. Two byte-level decoders are then trained side by side, one with shaped and one
    with plain softmax attention. Ctrl-C during either writes the page with what there is; the exit
    code is then 130. It is 1 if the check exceeded a budget.
    """
    from dataclasses import replace

    from rich.console import Console

    from . import fidelity
    from .demo import run as demo_run

    torch_device = _resolve_device(device)
    impls = _default_impls(torch_device)
    _prepare_kernels(impls, torch_device)
    model, training = demo_run.preset(torch_device)
    console = Console(highlight=False)
    settings = demo_run.Settings(
        output=output,
        device=torch_device,
        command=shlex.join(["shaped-attn", *sys.argv[1:]]),
        check_impls=impls,
        seconds=seconds,
        steps=steps,
        model=model,
        training=replace(training, seed=seed),
    )
    try:
        result = demo_run.run(settings, console)
    except OSError as error:
        raise click.ClickException(str(error)) from error

    for table in fidelity.tables(result.fidelity):
        console.print(_render(table, torch_device, quantities=(fidelity.CENTRED, fidelity.OUTPUT)))
    _print_summary(result.fidelity, console)
    difference, error = result.difference()
    console.print(
        f"\nValidation loss after {result.training.steps} steps: "
        + ", ".join(f"{name} {result.final_loss(name):.4f}" for name in result.training.runs)
        + f"\nshaped minus plain: {difference:+.4f}, windows' standard error {error:.4f}; one seed"
    )
    console.print(f"\nPage: {output / demo_run.PAGE}\nNumbers: {output / demo_run.METRICS}")
    if result.training.stopped == "interrupt":
        console.print(
            f"Interrupted after {result.training.steps} of {result.training.planned_steps} steps; "
            "the "
            "page shows what there is."
        )
        context.exit(INTERRUPTED)
    context.exit(1 if result.fidelity.failures else 0)


_FILE = click.Path(dir_okay=False, path_type=Path)
_READABLE = click.Path(dir_okay=False, exists=True, path_type=Path)


@cli.command(short_help="Time the operator beside its peers.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("shaped-attn-bench"),
    show_default=True,
    help="Folder for speed.json and speed.png.",
)
@click.option("--select", metavar="EXPRESSION", help="Only cases whose names fit, as pytest's -k.")
@click.option(
    "--show", type=_READABLE, help="Show this result of `pytest bench` instead; measure nothing."
)
@click.pass_context
def bench(context: click.Context, output: Path, select: str | None, show: Path | None) -> None:
    """Time the operator, models and the covariance SDE beside their peers.

    Each is checked against float64 first. On a GPU this takes about 4 minutes, on a CPU, where all
    is small, 2. It needs a clone of the repository and the extra `test`. Interrupted, it goes on
    with the next call. The exit code is 1 if anything was wrong.
    """
    from rich.console import Console

    from . import plots, speed

    code, path = 0, output / "speed.json"
    try:
        if show is None:
            output.mkdir(parents=True, exist_ok=True)
            code = speed.measure(path, select)
        report = speed.load(show or path)
        console = Console(highlight=False)
        console.print(report.describe(), soft_wrap=True)
        for table in speed.tables(report):
            console.print(table)
        if speed.can_plot(report):
            output.mkdir(parents=True, exist_ok=True)
            console.print(f"\nPlot: {plots.save(speed.plot(report), output / 'speed.png')}")
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Numbers: {show or path}")
    context.exit(code)


# Flag, type, default to show, help. All defaults are those of prediction.Settings, which also
# checks the values, wherever they come from; here an option that is not given is None.
_MODEL_OPTIONS = (
    ("--depth", int, "64", "Number of blocks."),
    ("--width", int, "128", "Width of the model; depth / width is the time of the SDE."),
    ("--tokens", int, "4", "Number of tokens at the start."),
    ("--correlation", float, "0.2", "Correlation of any two tokens at the start."),
    ("--variance", float, "1", "Variance of each token at the start."),
    ("--v0", _READABLE, None, "Their covariance instead of these three: .npy or .json."),
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
        type=_READABLE,
        help="Read settings from this .json or .toml file; flags win over it. Keys are the flags "
        "with underscores; on/off flags have the first name, as in mlp = false.",
    ),
    click.option("--plot", type=_FILE, help="Draw the quantiles into this .png, .svg or .pdf."),
    click.option("--output", type=_FILE, help="Write JSON into this file."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    _device_option,
)


def _settings_options(*groups: Sequence[tuple[str, Any, str | None, str]]) -> Callable:
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


@cli.command(short_help="Predict the covariance of tokens through depth.")
@_settings_options(_MODEL_OPTIONS, _TUNING_OPTIONS)
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
    torch_device = _resolve_device(device)
    _check_files(plot, output)
    settings = _make_settings(config, flags)

    from .sde import prediction

    with _long_work(torch_device) as work:
        result = prediction.predict(settings, device=torch_device, **work)
    samples = {"SDE": result.sample}
    _write_results(result, samples, _print_prediction, plot, output, as_json)
    context.exit(0 if result.is_complete else INTERRUPTED)


@cli.command(short_help="Run networks beside the prediction.")
@_settings_options(_MODEL_OPTIONS, _NETWORK_OPTIONS)
@click.pass_context
def compare(
    context: click.Context,
    config: Path | None,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
    device: str | None,
    **flags: Any,
) -> None:
    """Run networks of finite width beside the prediction, and compare the two at the last layer.

    Every correlation and variance gets a Kolmogorov-Smirnov test; together they find a difference
    between equal laws in 1 % of all runs. The exit code is 1 if they find one. Ctrl-C prints what
    there is; the exit code is then 130.
    """
    torch_device = _resolve_device(device)
    _check_files(plot, output)
    settings = _make_settings(config, flags)

    from .sde import prediction

    with usage_errors():
        prediction.check_comparison(settings)
    with _long_work(torch_device) as work:
        result = prediction.compare_networks(settings, device=torch_device, **work)
    samples = {"SDE": result.prediction}
    if result.networks is not None:
        samples[f"{settings.method}s"] = result.networks
    _write_results(result, samples, _print_comparison, plot, output, as_json)
    if not result.is_complete:
        context.exit(INTERRUPTED)
    context.exit(0 if result.agrees else 1)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Show what is wrong with settings as wrong usage."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


def _make_settings(config: Path | None, flags: Mapping[str, Any]) -> Settings:
    from .config_file import naming
    from .sde import prediction

    given = {name: value for name, value in flags.items() if value is not None}
    with usage_errors():
        if "v0" in given:
            given["v0"] = prediction.read_covariance(given["v0"])
        values = {} if config is None else prediction.read_config(config)
        with naming(config, values.keys() - given.keys()):
            return prediction.make_settings(values, given)


def _check_files(plot: Path | None, output: Path | None) -> None:
    """Find out now, rather than after minutes, that a result has nowhere to go."""
    for name, path in (("--plot", plot), ("--output", output)):
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"there is no folder {path.parent}", param_hint=name)
        if path is not None:
            with usage_errors():
                check_file(path, name)
    if plot is not None:
        from .plots import SUFFIXES

        if plot.suffix.lower() not in SUFFIXES:
            choices = ", ".join(SUFFIXES)
            raise click.BadParameter(
                f"{plot.name} must end in one of {choices}", param_hint="--plot"
            )


@contextlib.contextmanager
def _long_work(device: torch.device) -> Iterator[dict[str, Any]]:
    """Show progress on stderr and take Ctrl-C for a request, for functions that know of both."""
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from .interrupt import stop_on_interrupt

    with (
        stop_on_interrupt() as request,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as progress,
    ):
        tasks = {}
        threads = torch.get_num_threads()
        if device.type == "cpu":
            # The matrices are small: threads gain little, and cost much where the CPU is busy.
            torch.set_num_threads(1)

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)

        try:
            yield {"on_progress": on_progress, "stop": lambda: request.is_set}
        finally:
            torch.set_num_threads(threads)


def _write_results(
    result: Prediction | NetworkComparison,
    samples: dict[str, CovarianceSample],
    show: Callable,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Print a result and write its files, as far as there is one."""
    from rich.console import Console

    from .sde import prediction

    text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    if as_json:
        click.echo(text)
    else:
        show(result, Console(highlight=False))
    samples = {name: sample for name, sample in samples.items() if sample.paths}
    try:
        if output is not None:
            output.write_text(text + "\n", encoding="utf-8")
        if plot is not None and samples:
            from . import plots

            names = prediction.shown_statistics(result.settings.tokens)
            statistics = [name for name in names if name != prediction.MEAN_CORRELATION]
            plots.save(plots.plot_covariance(samples, statistics), plot)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for name, path in (("Plot", plot if samples else None), ("Numbers", output)):
        if path is not None:
            click.echo(f"{name}: {path}", err=as_json)
    if not result.is_complete:
        click.echo("Interrupted: these results are partial.", err=True)


def _resolve_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise click.BadParameter(
            f"{name!r} is not a device of this machine ({reason})", param_hint="--device"
        ) from error
    return device


def _default_impls(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return ("triton",)
    from importlib.util import find_spec

    # Where Triton is not to be had, such as macOS, the torch implementation is all there is.
    return ("torch", "triton") if device.type == "cpu" and find_spec("triton") else ("torch",)


def _prepare_kernels(impls: tuple[str, ...], device: torch.device) -> None:
    """See to it that the Triton kernels run if they are asked for, or say why they do not."""
    if "triton" not in impls:
        return
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        # Triton reads it as it defines functions, its own among them, and torch may import Triton.
        if "triton" in sys.modules and _is_program:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # NumPy complains about infinities in masked lanes, which the kernels then discard.
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )
    from .environment import kernel_availability

    kernels = kernel_availability()
    if not kernels["available"]:
        raise click.UsageError(f"--impl triton cannot run here: {kernels['reason']}")


def _may_hang(impls: tuple[str, ...], device: torch.device) -> bool:
    """Whether kernels run that no signal interrupts."""
    return "triton" in impls and device.type != "cpu"


def _processes() -> int:
    """How many processes compile kernels side by side and share the GPU."""
    return min(8, os.cpu_count() or 1)


_LEGEND = (
    "Relative error against float64 by standard deviation of the logits; below it, dim, that of\n"
    "composing torch's softmax attention and a mean in the same dtype. Last column: share of the\n"
    "error budget. Causal; the inputs are plain, have a mean, or a key that draws all weight."
)

_CALLS_LEGEND = (
    "Relative error against float64 by standard deviation of the logits; below it, dim, that of\n"
    "eager torch in the same dtype. Last column: share of the error budget. Bits repeated: how\n"
    "many results were not equal bit for bit when the call was made again."
)


def _render(table: Table, device: torch.device, quantities: tuple[str, ...] | None = None):
    """One fidelity table for the terminal: an error and, below it, the composition's.

    The last column is the largest share of its budget that an error of the row takes up.
    """
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    from . import fidelity

    where = "interpreter" if table.impl == "triton" and device.type == "cpu" else device
    kernels = "" if table.family is None else f", {table.family} kernels"
    # A title of the table itself would be wrapped at the table's width.
    title = f"{table.impl} ({where}), {table.dtype}, T = {table.length}, {table.regime}{kernels}"
    drawn = RichTable(box=None, pad_edge=False)
    drawn.add_column("logit std", no_wrap=True)
    for logit_std in table.logit_stds:
        drawn.add_column(f"{logit_std:g}", justify="right", no_wrap=True)
    drawn.add_column("used", justify="right", no_wrap=True)
    for quantity, row in table.rows:
        if quantities is not None and quantity not in quantities:
            continue
        errors = [
            Text(fidelity.format_error(m.error), style="" if m.is_within else "bold red")
            for m in row
        ]
        used = max(m.used for m in row)
        is_within = all(m.is_within for m in row)
        drawn.add_row(
            fidelity.label(quantity),
            *errors,
            Text(f"{used:.0%}", style="green" if is_within else "bold red"),
        )
        composed = [m.composed_error for m in row if m.composed_error is not None]
        if composed:
            drawn.add_row("  composed", *map(fidelity.format_error, composed), "", style="dim")
    return Group(Text(f"\n{title}", style="bold"), drawn)


def _print_summary(report: FidelityReport, console: Console) -> None:
    count, failures = len(report.measurements), report.failures
    if not failures:
        console.print(f"All {count} errors are within their budget ({report.seconds:.0f} s).")
        return
    console.print(f"[bold red]{len(failures)} of {count} errors exceed their budget:[/]")
    for m in failures:
        console.print(
            f"  {m.impl} {m.dtype} {m.regime}, logit std {m.logit_std:g}, {m.quantity}: "
            f"{m.error:.2e} > {m.budget:.2e}"
        )


def _print_prediction(result: Prediction, console: Console) -> None:
    from .sde import prediction

    settings, sample = result.settings, result.sample
    console.print(
        f"[bold]Prediction[/] for depth {settings.depth}, width {settings.width} "
        f"(depth / width {settings.time:.4g}): {_count_of(sample)} paths",
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
    _print_assumptions(settings, console)


def _print_comparison(result: NetworkComparison, console: Console) -> None:
    from .sde import prediction

    settings, comparison = result.settings, result.comparison
    networks = "no" if result.networks is None else _count_of(result.networks)
    console.print(
        f"[bold]Comparison[/] at depth {settings.depth}, width {settings.width} (depth / width "
        f"{settings.time:.4g}): {_count_of(result.prediction)} paths of the SDE, {networks} "
        f"{settings.method}s",
        soft_wrap=True,
    )
    if comparison is not None:
        console.print()
        console.print(_comparison_table(comparison, settings.method))
        console.print()
        for name, pair in (("Stopped", comparison.stopped), ("Blow-up", comparison.exploded)):
            console.print(
                f"{name:7}  SDE {prediction.format_estimate(pair.first)}, {settings.method}s "
                f"{prediction.format_estimate(pair.second)}"
            )
        largest = comparison.largest
        if not comparison.can_disagree:
            verdict = "Too few to tell: no KS distance can exceed its critical value."
        elif comparison.agrees:
            verdict = (
                "[green]Agree[/]: no KS distance exceeds its critical value; "
                f"{largest.name} comes nearest, {largest.ratio:.2f} of it."
            )
        else:
            verdict = (
                f"[bold red]Disagree[/]: {largest.name} most, {largest.ratio:.2f} times its "
                "critical value."
            )
        console.print(verdict, soft_wrap=True)
    _print_assumptions(settings, console)


def _print_assumptions(settings: Settings, console: Console) -> None:
    from .sde import prediction

    console.print()
    for line in ("Assumed:", *prediction.assumptions(settings)):
        console.print(line, style="dim", markup=False, soft_wrap=True)


def _count_of(sample: CovarianceSample) -> str:
    if sample.is_complete:
        return f"{sample.paths}"
    return f"{sample.paths} of {sample.requested}"


def _quantile_table(result: Prediction):
    """Quantiles at a few depths: one row for each depth, three columns for each statistic."""
    from rich.table import Table as RichTable

    from .sde import prediction

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


def _comparison_table(comparison: Comparison, method: str):
    """KS distance and medians of every statistic, or of those with the largest distance."""
    from rich.table import Table as RichTable
    from rich.text import Text

    from .sde import prediction
    from .sde.sample import Estimate

    found = list(comparison.statistics.values())
    title = None
    if len(found) > _MOST_ROWS:
        title = f"The {_MOST_ROWS} of {len(found)} statistics with the largest KS distance"
        found = sorted(found, key=lambda statistic: statistic.ks, reverse=True)[:_MOST_ROWS]
    drawn = RichTable(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    drawn.add_column("", no_wrap=True)
    for header in ("KS", "critical", "median SDE", f"median {method}s"):
        drawn.add_column(header, justify="right", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    median = comparison.quantile_levels.index(0.5)
    for statistic in found:
        medians = [
            prediction.format_estimate(Estimate(values[median], errors[median]))
            for values, errors in zip(statistic.quantiles, statistic.quantile_errors, strict=True)
        ]
        drawn.add_row(
            statistic.name,
            prediction.format_number(statistic.ks),
            prediction.format_number(statistic.critical),
            *medians,
            Text("ok", style="green") if statistic.agrees else Text("differs", style="bold red"),
        )
    return drawn
