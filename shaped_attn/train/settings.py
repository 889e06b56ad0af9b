"""What defines a training run, from flags or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from ..checks import check_int, check_number, check_positive, check_size, fail
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
        check=partial(check_int, low=2),
        help="Tokens, that is bytes, of a sequence; all but the first are predicted.",
    )
    data: str = setting(
        "stdlib",
        help="Text: stdlib (the source of Python's standard library), a file, a folder, a folder "
        "that datasets.save_to_disk wrote, wikitext-103, c4, or hf:NAME[:CONFIG].",
    )
    text_column: str = setting("text", help="Column of a dataset with the text.")
    data_bytes: int = setting(100_000_000, check=check_size, help="Most bytes of text to take.")
    steps: int = setting(1000, check=check_size, help="Number of steps of the optimizer.")
    batch_size: int = setting(
        16, check=check_size, help="Sequences of a step, of all parts and devices together."
    )
    accumulation: int = setting(
        1, check=check_size, help="Parts of a batch, computed one after the other to save memory."
    )
    learning_rate: float = setting(1e-3, check=check_positive, help="Its peak.")
    schedule: str = setting(
        "cosine", choices=SCHEDULES, help="Of the learning rate after the warm-up."
    )
    warmup_steps: int | None = setting(
        None,
        check=partial(check_int, low=0),
        none="5 % of the steps",
        help="Steps over which the learning rate grows.",
    )
    final_share: float = setting(
        0.1,
        check=partial(check_number, low=0.0, high=1.0),
        help="Learning rate at the end, over its peak.",
    )
    weight_decay: float = setting(
        0.1, check=_check_from_0, help="Of matrices; embeddings, gains and norms have none."
    )
    clip_norm: float = setting(
        1.0, check=_check_from_0, help="Largest norm of the gradient; 0 does not clip."
    )
    recover_steps: int | None = setting(
        None,
        check=check_size,
        none="all steps",
        help='Steps over which gain_scheme "recover" goes from shaped to plain attention.',
    )
    seed: int = setting(
        0, check=partial(check_int, low=0, high=2**63 - 1), help="Seed of weights and batches."
    )
    precision: str = setting(
        "fp32", choices=PRECISIONS, help="bf16 is autocast; parameters are float32 in both."
    )
    evaluate_every: int = setting(
        100,
        check=check_size,
        help="Steps between validations, which are also before the first and after the last.",
    )
    evaluation_windows: int = setting(
        64, check=check_size, help="Sequences of a validation, spread evenly over its text."
    )
    log_every: int = setting(
        1, check=check_size, help="Steps between the losses that are recorded."
    )
    checkpoint_every: int = setting(100, check=check_size, help="Steps between checkpoints.")
    keep_checkpoints: int = setting(2, check=check_size, help="How many checkpoints to keep.")

    def __post_init__(self) -> None:
        """Check every field and fill in the warm-up."""
        super().__post_init__()
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", round(_WARMUP_SHARE * self.steps))
        if self.warmup_steps > self.steps:
            rule = f"must be at most steps, {self.steps}"
            fail(ValueError, "warmup_steps", rule, self.warmup_steps, "Warm up for fewer steps.")
        if self.batch_size % self.accumulation:
            rule = f"must divide batch_size, {self.batch_size}"
            fail(ValueError, "accumulation", rule, self.accumulation, "Choose a divisor of it.")
        if self.recover_steps is not None and self.gain_scheme != "recover":
            rule = 'must be left out without gain_scheme "recover"'
            fail(ValueError, "recover_steps", rule, self.recover_steps, "Nothing is annealed.")
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
