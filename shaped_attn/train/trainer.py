"""Training of one model: batches, steps, validation, checkpoints, and how it ends."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_choice, fail
from ..destination import check_folder
from ..nn import ShapedTransformer, anneal_gains, parameter_groups, saving
from . import checkpoints, metrics
from .corpus import Corpus, fixed_windows, sample_batch, step_generator, unigram_entropy
from .data import load_corpus
from .extra import require
from .folder import RunFolder, write_text
from .processes import on_main_process
from .schedule import learning_rate_factor
from .settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

DEVICES = ("auto", "cpu")
FINISHED, INTERRUPTED, DIVERGED = "finished", "interrupted", "diverged"

_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Progress:
    """State after a step.

    Attributes:
        step, steps: how many are done, of how many.
        loss: of the last step that was recorded, None before the first.
        validation: loss of the last validation, None before the first of this call.
        validation_step: after how many steps that was, None like it.
    """

    step: int
    steps: int
    loss: float | None
    validation: float | None
    validation_step: int | None


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        status: "finished", "interrupted" (resumed by the same call), or "diverged".
        reason: why it diverged, else None.
        step: number of steps that were done.
        validation: (step, loss in nats per token) of every validation.
        unigram_entropy: nats per token of byte frequencies alone on the same tokens, see
            `unigram_loss`.
        parameters: of the model.
        device: where it ran.
        seconds: that the call took; without those before it was resumed.
    """

    status: str
    reason: str | None
    step: int
    validation: tuple[tuple[int, float], ...]
    unigram_entropy: float
    parameters: int
    device: str
    seconds: float

    @property
    def loss(self) -> float | None:
        """The last validation loss; None if there is none."""
        return self.validation[-1][1] if self.validation else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainResult:
        """The inverse of `to_dict`."""
        validation = tuple((step, loss) for step, loss in values["validation"])
        return cls(**{**values, "validation": validation})


class _DivergedError(Exception):
    """A loss or a gradient is not finite."""


def train(
    settings: TrainSettings,
    output: Path,
    *,
    device: str = "auto",
    corpus: Corpus | None = None,
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> TrainResult:
    """Train a model, or resume its training, in the folder ``output``.

    AdamW with betas (0.9, 0.95) on the mean cross-entropy of the next byte. A step's batch and
    learning rate are functions of seed and step, so that a run resumed from a checkpoint, also
    after it was killed, goes on with the same losses: on a CPU with the same number of threads, bit
    for bit. Runs of the same seed see the same batches, whatever the model.

    A loss or gradient that is not finite ends the run; the result says where and which. A run that
    has ended is not repeated: its result is read from the folder.

    Under ``accelerate launch`` every process takes an equal part of each batch.

    Args:
        settings: what to train, and how.
        output: folder for checkpoints, metrics and result, see `shaped_attn.train.folder`.
        device: "auto" (the default; what accelerate chooses) or "cpu".
        corpus: the text. Default None: that of the settings.
        stop: asked between steps; if it returns True a checkpoint is written and the run ends.
        on_progress: called after every step.
        on_resume: called with the step of the checkpoint that the run goes on from; 0 if it was
            begun before, and ended before its first checkpoint.
        warn: called with the text of a warning about a damaged checkpoint.

    Raises:
        ModuleNotFoundError: accelerate or tensorboard is not installed.
        ValueError: the folder is that of another run, the text is too short, or the batch does not
            divide evenly among accumulation and processes.
        OSError: the text cannot be read, the folder cannot be written, or a checkpoint cannot be
            read or none of them is whole.
    """
    begin = time.perf_counter()
    check_ready(output)
    accelerator = _make_accelerator(settings, Path(output), device)
    corpus = corpus or load_corpus(settings.data, settings.data_bytes, settings.text_column)
    folder = RunFolder(output)
    data = corpus.summary()
    folder.check(settings, data["sha256"], accelerator.num_processes)
    accelerator.wait_for_everyone()
    if folder.result.exists():
        return _read_result(folder.result)
    is_resumed = folder.run.exists()
    accelerator.wait_for_everyone()
    if not is_resumed:
        on_main_process(
            accelerator, lambda: folder.begin(settings, data, accelerator.num_processes)
        )

    run = _Run(settings, folder, corpus, accelerator, warn)
    if is_resumed and on_resume is not None:
        on_resume(run.step)
    try:
        status, reason = run.steps(stop, on_progress)
    finally:
        run.close()
    result = TrainResult(
        status=status,
        reason=reason,
        step=run.step,
        validation=tuple(
            (line["step"], line["loss"])
            for line in metrics.read(folder.metrics)
            if line["kind"] == metrics.VALIDATION
        ),
        unigram_entropy=unigram_loss(settings, corpus),
        parameters=run.parameters,
        device=str(accelerator.device),
        seconds=time.perf_counter() - begin,
    )

    def end() -> None:
        if status == FINISHED:
            run.export()
        write_text(folder.result, json.dumps(result.to_dict(), indent=1) + "\n")

    if status != INTERRUPTED:
        on_main_process(accelerator, end)
    return result


def _read_result(path: Path) -> TrainResult:
    try:
        return TrainResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the result of a run, and cannot be read as one ({error}). Move it "
            "away: the run then goes on from its last checkpoint."
        ) from error


def check_ready(output: Path) -> None:
    """Find out before any work that a package is missing, or that a folder cannot be written.

    Raises:
        ModuleNotFoundError: accelerate or tensorboard is not installed.
        OSError: the folder cannot be made or written.
    """
    for name in ("accelerate", "tensorboard"):
        require(name)
    check_folder(output)


def _make_accelerator(settings: TrainSettings, output: Path, device: str) -> Accelerator:
    check_choice("device", device, DEVICES)
    accelerator = require("accelerate").Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        gradient_accumulation_steps=settings.accumulation,
        log_with=metrics.TENSORBOARD,
        project_dir=str(output),
    )
    parts = settings.accumulation * accelerator.num_processes
    if settings.batch_size % parts:
        rule = f"must be a multiple of accumulation times processes, {parts}"
        fail(ValueError, "batch_size", rule, settings.batch_size, "Change one of them.")
    return accelerator


def build(settings: TrainSettings) -> ShapedTransformer:
    """Make the model; its weights depend on the settings alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ShapedTransformer(settings.model_config(), device="cpu")


def validation_windows(settings: TrainSettings, corpus: Corpus) -> Tensor:
    """Return the (windows, context) tokens that every validation is on."""
    return fixed_windows(corpus.validation, settings.evaluation_windows, settings.context - 1)


def unigram_loss(settings: TrainSettings, corpus: Corpus) -> float:
    """Return the validation loss of byte frequencies alone, in nats per token.

    `shaped_attn.train.corpus.unigram_entropy` of the tokens that a validation predicts.
    """
    return unigram_entropy(corpus, validation_windows(settings, corpus)[:, 1:])


class _Run:
    """The state of a run: model, optimizer, step and records."""

    def __init__(
        self,
        settings: TrainSettings,
        folder: RunFolder,
        corpus: Corpus,
        accelerator: Accelerator,
        warn: Callable[[str], None],
    ) -> None:
        self.settings, self.folder = settings, folder
        self.corpus, self.accelerator = corpus, accelerator
        model = build(settings)
        self.parameters = sum(p.numel() for p in model.parameters())
        model = model.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=_BETAS,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        windows = validation_windows(settings, corpus)
        self.windows = self._share(windows).to(accelerator.device)
        self.window_count = len(windows)
        self.step = self.saved = checkpoints.load_latest(accelerator, folder.checkpoints, warn)
        self.metrics = metrics.MetricsLog(accelerator, folder.metrics, self.step)
        self._start_clock()

    def steps(
        self, stop: Callable[[], bool] | None, on_progress: Callable[[Progress], None] | None
    ) -> tuple[str, str | None]:
        """Take the steps that are left; return how that ended and why."""
        settings = self.settings
        try:
            loss = None
            validation = self._validate() if self.step == 0 else None
            validated = None if validation is None else self.step
            while self.step < settings.steps:
                # Only there the weights are known to be finite, which a checkpoint's must be.
                if self._is_due(settings.log_every, self.step) and self._must_stop(stop):
                    self._save()
                    return INTERRUPTED, None
                loss = self._take_step(loss)
                if self._is_due(settings.evaluate_every, self.step):
                    validation, validated = self._validate(), self.step
                if self._is_due(settings.checkpoint_every, self.step):
                    self._save()
                if on_progress is not None:
                    on_progress(Progress(self.step, settings.steps, loss, validation, validated))
        except _DivergedError as error:
            return DIVERGED, str(error)
        return FINISHED, None

    def _take_step(self, last: float | None) -> float | None:
        """Take a step; return the last loss that was recorded."""
        settings, accelerator = self.settings, self.accelerator
        rate = settings.learning_rate * learning_rate_factor(
            self.step,
            settings.steps,
            warmup_steps=settings.warmup_steps,
            final_share=settings.final_share,
            schedule=settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = self._backward(self._batch())
        step = self.step + 1
        is_recorded = any(
            self._is_due(every, step) for every in (settings.log_every, settings.checkpoint_every)
        )
        if is_recorded:
            last, norm = accelerator.reduce(loss, "mean").item(), norm.item()
            for name, number in (("loss", last), ("norm of the gradient", norm)):
                if not math.isfinite(number):
                    raise _DivergedError(f"the {name} is {number} in step {step}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        if settings.gain_scheme == "recover":
            anneal_gains(self.model, min(1.0, step / (settings.recover_steps or settings.steps)))
        self._timed_steps += 1
        if is_recorded:
            now = time.perf_counter()
            tokens = self._timed_steps * settings.batch_size * settings.context
            self.metrics.write(
                metrics.TRAIN,
                step,
                loss=last,
                learning_rate=rate,
                gradient_norm=norm,
                tokens_per_second=tokens / (now - self._timed_from),
            )
            self._start_clock()
        return last

    def _backward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of this process's batch and the norm of the gradient, clipped."""
        accelerator, accumulation = self.accelerator, self.settings.accumulation
        total = torch.zeros((), device=accelerator.device)
        for part in batch.chunk(accumulation):
            with accelerator.accumulate(self.model):
                loss = self.model(part, labels=part).loss
                accelerator.backward(loss)
            total += loss.detach() / accumulation
        limit = self.settings.clip_norm or math.inf
        return total, accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def _batch(self) -> Tensor:
        settings = self.settings
        generator = step_generator(settings.seed, self.step)
        batch = sample_batch(
            self.corpus.train, settings.batch_size, settings.context - 1, generator
        )
        return self._share(batch).to(self.accelerator.device, non_blocking=True)

    def _share(self, rows: Tensor) -> Tensor:
        """The rows of this process."""
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    @torch.no_grad()
    def _validate(self) -> float:
        """Return the mean loss over the windows, and record it."""
        self.model.eval()
        total = torch.zeros((), device=self.accelerator.device)
        for part in self.windows.split(self.settings.batch_size // self.settings.accumulation):
            total += self.model(part, labels=part).loss * len(part)
        self.model.train()
        loss = self.accelerator.reduce(total, "sum").item() / self.window_count
        if not math.isfinite(loss):
            raise _DivergedError(f"the validation loss is {loss} after {self.step} steps")
        self.metrics.write(metrics.VALIDATION, self.step, loss=loss)
        self._start_clock()
        return loss

    def _is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self.settings.steps

    def _start_clock(self) -> None:
        """Time the steps from here on: those until the next loss that is recorded."""
        self._timed_from, self._timed_steps = time.perf_counter(), 0

    def _must_stop(self, stop: Callable[[], bool] | None) -> bool:
        if self.accelerator.num_processes == 1:
            return stop is not None and stop()
        # All processes have to stop after the same step.
        if stop is not None and stop():
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _save(self) -> None:
        if self.step > self.saved:
            keep = self.settings.keep_checkpoints
            checkpoints.save(self.accelerator, self.folder.checkpoints, self.step, keep)
            self.saved = self.step
            self._start_clock()

    def export(self) -> None:
        """Write the weights under the names of `ShapedTransformer`."""
        saving.write_weights(self.accelerator.unwrap_model(self.model), self.folder.weights)

    def close(self) -> None:
        """Close the records and let go of model and optimizer."""
        self.metrics.close()
        self.accelerator.free_memory()
