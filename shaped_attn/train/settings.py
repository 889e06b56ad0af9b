"""What defines a training run, from flags or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from ..checks import check_divides, check_int, check_number, check_positive, check_size
from ..nn import ShapedTransformerConfig
from ..nn.config import ModelConfig, model_of
from ..settings import documented, names_in_files, setting, setting_of
from .corpus import BYTE_VALUES
from .schedule import SCHEDULES

PRECISIONS = ("fp32", "bf16")

_WARMUP_SHARE = 0.05
# What a run may be resumed with another value of: the weights do not depend on it. The text is
# compared by its bytes, wherever they come from.
_FREE = (
    *("data", "text_column", "data_bytes"),
    *("evaluate_every", "evaluation_windows", "log_every", "checkpoint_every", "keep_checkpoints"),
)

_check_from_0 = partial(check_number, low=0.0)


@documented
@dataclass(frozen=True, kw_only=True)
class TrainSettings(ModelConfig):
    """A byte-level decoder and how to train it.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of its range, or the model is one
            that `ShapedTransformerConfig` refuses.
    """

    positions: str = setting_of(ShapedTransformerConfig, "positions")
    context: int = setting(
        128,
        "Tokens, that is bytes, of a sequence; all but the first are predicted.",
        partial(check_int, low=2),
    )
    data: str = setting(
        "stdlib",
        "Text: stdlib (the source of Python's standard library), a file, a folder, a folder that "
        "datasets.save_to_disk wrote, wikitext-103, c4, or hf:NAME[:CONFIG].",
    )
    text_column: str = setting("text", "Column of a dataset with the text.")
    data_bytes: int = setting(100_000_000, "Most bytes of text to take.", check_size)
    steps: int = setting(1000, "Number of steps of the optimizer.", check_size)
    batch_size: int = setting(
        16, "Sequences of a step, of all parts and devices together.", check_size
    )
    accumulation: int = setting(
        1, "Parts of a batch, computed one after the other to save memory.", check_size
    )
    learning_rate: float = setting(1e-3, "Its peak.", check_positive)
    schedule: str = setting("cosine", "Of the learning rate after the warm-up.", choices=SCHEDULES)
    warmup_steps: int | None = setting(
        None,
        "Steps over which the learning rate grows.",
        partial(check_int, low=0),
        none="5 % of the steps",
    )
    final_share: float = setting(
        0.1, "Learning rate at the end, over its peak.", partial(check_number, low=0.0, high=1.0)
    )
    weight_decay: float = setting(
        0.1, "Of matrices; embeddings, gains and norms have none.", _check_from_0
    )
    clip_norm: float = setting(1.0, "Largest norm of the gradient; 0 does not clip.", _check_from_0)
    recover_steps: int | None = setting(
        None,
        'Steps over which gain_scheme "recover" goes from shaped to plain attention.',
        check_size,
        none="all steps",
    )
    seed: int = setting(
        0, "Seed of weights and batches.", partial(check_int, low=0, high=2**63 - 1)
    )
    precision: str = setting(
        "fp32", "bf16 is autocast; parameters are float32 in both.", choices=PRECISIONS
    )
    evaluate_every: int = setting(
        100,
        "Steps between validations, which are also before the first and after the last.",
        check_size,
    )
    evaluation_windows: int = setting(
        64, "Sequences of a validation, spread evenly over its text.", check_size
    )
    log_every: int = setting(1, "Steps between the losses that are recorded.", check_size)
    checkpoint_every: int = setting(100, "Steps between checkpoints.", check_size)
    keep_checkpoints: int = setting(2, "How many checkpoints to keep.", check_size)

    def __post_init__(self) -> None:
        """Check every field and fill in the warm-up."""
        super().__post_init__()
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", round(_WARMUP_SHARE * self.steps))
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps must be at most steps, {self.steps}, got {self.warmup_steps}. "
                "Warm up for fewer steps."
            )
        check_divides("accumulation", self.accumulation, "batch_size", self.batch_size)
        if self.recover_steps is not None and self.gain_scheme != "recover":
            raise ValueError(
                'recover_steps must be left out without gain_scheme "recover", got '
                f"{self.recover_steps}. Nothing else is annealed."
            )
        self.model_config()

    def model_config(self) -> ShapedTransformerConfig:
        """Return the configuration of the model."""
        return ShapedTransformerConfig(
            vocab_size=BYTE_VALUES,
            positions=self.positions,
            max_length=self.context,
            **model_of(self),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON; a file with them is a configuration."""
        found = asdict(self).items()
        return {name: list(x) if isinstance(x, tuple) else x for name, x in found}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Say in which settings that the weights depend on ``other`` differs, as "name: a, b".

        What ``other`` lacks, as a run of an earlier version may, has its default.
        """
        names = names_in_files(type(self))
        known = {f.name: f.default for f in fields(self)}
        known |= {names.get(name, name): value for name, value in other.items()}
        return [
            f"{name}: {known[name]!r}, now {value!r}"
            for name, value in self.to_dict().items()
            if name not in _FREE and known[name] != value
        ]
