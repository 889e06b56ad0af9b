"""The command ``shaped-attn train``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..checks import fail
from ..settings import settings_of
from ..train.settings import TrainSettings
from .common import INTERRUPTED, empty_table, folder_option, json_option, usage_errors
from .settings import List, by_field, config_option, naming, read, setting_options

if TYPE_CHECKING:
    from rich.table import Table

    from ..train.study import Study, StudyRun
    from ..train.trainer import Progress, TrainResult

# A prediction may be of a network without one of these; a decoder has all of them.
_PARTS = ("attention", "mlp", "causal")


@click.command(short_help="Train a decoder on text; or compare methods over depth.")
@setting_options(TrainSettings)
@click.option(
    "--study",
    type=click.Choice(("depth",)),
    help="Compare methods over depth, with and without skips and normalisation.",
)
@click.option("--depths", type=List(int), help="Of the study.  [default: 12,36,72]")
@click.option("--methods", type=List(str), help="Of the study.  [default: all]")
@click.option(
    "--learning-rates",
    type=List(float),
    help="Of the study, which reports the best for each model.  [default: --learning-rate]",
)
@folder_option(
    "shaped-attn-train", "Folder for checkpoints, metrics and results; a run in it is resumed."
)
@config_option
@click.option(
    "--device",
    type=click.Choice(("auto", "cpu")),
    default="auto",
    show_default=True,
    help="auto takes a GPU if there is one.",
)
@json_option
@click.pass_context
def train(
    click_context: click.Context,
    study: str | None,
    output: Path,
    config: Path | None,
    device: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a byte-level decoder on real text, or compare methods over depth (--study depth).

    Ctrl-C saves and ends, with exit code 130. The same command then goes on where it ended, as it
    does after the process was killed: from the last checkpoint, to the same losses. A checkpoint
    that is damaged is set aside; if none is whole, nothing is trained. A loss that is not finite
    ends the run, with exit code 1.

    Needs the packages of the extra: pip install "shaped-attn[train]". Several GPUs: accelerate
    launch -m shaped_attn train.
    """
    options = {name: flags.pop(name) for name in ("depths", "methods", "learning_rates")}
    options = {name: value for name, value in options.items() if value is not None}
    if study is None and options:
        flag = f"--{next(iter(options)).replace('_', '-')}"
        raise click.UsageError(f"{flag} is an option of --study depth. Add it.")
    for name, flag in (("method", "--methods"), ("depth", "--depths")):
        if study is not None and flags[name] is not None:
            raise click.UsageError(f"--{name} is not an option of --study depth. Give {flag}.")
    settings = _make_settings(config, flags)
    with _long_work() as work:
        work |= {"device": device, **options}
        if study is None:
            found, show = _run(settings, output, work), _print_result
            code = {"finished": 0, "diverged": 1}.get(found.status, INTERRUPTED)
        else:
            found, show = _run_study(settings, output, work), _print_study
            code = 0 if found.is_complete else INTERRUPTED
    if _is_main_process():
        if as_json:
            click.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        else:
            show(found, output)
    click_context.exit(code)


def _make_settings(config: Path | None, flags: dict[str, Any]) -> TrainSettings:
    given = {name: value for name, value in flags.items() if value is not None}
    with usage_errors():
        values = {} if config is None else _read_config(config, given)
        with naming(config, values.keys() - given.keys()):
            return TrainSettings(**{**values, **given})


def _read_config(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    from ..sde.prediction import Settings

    values, predicted = read(path, given)
    for name in _PARTS:
        if not {**values, **predicted}.get(name, True):
            remedy = "What is trained is a decoder: predict one."
            fail(ValueError, f"{path}: {name}", "must be true", "false", remedy)
    alone = settings_of(Settings).keys() - settings_of(TrainSettings).keys()
    unused = [name for name in values if name in alone]
    if unused:
        click.echo(f"{path}: of a prediction alone, and unused: {', '.join(unused)}", err=True)
    return by_field(path, {x: values[x] for x in values if x not in unused}, TrainSettings)


def _run(settings: TrainSettings, output: Path, work: dict[str, Any]) -> TrainResult:
    from ..train.trainer import train

    show, say = work.pop("show"), work.pop("say")
    return train(
        settings,
        output,
        on_progress=lambda progress: show("", progress, progress.step, progress.steps),
        on_resume=lambda step: say(f"{output}: resuming from step {step}"),
        **work,
    )


def _run_study(settings: TrainSettings, output: Path, work: dict[str, Any]) -> Study:
    from ..plots import save
    from ..plots.study import plot_study
    from ..train.study import PLOT, run_study

    show, say = work.pop("show"), work.pop("say")

    def on_progress(name: str, ended: int, runs: int, progress: Progress) -> None:
        done, total = ended * progress.steps + progress.step, runs * progress.steps
        show(f"run {ended + 1} of {runs}, {name}: ", progress, done, total)

    study = run_study(
        settings,
        output,
        on_progress=on_progress,
        on_resume=lambda name, step: say(f"{name}: resuming from step {step}"),
        **work,
    )
    if study.runs and _is_main_process():
        save(plot_study(study), output / PLOT)
    return study


def _describe(progress: Progress) -> str:
    losses = {"loss": progress.loss, "validation": progress.validation}
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)


@contextlib.contextmanager
def _long_work() -> Iterator[dict[str, Any]]:
    """Show progress on stderr, take Ctrl-C for a request, and show errors as such.

    A terminal has a bar with the last losses. Elsewhere every validation is a line.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from ..interrupt import stop_on_interrupt

    console = Console(stderr=True, quiet=not _is_main_process())
    with (
        _errors(),
        stop_on_interrupt() as request,
        ProgressBar(
            BarColumn(),
            MofNCompleteColumn(),
            "{task.description}",
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task("reading text", total=None)
        shown = None

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        def show(prefix: str, progress: Progress, done: int, total: int) -> None:
            nonlocal shown
            bar.update(task, description=prefix + _describe(progress), completed=done, total=total)
            validation = prefix, progress.validation_step
            if not console.is_terminal and progress.validation is not None and validation != shown:
                shown = validation
                say(
                    f"{prefix}step {progress.validation_step} of {progress.steps}: "
                    f"validation {progress.validation:.4f}"
                )

        yield {
            "show": show,
            "say": say,
            "stop": lambda: request.is_set,
            "warn": lambda text: say(f"Warning: {text}"),
        }


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Show without a traceback what is wrong with the settings, or with the machine."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    except (ModuleNotFoundError, OSError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        from torch import distributed

        # The threads of a group of processes that is not left may abort the interpreter.
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_result(result: TrainResult, output: Path) -> None:
    loss = "" if result.loss is None else f": validation loss {result.loss:.4f} nats per byte"
    click.echo(
        f"{result.status.capitalize()} after {result.step} steps{loss}; byte frequencies alone "
        f"give {result.unigram_entropy:.4f}. {result.parameters:,} parameters, {result.device}."
    )
    if result.reason is not None:
        click.echo(
            f"Training cannot go on: {result.reason}. A lower learning rate, a longer warm-up, or "
            "a network with skips or normalisation may help.",
            err=True,
        )
    if result.status == "interrupted":
        click.echo("The same command goes on from here.", err=True)
    click.echo(f"Folder: {output}")


def _print_study(study: Study, output: Path) -> None:
    from rich.console import Console

    from ..train.study import PLOT, RESULTS

    if study.runs:
        click.echo(
            f"Validation loss after {study.settings.steps} steps, nats per byte; byte frequencies "
            f"alone give {study.unigram_entropy:.3f}\n"
        )
        Console(highlight=False).print(study_table(study))
        click.echo(f"\nPlot: {output / PLOT}\nNumbers: {output / RESULTS}")
    for run in study.runs:
        if run.result.reason is not None:
            click.echo(
                f"Diverged: {run.variant.method} with {run.variant.parts}, depth {run.depth}, "
                f"learning rate {run.learning_rate:g}: {run.result.reason}."
            )
    if not study.is_complete:
        click.echo(
            f"Interrupted after {len(study.runs)} of {study.requested} runs; the same command goes "
            "on from here.",
            err=True,
        )


def study_table(study: Study) -> Table:
    """Return final validation losses: one row for each variant, one column for each depth."""
    best = study.best()
    depths = sorted({depth for _, depth in best})
    rates = {run.learning_rate for run in study.runs}
    columns = ("method", "with", *(f"depth {depth}" for depth in depths))
    drawn = empty_table(*columns, words=(0, 1))
    for variant in dict.fromkeys(run.variant for run in study.runs):
        cells = [_cell(best.get((variant, depth)), len(rates) > 1) for depth in depths]
        drawn.add_row(variant.method, variant.parts, *cells)
    return drawn


def _cell(run: StudyRun | None, shows_rate: bool) -> str:
    if run is None:
        return "-"
    if run.final_loss is None:
        return "diverged"  # at every learning rate
    text = f"{run.final_loss:.3f}"
    return f"{text} at {_short(run.learning_rate)}" if shows_rate else text


def _short(rate: float) -> str:
    """Return the shorter of 0.0003 and 3e-4."""
    digits, exponent = f"{rate:.15e}".split("e")
    scientific = f"{float(digits):g}e{int(exponent)}"
    return min(f"{rate:g}", scientific, key=len)
