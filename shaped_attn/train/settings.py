"""What defines a training run, from flags or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .. import config_file
from ..checks import (
    check_choice,
    check_divides,
    check_flag,
    check_int,
    check_number,
    check_positive,
    check_size,
    fail,
)
from ..nn import ShapedTransformerConfig
from .corpus import BYTE_VALUES
from .schedule import SCHEDULES

PRECISIONS = ("fp32", "bf16")

_WARMUP_SHARE = 0.05
_COUNTS = (
    *("depth", "width", "heads", "context", "data_bytes", "steps", "batch_size", "accumulation"),
    *("evaluate_every", "evaluation_windows", "log_every", "checkpoint_every", "keep_checkpoints"),
)
# What a run may be resumed with another value of: the weights do not depend on it. The text is
# compared by its bytes, wherever they come from.
_FREE = (
    *("data", "text_column", "data_bytes"),
    *("evaluate_every", "evaluation_windows", "log_every", "checkpoint_every", "keep_checkpoints"),
)
# Names of flags that are no settings, and what to do instead of writing them into a file.
_REMEDIES = {
    "no_skip": "Write skip = false.",
    "no_normalization": "Write normalization = false.",
    "layers": "Write depth.",
    **{
        name: f"Give --{name.replace('_', '-')} on the command line."
        for name in (
            *("config", "output", "device", "json", "study", "depths", "methods"),
            "learning_rates",
        )
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A byte-level decoder and how to train it. The names are those of the command's flags.

    Attributes:
        method, depth, width, heads, positions, mlp_ratio: of the model, as in
            `shaped_attn.nn.ShapedTransformerConfig`.
        skip, normalization: its ``has_skip`` and ``has_normalization``. Default None: what the
            method's paper uses.
        context: tokens of a sequence; all but the first are predicted. Default 128.
        data, data_bytes, text_column: as in `shaped_attn.train.data.load_corpus`.
        steps: of the optimizer. Default 1000.
        batch_size: sequences of one step, those of all parts and devices together. Default 16.
        accumulation: parts of a step's batch that are computed one after the other, to save
            memory. Default 1.
        learning_rate: its peak. Default 1e-3.
        schedule: "cosine" (the default), "linear" or "constant", after the warm-up.
        warmup_steps: over which the learning rate grows. Default None: 5 % of the steps.
        final_share: learning rate at the end, over its peak. Default 0.1.
        weight_decay: of matrices, see `shaped_attn.nn.parameter_groups`. Default 0.1.
        clip_norm: largest norm of the gradient of all parameters; 0 does not clip. Default 1.0.
        seed: of the initial weights and of the batches. Default 0.
        precision: "fp32" (the default), or "bf16" for autocast; parameters are float32 in both.
        evaluate_every: steps between validations, which are also before the first and after the
            last. Default 100.
        evaluation_windows: sequences of a validation, spread evenly over its text. Default 64.
        log_every: steps between the losses that are recorded. Reading a loss waits for the device.
            Default 1.
        checkpoint_every: steps between checkpoints. Default 100.
        keep_checkpoints: how many to keep; the last that is not damaged is resumed. Default 2.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of its range, or the model is one
            that `ShapedTransformerConfig` refuses.
    """

    method: str = "shaped"
    depth: int = 12
    width: int = 128
    heads: int = 4
    skip: bool | None = None
    normalization: bool | None = None
    positions: str = "rotary"
    mlp_ratio: float = 4.0
    context: int = 128
    data: str = "stdlib"
    text_column: str = "text"
    data_bytes: int = 100_000_000
    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int | None = None
    final_share: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    evaluate_every: int = 100
    evaluation_windows: int = 64
    log_every: int = 1
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        """Check every field and fill in the warm-up."""
        for name in _COUNTS:
            check_size(name, getattr(self, name))
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", round(_WARMUP_SHARE * self.steps))
        check_int("seed", self.seed, low=0, high=2**63 - 1)
        check_int("warmup_steps", self.warmup_steps, low=0)
        if self.warmup_steps > self.steps:
            rule = f"must be at most steps, {self.steps}"
            fail(ValueError, "warmup_steps", rule, self.warmup_steps, "Warm up for fewer steps.")
        check_int("context", self.context, low=2)
        check_divides("accumulation", self.accumulation, "batch_size", self.batch_size)
        for name in ("learning_rate", "mlp_ratio"):
            check_positive(name, getattr(self, name))
        check_number("final_share", self.final_share, low=0.0, high=1.0)
        for name in ("weight_decay", "clip_norm"):
            check_number(name, getattr(self, name), low=0.0)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("data", "text_column"):
            if not isinstance(getattr(self, name), str):
                got = repr(getattr(self, name))
                fail(TypeError, name, "must be text", got, "Write it in quotes.")
        for name in ("skip", "normalization"):
            if getattr(self, name) is not None:
                check_flag(name, getattr(self, name))
        self.model_config()

    def model_config(self) -> ShapedTransformerConfig:
        """Return the configuration of the model."""
        return ShapedTransformerConfig(
            vocab_size=BYTE_VALUES,
            method=self.method,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            has_skip=self.skip,
            has_normalization=self.normalization,
            positions=self.positions,
            max_length=self.context,
            mlp_ratio=self.mlp_ratio,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields; a file with them is a configuration."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Say in which settings that the weights depend on ``other`` differs, as "name: a, b"."""
        return [
            f"{name}: {other.get(name)!r}, now {value!r}"
            for name, value in self.to_dict().items()
            if name not in _FREE and other.get(name) != value
        ]


def read_config(path: Path) -> dict[str, Any]:
    """Read settings by name from a JSON file, or from a TOML file on Python 3.11 and later.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of that format, or has a name that is no setting.
    """
    return config_file.read(path, [f.name for f in fields(TrainSettings)], _REMEDIES)
