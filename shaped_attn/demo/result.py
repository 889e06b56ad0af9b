"""What one demo run found: everything that the page and the metrics file show."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..fidelity import FidelityReport
from .covariance import CovarianceResult
from .model import ModelConfig
from .training import Training, TrainingConfig, paired_difference

NAMES = ("shaped", "plain")


@dataclass(frozen=True)
class DemoResult:
    """One run of the demo. Losses are in nats per byte."""

    fidelity: FidelityReport
    covariance: CovarianceResult
    corpus: dict[str, Any]
    unigram_loss: float
    bigram_loss: float
    model_config: ModelConfig
    training_config: TrainingConfig
    training: Training
    maps_before: dict[str, Tensor]  # (layers, heads, T, T) by model
    maps_after: dict[str, Tensor]
    map_text: str
    prompt: str
    samples: dict[str, str]
    environment: dict[str, Any]
    device: str
    impl: str
    command: str
    seconds: dict[str, float]

    @property
    def tokens(self) -> int:
        """Bytes that each model was trained on."""
        return self.training.steps * self.training_config.batch * self.model_config.length

    def final_loss(self, name: str) -> float:
        """Last validation loss of one model."""
        return self.training.runs[name].validation[-1][1]

    def difference(self) -> tuple[float, float]:
        """Shaped minus plain validation loss and its standard error over the windows."""
        runs = self.training.runs
        return paired_difference(runs["shaped"], runs["plain"])

    def metrics(self) -> dict[str, Any]:
        """Plain data for JSON, without the matrices."""
        difference, error = self.difference()
        runs = {
            name: {
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "validation_loss": self.final_loss(name),
                "validation_bits_per_byte": self.final_loss(name) / math.log(2),
                "milliseconds_per_step": 1e3 * run.seconds / max(1, self.training.steps),
                "train_curve": run.train_loss,
                "validation_curve": run.validation,
                "gains": run.model.learned_gains(),
                "sample": self.samples[name],
            }
            for name, run in self.training.runs.items()
        }
        return {
            "command": self.command,
            "device": self.device,
            "impl": self.impl,
            "seconds": self.seconds,
            "corpus": self.corpus,
            "unigram_loss": self.unigram_loss,
            "bigram_loss": self.bigram_loss,
            "model": {**asdict(self.model_config), "attention": list(NAMES)},
            "training": asdict(self.training_config),
            "steps": self.training.steps,
            "planned_steps": self.training.planned_steps,
            "stopped": self.training.stopped,
            "bytes_per_model": self.tokens,
            "shaped_minus_plain": {"mean": difference, "standard_error": error},
            "runs": runs,
            "fidelity": self.fidelity.to_dict(),
            "covariance": self.covariance.to_dict(),
            "environment": self.environment,
        }
