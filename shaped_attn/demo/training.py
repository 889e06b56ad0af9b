"""Trains the decoders side by side: same seed, same batches, same number of steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..interrupt import StopRequest
from ..train.corpus import Corpus, fixed_windows, sample_batch
from ..train.schedule import learning_rate_factor
from .model import Decoder, ModelConfig

MIN_STEPS, MAX_STEPS = 20, 5000


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters, the same for every model."""

    batch: int = 8
    learning_rate: float = 3e-3
    # Adam moves every number by about one learning rate per step. Gains start at 1, weights at
    # 1/sqrt(width): the same relative change takes a larger step.
    gain_learning_rate: float = 3e-2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_share: float = 0.05
    final_learning_rate_share: float = 0.1
    clip_norm: float = 1.0
    evaluations: int = 12
    validation_windows: int = 48
    seed: int = 0
    autocast: bool = False


@dataclass
class Run:
    """One model and what was recorded of it."""

    model: Decoder
    train_loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    window_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Training:
    """What :func:`train` returns: every run has done the same ``steps``."""

    runs: dict[str, Run]
    planned_steps: int
    steps: int = 0
    stopped: str | None = None  # None, "interrupt" or "time limit"


@dataclass(frozen=True)
class Calibration:
    """Seconds that all models together take."""

    step: float
    evaluation: float

    def steps(self, seconds: float, evaluations: int) -> int:
        """Return the number of steps that fit into ``seconds`` beside the evaluations."""
        steps = int((seconds - (evaluations + 1) * self.evaluation) / self.step)
        return max(MIN_STEPS, min(MAX_STEPS, steps))


@dataclass(frozen=True)
class Progress:
    """State after a step of all models, for a progress bar."""

    step: int
    planned_steps: int
    train_loss: dict[str, float]
    validation: dict[str, float] | None


def build(config: ModelConfig, seed: int, device: torch.device) -> Decoder:
    """Make a decoder whose weights depend on the seed alone: equal for shaped and plain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(config)
    return model.to(device)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone."""
    named = list(model.named_parameters())
    gains = [p for name, p in named if name.endswith("_gain")]
    vectors = [p for name, p in named if p.ndim < 2 and not name.endswith("_gain")]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if gains:
        groups.append({"params": gains, "weight_decay": 0.0, "lr": config.gain_learning_rate})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


class _Trainee:
    """A model with its optimiser and schedule."""

    def __init__(self, model: Decoder, config: TrainingConfig, steps: int) -> None:
        self.model, self.config = model, config
        self.optimizer = make_optimizer(model, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(
                step,
                steps,
                warmup_steps=max(1, round(config.warmup_share * steps)),
                final_share=config.final_learning_rate_share,
            ),
        )

    def step(self, batch: Tensor) -> float:
        with _autocast(batch.device, self.config):
            loss = self.model.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def _autocast(device: torch.device, config: TrainingConfig):
    if not config.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def evaluate(model: Decoder, windows: Tensor, config: TrainingConfig) -> list[float]:
    """Mean loss, in nats per byte, of each window."""
    losses = []
    for part in windows.split(config.batch):
        with _autocast(windows.device, config):
            loss = model.loss(part, reduction="none")
        losses.append(loss.view(part.shape[0], -1).mean(1))
    return torch.cat(losses).tolist()


def calibrate(
    models: dict[str, ModelConfig],
    corpus: Corpus,
    config: TrainingConfig,
    device: torch.device,
) -> Calibration:
    """Measure how long a step and an evaluation of all models take, on models thrown away.

    On a CPU that other programs keep busy, threads wait for one another at every operator: one
    thread is then several times as fast. Whichever is faster stays set.
    """
    generator = torch.Generator().manual_seed(config.seed)
    trainees = [
        _Trainee(build(model, config.seed, device), config, steps=100) for model in models.values()
    ]
    length = trainees[0].model.config.length
    windows = fixed_windows(corpus.validation, config.validation_windows, length).to(device)

    def seconds_per_step(threads: int, give_up: float = math.inf) -> float:
        torch.set_num_threads(threads)
        times = []
        # The first step compiles kernels, starts threads, and allocates.
        for _ in range(6):
            batch = sample_batch(corpus.train, config.batch, length, generator).to(device)
            start = time.perf_counter()
            for trainee in trainees:
                trainee.step(batch)
            times.append(time.perf_counter() - start)
            if len(times) > 1 and times[-1] > give_up:
                return times[-1]
        return sorted(times[1:])[2]

    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1:
        alone = seconds_per_step(1)
        step = seconds_per_step(threads, give_up=3 * alone)
        if alone < step:
            step = seconds_per_step(1)
    else:
        step = seconds_per_step(threads)
    start = time.perf_counter()
    for trainee in trainees:
        evaluate(trainee.model, windows, config)
    return Calibration(step, time.perf_counter() - start)


def train(
    models: dict[str, Decoder],
    corpus: Corpus,
    config: TrainingConfig,
    device: torch.device,
    steps: int,
    *,
    stop: StopRequest | None = None,
    time_limit: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Training:
    """Train all models in lockstep, one step each on the same batch, and evaluate them as they go.

    Args:
        models: by name; trained in place.
        corpus: the text.
        config: hyper-parameters, shared.
        device: where the models are.
        steps: number of optimiser steps of every model.
        stop: once set, training ends after the step it is in. Default: never.
        time_limit: seconds after which training ends after the step it is in. Default: none.
        on_progress: called after every step.

    Returns:
        The runs, which have all done the same number of steps, however training ended.
    """
    length = next(iter(models.values())).config.length
    training = Training({name: Run(model) for name, model in models.items()}, steps)
    trainees = {name: _Trainee(model, config, steps) for name, model in models.items()}
    generator = torch.Generator().manual_seed(config.seed + 1)
    windows = fixed_windows(corpus.validation, config.validation_windows, length).to(device)
    every = max(1, steps // config.evaluations)
    begin = time.perf_counter()

    def validate() -> dict[str, float]:
        for run in training.runs.values():
            run.window_losses = evaluate(run.model, windows, config)
            loss = sum(run.window_losses) / len(run.window_losses)
            run.validation.append((training.steps, loss))
        return {name: run.validation[-1][1] for name, run in training.runs.items()}

    validate()
    while training.steps < steps:
        if stop is not None and stop.is_set:
            training.stopped = "interrupt"
            break
        if time_limit is not None and time.perf_counter() - begin > time_limit:
            training.stopped = "time limit"
            break
        batch = sample_batch(corpus.train, config.batch, length, generator).to(device)
        for name, run in training.runs.items():
            start = time.perf_counter()
            run.train_loss.append(trainees[name].step(batch))
            run.seconds += time.perf_counter() - start
        training.steps += 1
        is_due = training.steps % every == 0 and steps - training.steps >= every // 2
        validation = validate() if is_due or training.steps == steps else None
        if on_progress is not None:
            losses = {name: run.train_loss[-1] for name, run in training.runs.items()}
            on_progress(Progress(training.steps, steps, losses, validation))
    if any(run.validation[-1][0] != training.steps for run in training.runs.values()):
        validate()
    return training


def paired_difference(first: Run, second: Run) -> tuple[float, float]:
    """Mean and standard error, over the validation windows, of first minus second loss."""
    difference = torch.tensor(first.window_losses) - torch.tensor(second.window_losses)
    error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return difference.mean().item(), error
