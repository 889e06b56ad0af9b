"""The depth study: which methods still train as networks get deeper, after equal steps."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..checks import check_choice, fail
from ..nn import METHODS
from . import checkpoints
from .data import load_corpus
from .extra import require
from .folder import RunFolder, write_text
from .processes import on_main_process
from .settings import TrainSettings
from .trainer import (
    FINISHED,
    INTERRUPTED,
    Progress,
    TrainResult,
    check_ready,
    train,
    unigram_loss,
)

DEPTHS = (12, 36, 72)
RESULTS, PLOT, RUNS = "study.json", "study.png", "runs"


@dataclass(frozen=True)
class Variant:
    """A method with or without skip connections and normalisation."""

    method: str
    skip: bool
    normalization: bool

    @property
    def parts(self) -> str:
        """What it has besides attention and MLP."""
        names = {"skip": self.skip, "norm": self.normalization}
        return " + ".join(name for name, has_it in names.items() if has_it) or "neither"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    variant: Variant
    depth: int
    learning_rate: float
    result: TrainResult

    @property
    def final_loss(self) -> float | None:
        """The last validation loss; None if it diverged."""
        return self.result.loss if self.result.status == FINISHED else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "method": self.variant.method,
            "skip": self.variant.skip,
            "normalization": self.variant.normalization,
            "depth": self.depth,
            "learning_rate": self.learning_rate,
            "loss": self.result.loss,
            **self.result.to_dict(),
        }


@dataclass(frozen=True)
class Study:
    """What `run_study` returns.

    Attributes:
        settings: what all runs share.
        data: fingerprint and sizes of the text.
        runs: those that have ended, in the order in which they ran.
        requested: how many runs there are to be.
        unigram_entropy: nats per token of byte frequencies alone on the same tokens.
    """

    settings: TrainSettings
    data: dict[str, Any]
    runs: tuple[StudyRun, ...]
    requested: int
    unigram_entropy: float

    @property
    def is_complete(self) -> bool:
        """Whether nothing was interrupted."""
        return len(self.runs) == self.requested

    def best(self) -> dict[tuple[Variant, int], StudyRun]:
        """Return the run with the lowest final loss for each variant and depth.

        Of runs that diverged one is returned only if all learning rates did.
        """
        found: dict[tuple[Variant, int], StudyRun] = {}
        for run in self.runs:
            key = run.variant, run.depth
            if key not in found or _rank(run) < _rank(found[key]):
                found[key] = run
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "settings": self.settings.to_dict(),
            "data": self.data,
            "unigram_entropy": self.unigram_entropy,
            "is_complete": self.is_complete,
            "runs": [run.to_dict() for run in self.runs],
            "versions": {"shaped_attn": __version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }


def _rank(run: StudyRun) -> tuple[bool, float]:
    return run.final_loss is None, run.result.loss or 0.0


def variants(settings: TrainSettings, methods: Sequence[str]) -> list[Variant]:
    """Return the methods with every combination of skips and normalisation that is defined.

    Combinations that `shaped_attn.nn.ShapedTransformerConfig` refuses are left out, and so are
    those that ``settings.has_skip`` or ``settings.has_normalization`` exclude.

    Raises:
        ValueError: a method is unknown, or has no such combination.
    """
    found = []
    for method in methods:
        check_choice("methods", method, METHODS)
        before = len(found)
        for skip, normalization in product((True, False), repeat=2):
            if settings.has_skip not in (None, skip):
                continue
            if settings.has_normalization not in (None, normalization):
                continue
            try:
                replace(settings, method=method, has_skip=skip, has_normalization=normalization)
            except ValueError as error:
                reason = error
                continue
            found.append(Variant(method, skip, normalization))
        if len(found) == before:
            got = f"{method!r}, which has none ({reason})"
            rule = "must have a combination of skips and normalisation that is defined"
            fail(ValueError, "methods", rule, got, "Leave it out.")
    return found


def run_study(
    settings: TrainSettings,
    output: Path,
    *,
    depths: Sequence[int] = DEPTHS,
    methods: Sequence[str] = METHODS,
    learning_rates: Sequence[float] | None = None,
    device: str = "auto",
    stop: Callable[[], bool] | None = None,
    on_progress: Callable[[str, int, int, Progress], None] | None = None,
    on_resume: Callable[[str, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Study:
    """Train every variant at every depth for the same steps on the same batches.

    Runs that have ended are not repeated, one that was interrupted is resumed. Each has its folder
    below ``output / "runs"``, whose checkpoints are removed when it has ended, but for those set
    aside as damaged. The results are written to ``output / "study.json"`` after each.

    Args:
        settings: what the runs share; method, depth and learning rate are replaced.
        output: folder of the study.
        depths: numbers of blocks. Default (12, 36, 72).
        methods: to compare. Default: all. See `variants`.
        learning_rates: each run is repeated with each. Default None: that of the settings.
        device, stop, warn: as in `shaped_attn.train.trainer.train`.
        on_progress: called after every step with the run's name, the number of runs that have
            ended, the number of all, and the progress of the run.
        on_resume: called with the run's name and the step that it goes on from.

    Raises:
        As `train` and `variants`.
    """
    learning_rates = learning_rates or (settings.learning_rate,)
    # All settings are checked before the first run, which may take hours.
    plan = [
        (variant, _settings_of(settings, variant, depth, rate))
        for depth in depths
        for variant in variants(settings, methods)
        for rate in learning_rates
    ]
    check_ready(output)
    corpus = load_corpus(settings.data, settings.data_bytes, settings.text_column)
    study = Study(settings, corpus.summary(), (), len(plan), unigram_loss(settings, corpus))
    output.mkdir(parents=True, exist_ok=True)
    for variant, run_settings in plan:
        name = run_name(run_settings)

        def show(progress: Progress, name: str = name, ended: int = len(study.runs)) -> None:
            if on_progress is not None:
                on_progress(name, ended, len(plan), progress)

        def tell(step: int, name: str = name) -> None:
            if on_resume is not None:
                on_resume(name, step)

        result = train(
            run_settings,
            output / RUNS / name,
            device=device,
            corpus=corpus,
            stop=stop,
            on_progress=show,
            on_resume=tell,
            warn=warn,
        )
        if result.status == INTERRUPTED:
            break
        run = StudyRun(variant, run_settings.depth, run_settings.learning_rate, result)
        study = replace(study, runs=(*study.runs, run))

        state = require("accelerate").PartialState()
        on_main_process(state, partial(_record, study, output, RunFolder(output / RUNS / name)))
    return study


def _record(study: Study, output: Path, ended: RunFolder) -> None:
    checkpoints.remove_all(ended.checkpoints)
    ended.weights.unlink(missing_ok=True)
    write_text(output / RESULTS, json.dumps(study.to_dict(), indent=1) + "\n")


def _settings_of(
    settings: TrainSettings, variant: Variant, depth: int, learning_rate: float
) -> TrainSettings:
    return replace(
        settings,
        method=variant.method,
        has_skip=variant.skip,
        has_normalization=variant.normalization,
        depth=depth,
        learning_rate=learning_rate,
    )


def run_name(settings: TrainSettings) -> str:
    """Return the name of a run, that of its folder."""
    skip = "skip" if settings.has_skip else "no-skip"
    norm = "norm" if settings.has_normalization else "no-norm"
    return f"{settings.method}-{skip}-{norm}-depth-{settings.depth}-lr-{settings.learning_rate:g}"
