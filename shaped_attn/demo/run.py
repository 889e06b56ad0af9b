"""The demo from end to end: check, predict and measure, train, and one page that shows it all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from .. import environment, fidelity
from ..interrupt import StopRequest, stop_on_interrupt
from ..sde import Estimate
from ..commands.common import format_estimate, format_number
from ..train.corpus import Corpus, bigram_entropy, unigram_entropy
from ..train.data import load_standard_library
from . import covariance, page, training
from .model import Decoder, ModelConfig
from .result import NAMES, DemoResult

PAGE, METRICS = "index.html", "metrics.json"
MAP_LENGTH = 64  # also the head dimension of the identity that is passed as v
PROMPT = "\n    def "
SAMPLE_BYTES = 200

# Check, networks, calibration, pictures and samples take less than this on two cores; some ten
# seconds of it are the networks'. Where they do not, training gets less time than it was given, so
# that the whole stays near the sum of the two.
OVERHEAD_SECONDS, AFTER_TRAINING_SECONDS = 120.0, 20.0


@dataclass(frozen=True)
class Settings:
    """What to run. The defaults are what ``shaped-attn demo`` does on a CPU."""

    output: Path
    device: torch.device
    command: str
    check_impls: tuple[str, ...]
    seconds: float = 100.0
    steps: int | None = None
    model: ModelConfig = ModelConfig()
    training: training.TrainingConfig = training.TrainingConfig()
    covariance: covariance.CovarianceConfig = covariance.CovarianceConfig()
    corpus_root: Path | None = None
    corpus_bytes: int = 6_000_000
    logit_stds: Sequence[float] = fidelity.QUICK_LOGIT_STDS
    check_length: int | None = None
    sample_bytes: int = SAMPLE_BYTES


def preset(device: torch.device) -> tuple[ModelConfig, training.TrainingConfig]:
    """Sizes that a device trains to a visible result in about two minutes."""
    if device.type != "cuda":
        return ModelConfig(), training.TrainingConfig()
    model = ModelConfig(layers=6, width=384, heads=6, length=512)
    return model, training.TrainingConfig(batch=32, learning_rate=1.5e-3, autocast=True)


def run(settings: Settings, console: Console) -> DemoResult:
    """Run the demo and write its page and metrics into ``settings.output``.

    Ctrl-C from the networks to the end of training ends them, and training after the current step;
    the page then shows what there is, and ``result.training.stopped`` is "interrupt".

    Raises:
        FileNotFoundError: there is no source to train on.
        OSError: the output folder cannot be written.
    """
    _make_writable(settings.output)
    device = settings.device
    seconds: dict[str, float] = {}

    start = begin = time.perf_counter()
    report = _check(settings, console)
    seconds["check"] = time.perf_counter() - start

    with stop_on_interrupt() as stop:
        measured = _covariance(settings, stop, console)
        seconds["covariance"] = measured.seconds

        corpus = load_standard_library(settings.corpus_root, settings.corpus_bytes)
        unigram, bigram = unigram_entropy(corpus), bigram_entropy(corpus)
        summary = corpus.summary()
        console.print(
            f"\n[bold]Text[/]      {summary['source']}: {summary['train_bytes']:,} bytes to train "
            f"on, {summary['validation_bytes']:,} of other files to validate"
        )
        console.print(
            f"          byte frequencies alone give {unigram:.3f} nats per byte, byte pairs "
            f"{bigram:.3f}"
        )

        configs = {name: replace(settings.model, attention=name) for name in NAMES}
        start = time.perf_counter()
        steps, time_limit = settings.steps, None
        if steps is None:
            calibration = training.calibrate(configs, corpus, settings.training, device)
            time_limit = settings.seconds + OVERHEAD_SECONDS - AFTER_TRAINING_SECONDS
            time_limit -= time.perf_counter() - begin
            budget = min(settings.seconds, 0.8 * time_limit)
            steps = calibration.steps(budget, settings.training.evaluations)
        models = {
            name: training.build(config, settings.training.seed, device)
            for name, config in configs.items()
        }
        map_tokens = _map_tokens(corpus)
        maps_before = _maps(models, map_tokens, device)
        seconds["preparation"] = time.perf_counter() - start

        start = time.perf_counter()
        parameters = sum(p.numel() for p in models["plain"].parameters())
        console.print(
            f"[bold]Training[/]  two decoders of {parameters:,} parameters, {steps} steps each, on "
            f"{device}"
        )
        trained = _train(models, corpus, settings, steps, time_limit, stop, console)
        seconds["training"] = time.perf_counter() - start

    start = time.perf_counter()
    result = DemoResult(
        fidelity=report,
        covariance=measured,
        corpus=summary,
        unigram_loss=unigram,
        bigram_loss=bigram,
        model_config=settings.model,
        training_config=settings.training,
        training=trained,
        maps_before=maps_before,
        maps_after=_maps(models, map_tokens, device),
        map_text=bytes(map_tokens.tolist()).decode("utf-8", errors="replace"),
        prompt=PROMPT,
        samples={
            name: _sample(model, settings.training.seed, settings.sample_bytes)
            for name, model in models.items()
        },
        environment=environment.collect(),
        device=_device_name(device),
        impl="triton" if device.type == "cuda" else "torch",
        command=settings.command,
        seconds=seconds,
    )
    seconds["maps and samples"] = time.perf_counter() - start
    write(result, settings.output)
    return result


def write(result: DemoResult, output: Path) -> None:
    """Write the page and the metrics."""
    (output / PAGE).write_text(page.render(result), encoding="utf-8")
    metrics = json.dumps(_without_nan(result.metrics()), indent=1, allow_nan=False)
    (output / METRICS).write_text(metrics + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _make_writable(folder: Path) -> None:
    # Found out now rather than after minutes of training.
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"output must be a folder that can be written, got {folder}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(settings: Settings, console: Console) -> fidelity.FidelityReport:
    with (
        # Its tensors are small: threads gain little, and cost much where the CPU is busy.
        _one_thread(),
        Progress(
            TextColumn("[bold]Check[/]    "),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        task = progress.add_task("check", total=None)
        return fidelity.measure(
            settings.check_impls,
            device=settings.device,
            logit_stds=settings.logit_stds,
            regimes=("plain",),
            length=settings.check_length,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _covariance(
    settings: Settings, stop: StopRequest, console: Console
) -> covariance.CovarianceResult:
    with (
        # As for the check: two threads wait for each other between operators of microseconds.
        _one_thread(),
        Progress(
            TextColumn("[bold]Networks[/] "),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        task = progress.add_task("prediction", total=None)

        def show(phase: str, done: int, total: int) -> None:
            progress.update(task, description=phase, completed=done, total=total)

        result = covariance.measure(
            settings.covariance,
            device=settings.device,
            seed=settings.training.seed,
            on_progress=show,
            stop=lambda: stop.is_set,
        )
    for line in _covariance_lines(result):
        console.print(f"          {line}", soft_wrap=True)
    return result


def _covariance_lines(result: covariance.CovarianceResult) -> list[str]:
    """Prediction and networks in one sentence, and what plain attention does in another."""
    if result.comparison is None:
        return ["interrupted before the first networks were finished"]
    config, found = result.config, result.comparison
    correlation = found.statistics[covariance.CORRELATION]
    middle = found.quantile_levels.index(0.5)
    medians = [
        format_estimate(Estimate(values[middle], errors[middle]))
        for values, errors in zip(correlation.quantiles, correlation.quantile_errors, strict=True)
    ]
    verdict = {
        None: "too few networks to compare",
        True: "no difference found",
        False: "they differ",
    }[result.agrees]
    partly = "" if result.networks.is_complete else f" of {result.networks.requested}"
    lines = [
        f"width {config.width}, depth {config.depth}: median correlation of two tokens "
        f"{medians[0]} predicted, {medians[1]} in {result.networks.paths}{partly} networks; "
        f"largest KS {format_number(found.largest.ks)} ({found.largest.name}), critical "
        f"{format_number(found.critical)}: {verdict}"
    ]
    plain, shaped = result.distance_from_one("plain"), result.distance_from_one("networks")
    if plain is not None:
        lines.append(
            f"with plain attention the median of 1 - correlation is {format_number(plain[1])}, "
            f"with shaped {format_number(shaped[1])}"
        )
    return lines


def _train(
    models: dict[str, Decoder],
    corpus: Corpus,
    settings: Settings,
    steps: int,
    time_limit: float | None,
    stop: StopRequest,
    console: Console,
) -> training.Training:
    with Progress(
        TextColumn("          "),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=steps)

        def show(state: training.Progress) -> None:
            losses = ", ".join(f"{name} {loss:.3f}" for name, loss in state.train_loss.items())
            progress.update(task, completed=state.step, description=losses)
            if state.validation is not None:
                text = ", ".join(f"{name} {loss:.4f}" for name, loss in state.validation.items())
                progress.console.print(f"          step {state.step:5d}  validation loss: {text}")

        return training.train(
            models,
            corpus,
            settings.training,
            settings.device,
            steps,
            stop=stop,
            time_limit=time_limit,
            on_progress=show,
        )


def _map_tokens(corpus: Corpus) -> Tensor:
    """A short piece of unseen source that starts with a function."""
    text = bytes(corpus.validation.tolist())
    start = max(0, text.find(b"\ndef ") + 1)
    start = min(start, max(0, len(text) - MAP_LENGTH))
    return corpus.validation[start : start + MAP_LENGTH].long()


def _maps(models: dict[str, Decoder], tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    return {name: model.attention_maps(tokens.to(device)) for name, model in models.items()}


def _sample(model: Decoder, seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor(list(PROMPT.encode()))
    return model.generate(prompt, count, generator).decode("utf-8", errors="replace")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
