"""The configuration that a model, its training and its prediction share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch

from ..checks import HeadGain, check_divides, check_head_gain, check_positive, check_size
from ..settings import check_settings, documented, setting
from ..validation import IMPLEMENTATIONS
from .attention import OUT_PROJECTIONS
from .block import NORMS, ShapedBlock, TransformerBlock
from .gains import GAIN_NAMES, GAIN_SCHEMES
from .methods import METHODS, build_blocks, resolve_wiring

KINDS = ("decoder", "encoder")
HEADS = ("causal_lm", "masked_lm", "token_classification", None)
POSITIONS = ("learned", "rotary", "none")

SHAPED_FIELDS = (
    *("branch_gain", "skip_gain", "preserves_variance", "out_proj", "scale", "tau0"),
    *("identity_gain", "softmax_gain", "center_gain", "gain_scheme", "learned_gains"),
    *("c_plus", "c_minus", "trainable_slopes"),
)
"""Fields that describe `ShapedBlock` and have no meaning for other methods."""

VERSION_KEY, FORMAT_VERSION = "format_version", 1
"""Of the JSON of a configuration."""


@documented
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network of any method, apart from what it reads and what it is for.

    Gains per head are stored as tuples.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of its range.
    """

    method: str = setting("shaped", "Whose blocks they are.", choices=METHODS)
    depth: int = setting(12, "Number of blocks.", check_size, flags=("--depth", "--layers"))
    width: int = setting(128, "Width of the stream.", check_size)
    heads: int = setting(4, "Number of query heads.", check_size)
    kv_heads: int | None = setting(
        None, "Number of heads of keys and values.", check_size, none="as many as heads"
    )
    head_dim: int | None = setting(
        None, "Size of a head's queries and keys.", check_size, none="width / heads"
    )
    has_skip: bool | None = setting(
        None,
        'Whether there are skips. "shaped" without has branch_gain 1; the simplified methods never '
        'have one around their attention, and "simplified" always one around its MLP.',
        flags=("--skip/--no-skip",),
        none="what the method's paper has",
    )
    has_normalization: bool | None = setting(
        None,
        "Whether blocks read a normalised stream.",
        flags=("--normalization/--no-normalization",),
        none="what the method's paper has",
    )
    mlp_ratio: float = setting(4.0, "Hidden width of the MLP over the width.", check_positive)
    impl: str = setting("auto", "Implementation of attention.", choices=IMPLEMENTATIONS)
    deterministic: bool = setting(
        True,
        "Whether equal inputs give equal bits; without, gradients of queries are summed in any "
        "order, which is faster on a Hopper GPU.",
    )
    branch_gain: float = setting(0.5, "Weight of each branch.")
    skip_gain: float | None = setting(
        None, "Weight of each skip path.", none="sqrt(1 - branch_gain^2)"
    )
    preserves_variance: bool = setting(True, "Whether skip_gain^2 + branch_gain^2 has to be 1.")
    tau0: float = setting(1.0, "Temperature.", check_positive)
    identity_gain: HeadGain = setting(
        1.0, "Weight of the identity in the attention matrix, or one for each head."
    )
    softmax_gain: HeadGain = setting(1.0, "Weight of softmax, or one for each head.")
    center_gain: HeadGain | None = setting(
        None, "Weight of the mean that is subtracted, or one for each head.", none="that of softmax"
    )
    gain_scheme: str = setting(
        "fixed", "Whether gains stay, are trained, or are annealed.", choices=GAIN_SCHEMES
    )
    out_proj: str = setting(
        "none", "Law of the output projection of attention.", choices=OUT_PROJECTIONS
    )
    c_plus: float = setting(0.0, "Slope of the activation above 0 is 1 + this / sqrt(width).")
    c_minus: float = setting(-1.0, "The same below 0.")

    def __post_init__(self) -> None:
        """Check every field; make sequences tuples, so that equal configurations compare equal."""
        check_settings(self)
        check_divides("heads", self.heads, "width", self.width)
        for name in GAIN_NAMES:
            gain = getattr(self, name)
            if gain is not None:
                object.__setattr__(self, name, check_head_gain(name, gain, self.heads))


def model_of(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of `ModelConfig` alone, as plain data."""
    return {f.name: getattr(config, f.name) for f in fields(ModelConfig)}


@documented
@dataclass(frozen=True, kw_only=True)
class ShapedTransformerConfig(ModelConfig):
    """Everything that defines a `ShapedTransformer`, checked when it is made.

    Gains, ``tau0``, ``scale``, ``out_proj`` and slopes describe the blocks of "shaped"; of other
    methods they are part of what the method is, and keep their defaults.

    Raises:
        TypeError: a value has the wrong type, or a field without default is missing.
        ValueError: a value is out of range, an unknown choice, or fields contradict each other; a
            method with a wiring that no paper gives it, or with fields of "shaped". Rules of the
            blocks are those of `ShapedBlock`.
    """

    vocab_size: int = setting(MISSING, "Number of tokens of the vocabulary.", check_size)
    kind: str = setting(
        "decoder",
        "Whether tokens see earlier ones only (decoder), or all of them (encoder).",
        choices=KINDS,
    )
    head: str | None = setting(
        "causal_lm",
        'What the hidden states are for: "causal_lm" of decoders, "masked_lm" of encoders, or None '
        "for hidden states alone.",
        choices=HEADS,
    )
    num_labels: int = setting(2, 'Classes of "token_classification".', check_size)
    positions: str = setting("rotary", "How blocks know positions.", choices=POSITIONS)
    max_length: int = setting(
        512,
        'Tokens that the table of "learned" positions has room for; others have no limit.',
        check_size,
    )
    rotary_base: float = setting(10000.0, "Base of the rotary angles.", check_positive)
    tie_embeddings: bool = setting(
        False, "Whether the language-model head uses the matrix of the token embedding."
    )
    final_norm: str | None = setting(
        None,
        "Normalisation before the head.",
        choices=NORMS,
        none='none for "shaped"; for other methods that of the blocks, which for '
        '"simplified_parallel" without is "layer"',
    )
    activation_checkpointing: bool = setting(
        False,
        "Whether training keeps only the stream between blocks and computes the inside of each "
        "again in the backward.",
    )
    norm: str | None = setting(
        None,
        "Normalisation of the blocks; to name one asks for it.",
        choices=NORMS,
        none="that of the method's paper, if there is one at all",
    )
    scale: str | float = setting("width", "Of the logits, as in `ShapedAttention`.")
    learned_gains: Sequence[str] = setting(
        ("identity_gain", "center_gain"), 'Gains that are trained with gain_scheme "learn".'
    )
    trainable_slopes: bool = setting(False, "Whether c_plus and c_minus are trained.")

    def __post_init__(self) -> None:
        """Check every field; make sequences tuples, so that equal configurations compare equal."""
        super().__post_init__()
        if isinstance(self.learned_gains, list):
            object.__setattr__(self, "learned_gains", tuple(self.learned_gains))
        self._check_method()
        # The rules of a block are known to the block; on this device it has no memory.
        block = next(self.build_blocks(device="meta"))
        self._check_together(block.attention.head_dim)

    def _check_method(self) -> None:
        unused, given = (), f'method="{self.method}"'
        if self.method != "shaped":
            unused = SHAPED_FIELDS
        elif self.has_skip is False:
            unused, given = ("branch_gain", "skip_gain"), "has_skip=False"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unused and value != field.default:
                raise ValueError(
                    f"{field.name} must keep its default for {given}, which has its own, got "
                    f'{value!r}. Leave it out, or describe the network with method="shaped".'
                )

    def _check_together(self, head_dim: int) -> None:
        needed_kind = {"causal_lm": "decoder", "masked_lm": "encoder"}.get(self.head, self.kind)
        if self.kind != needed_kind:
            raise ValueError(
                f'head must not be "{self.head}" for kind="{self.kind}", got {self.head!r}. '
                f'Pass kind="{needed_kind}", or another head.'
            )
        if self.tie_embeddings and self.head not in ("causal_lm", "masked_lm"):
            raise ValueError(
                f"tie_embeddings needs a language-model head, got head={self.head!r}. "
                'Pass head="causal_lm" or "masked_lm", or tie_embeddings=False.'
            )
        if self.positions == "rotary" and head_dim % 2 != 0:
            raise ValueError(
                f'head_dim must be even for positions="rotary", which turn pairs, got {head_dim}. '
                "Change head_dim, or width and heads, or take other positions."
            )

    def wiring(self) -> tuple[bool, str | None]:
        """Return whether there are skips, and the normalisation of the blocks or None."""
        return resolve_wiring(self.method, self.has_skip, self.has_normalization, self.norm)

    def block_arguments(self) -> dict[str, Any]:
        """Return the arguments of each `ShapedBlock`, or for other methods of `build_blocks`."""
        has_skip, norm = self.wiring()
        names = inspect.signature(ShapedBlock).parameters.keys() & vars(self).keys()
        found = {name: getattr(self, name) for name in names}
        found |= {"is_causal": self.kind == "decoder", "norm": norm}
        if self.method == "shaped":
            return found if has_skip else found | {"branch_gain": 1.0, "skip_gain": 0.0}
        shared = {name: x for name, x in found.items() if name not in SHAPED_FIELDS}
        return shared | {"method": self.method, "depth": self.depth, "has_skip": has_skip}

    def build_blocks(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[TransformerBlock]:
        """Make the blocks, the first layer first."""
        arguments = self.block_arguments() | {"device": device, "dtype": dtype}
        if self.method != "shaped":
            return build_blocks(**arguments)
        return (ShapedBlock(**arguments) for _ in range(self.depth))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShapedTransformerConfig:
        """Make a configuration from a dict of fields; those left out keep their default.

        Raises:
            ValueError: a key is not the name of a field, or a field without default is missing.
            TypeError, ValueError: as the class itself.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                "values must have the fields of ShapedTransformerConfig as keys, got unknown "
                f"{', '.join(map(repr, unknown))}. The fields are {', '.join(known)}."
            )
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(
                f"values must have {', '.join(map(repr, missing))}, which has no default, got keys "
                f"{sorted(values)}. Add it."
            )
        return cls(**values)

    def to_json(self) -> str:
        """Return all fields and the version of the format as JSON; `from_json` is the inverse."""
        return json.dumps({VERSION_KEY: FORMAT_VERSION, **self.to_dict()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ShapedTransformerConfig:
        """Make a configuration from the JSON of a dict of fields.

        ``format_version`` may be left out.

        Raises:
            ValueError: the text is no JSON of a dict, or of another version.
            TypeError, ValueError: as `from_dict`.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(
                f"text must be the JSON of a dict of fields, got {type(values).__name__}. "
                "to_json writes one."
            )
        version = values.pop(VERSION_KEY, FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{VERSION_KEY} must be {FORMAT_VERSION}, which this version of shaped_attn reads, "
                f"got {version!r}. Load it with the version that wrote it, or a later one."
            )
        return cls.from_dict(values)
