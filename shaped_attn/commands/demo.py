"""The command ``shaped-attn demo``: four claims, measured here and now, on one page.

Each of `PARTS` measures one claim and returns a `Part`. The template makes the page of what is in
the file of metrics, and of the parts' figures.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .. import destination
from . import common

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..train.trainer import TrainResult

PAGE, METRICS = "index.html", "metrics.json"
DONE, INTERRUPTED, FAILED, MISSING = "done", "interrupted", "failed", "not run"

CHECK = {
    "dtypes": ("bf16",),
    "regimes": ("plain",),
    "logit_stds": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
}
CPU_LENGTH = 128  # of the inputs of the check
MODEL = {"depth": 36, "width": 64, "heads": 2, "mlp_ratio": 2.0}
BARE = {"has_skip": False, "has_normalization": False}
DECODERS: dict[str, dict[str, Any]] = {
    "shaped": {},
    "softmax in its place": {"identity_gain": 0.0, "center_gain": 0.0, "scale": "standard"},
    "E-SPA, no skips": {"method": "e_spa", **BARE},
    "softmax, no skips": {"method": "pre_ln", **BARE},
    "softmax, usual block": {"method": "pre_ln"},
}
"""Whose tokens are followed over depth, "shaped" by default. All but the last are drawn."""
TOKENS, NETWORKS = 32, 16
COVARIANCE = {"depth": 64, "width": 64, "networks": 1024}
METHODS = {"E-SPA": "e_spa", "softmax": "pre_ln"}
"""Which are trained."""
TRAINING = {**BARE, "context": 64, "batch_size": 8, "learning_rate": 3e-4, "data_bytes": 6_000_000}
STEPS = {"cpu": 300, "cuda": 1000}
VALIDATIONS = 12
SECONDS = 100.0  # for training, of which two quiet cores take 70


@dataclass
class Part:
    """One claim, and what was measured of it.

    Attributes:
        status: done, interrupted (then the rest is what there was), failed or not run.
        reason: of the status, or what else is to be said of it.
        headline: the number that matters, and in words what to compare it with.
        claim: what the number is.
        numbers: all of them.
        figures: SVG by name; "small" is without words.
        seconds: that it took.
    """

    status: str = DONE
    reason: str | None = None
    headline: tuple[str, str] | None = None
    claim: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all but the figures, with the numbers beside the rest."""
        others = {name: x for name, x in vars(self).items() if name not in ("numbers", "figures")}
        return {**others, **self.numbers}


class Work(NamedTuple):
    """What a part is to do, and whom it asks and tells meanwhile."""

    device: torch.device
    impls: tuple[str, ...]
    seed: int
    steps: int | None
    seconds: float | None
    stop: Callable[[], bool]
    on_progress: Callable[[str, int, int], None]


def measure_centred_term(work: Work) -> Part:
    """The error of the centred term over the size of the logits, in one pass and composed."""
    from .. import fidelity, plots, watchdog

    report = fidelity.measure(
        work.impls,
        device=work.device,
        length=CPU_LENGTH if work.device.type == "cpu" else None,
        seed=work.seed,
        run=lambda jobs: takewhile(lambda _: not work.stop(), watchdog.in_turn(jobs)),
        on_progress=lambda *done: work.on_progress("error of the centred term", *done),
        **CHECK,
    )
    rows = [m for m in report.measurements if m.quantity == fidelity.CENTRED]
    part = _ending(len(rows), len(work.impls) * len(CHECK["logit_stds"]), "sets of inputs")
    if not rows:
        return part
    part.numbers = {**report.to_dict(), "failures": len(report.failures)}
    part.figures = _draw("Error", {"of the centred term": plots.plot_centred_error(report)})
    # Of the kernels, where they run: they come last.
    least = min((m for m in rows if m.impl == rows[-1].impl), key=lambda m: m.logit_std)
    ours, composed = (f"{100 * x:.2g} %" for x in (least.error, least.composed_error))
    part.headline = (ours, f"instead of {composed}")
    part.claim = (
        f"error of softmax minus mean in bfloat16, at logits of size {least.logit_std:g}: in one "
        "pass, and composed of torch's attention and a mean"
    )
    return part


def follow_tokens(work: Work) -> Part:
    """How far tokens are apart over depth, in decoders before training."""
    import torch

    from .. import plots
    from ..sde.sample import LEVELS, CovarianceSample, mean_correlation, quantile

    found: list[list[Tensor]] = []
    while len(found) < NETWORKS and not work.stop():
        seed = work.seed + len(found)
        found.append([_token_covariances(fields, seed) for fields in DECODERS.values()])
        work.on_progress("tokens over depth", len(found), NETWORKS)
    part = _ending(len(found), NETWORKS, "networks of each kind")
    if not found:
        return part
    samples = {
        name: CovarianceSample(
            source="network",
            times=torch.arange(MODEL["depth"] + 1).double() / MODEL["width"],
            covariances=torch.stack(covariances, dim=1),
            stop_times=torch.full((len(found),), math.inf).double(),
            exploded=torch.zeros(len(found), dtype=torch.bool),
            requested=NETWORKS,
        )
        for name, covariances in zip(DECODERS, zip(*found, strict=True), strict=True)
    }
    distances = {
        name: quantile(1 - mean_correlation(sample.covariances), LEVELS)
        for name, sample in samples.items()
    }
    decoders = {name: {"method": "shaped", **fields} for name, fields in DECODERS.items()}
    part.numbers = {
        "settings": {**MODEL, "tokens": TOKENS, "networks": len(found), "decoders": decoders},
        "levels": LEVELS,
        "one_minus_rho": distances,
    }
    drawn = {name: samples[name] for name in list(DECODERS)[:-1]}
    figure = plots.plot_rank_collapse(drawn, width=MODEL["width"], quantities=("distance",))
    part.figures = _draw("Tokens", {"over depth": figure})
    ours, plain, bare, plain_bare, _ = (
        _distance(float(values[-1, 1])) for values in distances.values()
    )
    part.headline = (ours, f"instead of {plain}")
    part.claim = (
        f"distance 1 - rho of the tokens after {MODEL['depth']} layers, with shaped attention in "
        f"place of softmax; without skips E-SPA keeps {bare}, softmax {plain_bare}"
    )
    return part


def _token_covariances(fields: Mapping[str, Any], seed: int) -> Tensor:
    """Return X X^T / width of tokens that all differ, (depth + 1, T, T), over the layers."""
    import torch

    from ..nn import ShapedTransformer, ShapedTransformerConfig

    config = ShapedTransformerConfig(vocab_size=256, head=None, **MODEL, **fields)
    streams: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # In float32 tokens that collapse are equal soon.
        model = ShapedTransformer(config, dtype=torch.float64, device="cpu")
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0][0]))
        block.register_forward_hook(lambda _, __, output: streams.append(output[0]))
        model(torch.randperm(256)[None, :TOKENS])
    x = torch.stack(streams)
    return x @ x.mT / config.width


def _distance(value: float) -> str:
    from ..fidelity import format_error

    if value < 1e-15:
        return "below 1e-15"  # the rounding of float64
    return f"{value:.2f}" if value >= 0.1 else format_error(value)


def compare_covariance(work: Work) -> Part:
    """The covariance of tokens over depth, predicted and in networks."""
    from .. import plots
    from ..sde import prediction

    settings = prediction.Settings(**COVARIANCE, seed=work.seed)
    found = prediction.compare_networks(
        settings, device=work.device, stop=work.stop, on_progress=work.on_progress
    )
    networks = found.networks.paths if found.networks else 0
    part = _ending(networks, settings.networks, "networks")
    part.numbers = found.to_dict()
    samples = {"predicted": found.prediction, "networks": found.networks}
    samples = {name: sample for name, sample in samples.items() if sample and sample.paths}
    if samples:
        figures = {name: plots.plot_covariance(samples, (name,)) for name in ("V_11", "rho_12")}
        part.figures = _draw("Predicted and measured", figures)
    if found.comparison is None:
        return part
    largest = found.comparison.largest
    predicted, measured = (x[1] for x in found.comparison.statistics["rho_12"].quantiles)
    verdict = {True: "no difference found", False: "they differ", None: "too few to tell"}
    part.headline = (f"{predicted:.3f}", f"predicted, {measured:.3f} measured")
    part.claim = (
        f"median correlation of two tokens at layer {settings.depth}, by an equation without "
        f"weights and in {networks} networks; largest KS distance {largest.ks:.3f}, critical "
        f"{largest.critical:.3f}: {verdict[found.agrees]}"
    )
    return part


def train_pair(work: Work) -> Part:
    """Two deep decoders without skips and normalisation, trained on the same batches."""
    import torch

    from .. import plots
    from ..train import metrics, trainer
    from ..train.corpus import bigram_entropy
    from ..train.data import load_corpus
    from ..train.folder import RunFolder
    from ..train.settings import TrainSettings

    if work.device.type == "cuda":
        torch.cuda.set_device(work.device)
    steps = work.steps or STEPS["cuda" if work.device.type == "cuda" else "cpu"]
    settings = TrainSettings(
        **MODEL,
        **TRAINING,
        steps=steps,
        seed=work.seed,
        evaluate_every=max(1, steps // VALIDATIONS),
        checkpoint_every=steps,
    )
    corpus = load_corpus(settings.data, settings.data_bytes)

    def train(name: str, last: int, until: float) -> tuple[TrainResult, list[tuple[int, float]]]:
        step = 0

        def show(progress: trainer.Progress) -> None:
            nonlocal step
            step = progress.step
            work.on_progress(f"training, {name}", step, steps)

        with tempfile.TemporaryDirectory() as folder:
            result = trainer.train(
                replace(settings, method=METHODS[name]),
                Path(folder),
                device="cpu" if work.device.type == "cpu" else "auto",
                corpus=corpus,
                stop=lambda: work.stop() or step >= last or time.perf_counter() > until,
                on_progress=show,
            )
            lines = metrics.read(RunFolder(Path(folder)).metrics)
        batches = [(line["step"], line["loss"]) for line in lines if line["kind"] == metrics.TRAIN]
        return result, batches

    begin, share = time.perf_counter(), (work.seconds or math.inf) / len(METHODS)
    runs: dict[str, TrainResult] = {}
    batches: dict[str, list[tuple[int, float]]] = {}
    for count, name in enumerate(METHODS, 1):
        # Where the first was stopped the second stops too.
        last = min((run.step for run in runs.values() if run.status == INTERRUPTED), default=steps)
        runs[name], batches[name] = train(name, last, begin + count * share)
        if work.stop():
            break
    losses = {name: dict(run.validation) for name, run in runs.items()}
    both = set.intersection(*map(set, losses.values())) if len(runs) == len(METHODS) else set()
    compared = max(both, default=None)
    unigram = trainer.unigram_loss(settings, corpus)
    figure = plots.plot_losses(
        {name: run.validation for name, run in runs.items()},
        training=batches,
        levels={"byte frequencies": unigram},
        top=6.0,  # guesses give 5.5; one that starts far above is back soon, or diverges
    )
    part = Part(figures=_draw("Training", {"losses": figure}))
    part.numbers = {
        "settings": settings.to_dict(),
        "data": corpus.summary(),
        "byte_frequencies": unigram,
        "byte_pairs": bigram_entropy(corpus),
        "compared_step": compared,
        "losses": {name: found.get(compared) for name, found in losses.items()},
        "runs": {name: {**run.to_dict(), "batches": batches[name]} for name, run in runs.items()},
    }
    ended = ", ".join(f"{name} after {run.step}" for name, run in runs.items())
    if work.stop():
        part.status, part.reason = INTERRUPTED, f"It ended: {ended} of {steps} steps."
    elif any(run.status == INTERRUPTED for run in runs.values()):
        part.reason = f"The limit of {work.seconds:g} s ended it: {ended} of {steps} steps."
    if compared is not None:
        ours, theirs = (
            "diverged" if run.status == trainer.DIVERGED else f"{losses[name][compared]:.2f}"
            for name, run in runs.items()
        )
        part.headline = (ours, f"instead of {theirs}")
        part.claim = (
            f"nats per byte of a {settings.depth}-layer decoder without skips and normalisation "
            f"after {compared} steps, with E-SPA instead of softmax attention; byte frequencies "
            f"alone give {unigram:.2f}"
        )
    return part


PARTS: dict[str, Callable[[Work], Part]] = {
    "centred_term": measure_centred_term,
    "tokens": follow_tokens,
    "covariance": compare_covariance,
    "training": train_pair,  # last, as it is the longest
}


@click.command(short_help="Measure what shaped attention wins, train two decoders, write a page.")
@common.folder_option("shaped-attn-demo", f"Folder for {PAGE} and {METRICS}.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    help="Most time for training; both decoders then end after the same step.  "
    f"[default: {SECONDS:g}, with --steps no limit]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help=f"Of training, which is reproducible.  [default: {STEPS['cpu']}, on CUDA {STEPS['cuda']}]",
)
@common.device_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all draws.")
@click.pass_context
def demo(
    context: click.Context,
    output: Path,
    seconds: float | None,
    steps: int | None,
    device: str | None,
    seed: int,
) -> None:
    """Measure what shaped attention wins, and write a page of it, in 3 minutes on two cores.

    The error of the centred term, beside that of composing it; how far tokens are apart over depth;
    their covariance, predicted and in real networks; and two deep decoders without skips and
    normalisation, one with E-SPA and one with softmax attention, trained on Python's own source.

    Ctrl-C writes the page with what there is; the exit code is then 130. It is 1 if a part failed,
    or an error exceeds its budget.
    """
    try:
        destination.check_folder(output)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    torch_device = common.resolve_device(device)
    impls = common.default_impls(torch_device)
    common.prepare_kernels(impls, torch_device)
    if seconds is None and steps is None:
        seconds = SECONDS
    parts = {name: Part(MISSING, "The demo ended before.") for name in PARTS}
    with common.long_work(torch_device) as asked:
        work = Work(torch_device, impls, seed, steps, seconds, **asked)
        for number, (name, measure) in enumerate(PARTS.items(), 1):
            if work.stop():
                break
            click.echo(f"{number}/{len(PARTS)}  {measure.__doc__}", err=True)
            parts[name] = _run(measure, work)
            _write(parts, work, output)  # now: nothing that comes can take it away
        is_interrupted = work.stop()
    has_failed = False
    for part in parts.values():
        has_failed |= part.status == FAILED or bool(part.numbers.get("failures"))
        click.echo()
        if part.headline is not None:
            click.echo(f"{' '.join(part.headline)}: {part.claim}")
        if part.reason is not None:
            click.echo(part.reason if part.status == DONE else f"{part.status}: {part.reason}")
    click.echo(f"\nPage: {output / PAGE}\nNumbers: {output / METRICS}")
    if is_interrupted:
        click.echo("Interrupted: the page shows what there is.", err=True)
        context.exit(common.INTERRUPTED)
    context.exit(int(has_failed))


def _run(measure: Callable[[Work], Part], work: Work) -> Part:
    begin = time.perf_counter()
    try:
        part = measure(work)
    except Exception as error:  # whatever it is, the other parts are worth having
        reason = f"{type(error).__name__}: {error}"
        part = Part(FAILED, reason, numbers={"traceback": traceback.format_exc()})
    part.seconds = time.perf_counter() - begin
    return part


def _ending(done: int, asked: int, what: str) -> Part:
    """Return a part without numbers, of which so much is done."""
    if done == asked:
        return Part()
    return Part(INTERRUPTED, f"It ended after {done} of {asked} {what}.")


def _draw(description: str, drawn: Mapping[str, Figure]) -> dict[str, str]:
    """Return figures as SVG, and as "small" the last of them without words."""
    from .. import plots

    found = {name: plots.svg(figure, f"{description} {name}") for name, figure in drawn.items()}
    figure = list(drawn.values())[-1]
    for axes in figure.axes:
        axes.set(xlabel="", ylabel="")
        axes.tick_params(which="both", labelleft=False, labelbottom=False)
    for legend in list(figure.legends):
        legend.remove()
    figure.set_size_inches(3.2, 1.4)
    return {**found, "small": plots.svg(figure, f"{description}, small")}


def _write(parts: Mapping[str, Part], work: Work, output: Path) -> None:
    import jinja2

    from .. import environment, fidelity
    from ..sde.sample import plain

    metrics = plain(
        {
            "command": shlex.join(["shaped-attn", *sys.argv[1:]]),
            "device": str(work.device),
            "impls": work.impls,
            "seed": work.seed,
            "seconds": sum(part.seconds for part in parts.values()),
            "environment": environment.collect(),
            "parts": {name: part.to_dict() for name, part in parts.items()},
        }
    )
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # A number that JSON lacks, such as NaN, is text.
    templates.filters["number"] = lambda x: x if isinstance(x, str) else fidelity.format_error(x)
    templates.filters["decimals"] = lambda x: x if isinstance(x, str) else f"{x:.3f}"
    templates.filters |= {"distance": _distance, "label": fidelity.label, "prose": _prose}
    templates.filters["general"] = "{:g}".format
    page = templates.get_template("demo.html.jinja").render(
        metrics,
        figures={name: part.figures for name, part in parts.items()},
        environment_lines=environment.lines(metrics["environment"]),
    )
    try:
        for name, content in ((METRICS, text), (PAGE, page)):
            with destination.when_whole(output / name) as file:
                file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written ({error}).") from error


def _prose(text: str) -> str:
    """Return words as a page has them: with Greek, and with numbers that no line's end breaks."""
    return re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", text.replace("1 - rho", "1 − ρ"))
