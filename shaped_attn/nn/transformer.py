"""The shaped transformer, encoder or decoder, with its head and its loss."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..validation import check_flag, fail
from .block import NORMS, ShapedBlock, make_norm
from .checks import check_choice, check_positive, check_shape, check_size
from .gains import GAIN_NAMES, check_head_gain
from .initialization import Initialized
from .positions import rotary_table
from .projection import Projection

KINDS = ("decoder", "encoder")
HEADS = ("causal_lm", "masked_lm", "token_classification", None)
POSITIONS = ("learned", "rotary", "none")

IGNORED_LABEL = -100
"""Label of tokens that the loss leaves out."""


@dataclass(frozen=True, kw_only=True)
class ShapedTransformerConfig:
    """Everything that defines a `ShapedTransformer`, checked when it is made.

    Attributes:
        vocab_size: number of tokens of the vocabulary.
        width: n, width of the stream. Default 256.
        depth: number of blocks. Default 8.
        kind: "decoder" (the default; causal) or "encoder" (every token sees every other).
        head: "causal_lm" (the default; decoders only), "masked_lm" (encoders only),
            "token_classification", or None for hidden states alone.
        num_labels: classes of "token_classification"; unused otherwise. Default 2.
        positions: "rotary" (the default), "learned" or "none".
        max_length: tokens that the table of "learned" positions has room for; the others have no
            limit. Default 512.
        rotary_base: base of the rotary angles. Default 10000.0.
        tie_embeddings: whether the language-model head uses the matrix of the token embedding.
            Default False.
        final_norm: None (the default), "rms" or "layer", before the head.
        activation_checkpointing: whether training keeps only the stream between blocks and
            computes the inside of each again in the backward. Default False.
        heads, kv_heads, head_dim, branch_gain, skip_gain, preserves_variance, norm, out_proj,
            scale, tau0, identity_gain, softmax_gain, center_gain, gain_scheme, learned_gains, impl,
            mlp_ratio, c_plus, c_minus, trainable_slopes: of every block, with the defaults of
            `ShapedBlock`, except 4 heads. Gains per head are stored as tuples.

    Raises:
        TypeError: a value has the wrong type, or a field without default is missing.
        ValueError: a value is out of range, an unknown choice, or fields contradict each other.
            Rules of the blocks are those of `ShapedBlock`.
    """

    vocab_size: int
    width: int = 256
    depth: int = 8
    kind: str = "decoder"
    head: str | None = "causal_lm"
    num_labels: int = 2
    positions: str = "rotary"
    max_length: int = 512
    rotary_base: float = 10000.0
    tie_embeddings: bool = False
    final_norm: str | None = None
    activation_checkpointing: bool = False

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    branch_gain: float = 0.5
    skip_gain: float | None = None
    preserves_variance: bool = True
    norm: str | None = None
    out_proj: str = "none"
    scale: str | float = "width"
    tau0: float = 1.0
    identity_gain: float | Sequence[float] = 1.0
    softmax_gain: float | Sequence[float] = 1.0
    center_gain: float | Sequence[float] | None = None
    gain_scheme: str = "fixed"
    learned_gains: Sequence[str] = ("identity_gain", "center_gain")
    impl: str = "auto"
    mlp_ratio: float = 1.0
    c_plus: float = 0.0
    c_minus: float = -1.0
    trainable_slopes: bool = False

    def __post_init__(self) -> None:
        """Check every field; make sequences tuples, so that equal configurations compare equal."""
        for name in ("vocab_size", "width", "depth", "num_labels", "max_length", "heads"):
            check_size(name, getattr(self, name))
        check_choice("kind", self.kind, KINDS)
        check_choice("head", self.head, HEADS)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("final_norm", self.final_norm, NORMS)
        check_positive("rotary_base", self.rotary_base)
        check_flag("tie_embeddings", self.tie_embeddings)
        check_flag("activation_checkpointing", self.activation_checkpointing)
        for name in GAIN_NAMES:
            gain = getattr(self, name)
            if gain is not None:
                object.__setattr__(self, name, check_head_gain(name, gain, self.heads))
        if isinstance(self.learned_gains, list):
            object.__setattr__(self, "learned_gains", tuple(self.learned_gains))
        # The rules of a block are known to the block; on this device it has no memory.
        block = ShapedBlock(**self.block_arguments(), device="meta")
        self._check_together(block.attention.head_dim)

    def _check_together(self, head_dim: int) -> None:
        needed_kind = {"causal_lm": "decoder", "masked_lm": "encoder"}.get(self.head, self.kind)
        if self.kind != needed_kind:
            fail(
                ValueError,
                "head",
                f'must not be "{self.head}" for kind="{self.kind}"',
                repr(self.head),
                f'Pass kind="{needed_kind}", or another head.',
            )
        if self.tie_embeddings and self.head not in ("causal_lm", "masked_lm"):
            fail(
                ValueError,
                "tie_embeddings",
                "needs a language-model head",
                f"head={self.head!r}",
                'Pass head="causal_lm" or "masked_lm", or tie_embeddings=False.',
            )
        if self.positions == "rotary" and head_dim % 2 != 0:
            fail(
                ValueError,
                "head_dim",
                'must be even for positions="rotary", which turn pairs',
                head_dim,
                "Change head_dim, or width and heads, or take other positions.",
            )

    def block_arguments(self) -> dict[str, Any]:
        """Return the arguments of each `ShapedBlock`."""
        taken = inspect.signature(ShapedBlock).parameters
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in taken}
        return shared | {"is_causal": self.kind == "decoder"}

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
            fail(
                ValueError,
                "values",
                "must have the fields of ShapedTransformerConfig as keys",
                f"unknown {', '.join(map(repr, unknown))}",
                f"The fields are {', '.join(known)}.",
            )
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            fail(
                ValueError,
                "values",
                f"must have {', '.join(map(repr, missing))}, which has no default",
                f"keys {sorted(values)}",
                "Add it.",
            )
        return cls(**values)

    def to_json(self) -> str:
        """Return all fields as JSON; `from_json` is the inverse."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ShapedTransformerConfig:
        """Make a configuration from the JSON of a dict of fields. Raises as `from_dict`."""
        return cls.from_dict(json.loads(text))


class ShapedTransformerOutput(NamedTuple):
    """What a `ShapedTransformer` returns.

    Attributes:
        hidden_states: (B, T, width) the stream after the last block and the final norm.
        logits: (B, T, vocab_size or num_labels), or None without a head.
        loss: () float32 (float64 for float64 logits), or None without labels.
    """

    hidden_states: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None


class ShapedTransformer(Initialized, nn.Module):
    r"""Shaped transformer: embeddings, ``depth`` times a `ShapedBlock`, final norm, head.

    The stream starts at X_i = E(token_i), or ( E(token_i) + P(i) ) / sqrt(2) with learned
    positions P, so that V_ii = |X_i|^2 / width is 1 on average whatever the width. A tied head
    computes logits X E^T / sqrt(width), which at the start have the law of an untied one.

    ============================= ======================= ====================================
    parameter                     shape                   initial law
    ============================= ======================= ====================================
    ``embedding.weight``          (vocab_size, width)     N(0, 1), independent
    ``position_embedding.weight`` (max_length, width)     N(0, 1), independent ("learned" only)
    ``blocks.*``                                          see `ShapedBlock`
    ``final_norm.weight``         (width,)                1
    ``final_norm.bias``           (width,)                0 ("layer" only)
    ``head.weight``               (vocab_size or          N(0, 1/width), independent; absent
                                  num_labels, width)      if tied or without a head
    ============================= ======================= ====================================

    The laws of the blocks are those of the papers; embeddings and heads, which the papers' theory
    does not have, are chosen such that the stream starts, and logits stay, at variance 1.

    Args:
        config: a `ShapedTransformerConfig`.
        device: of the parameters. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    Raises:
        TypeError: ``config`` is something else.

    Example:
        >>> import torch
        >>> from shaped_attn.nn import ShapedTransformer, ShapedTransformerConfig
        >>> model = ShapedTransformer(ShapedTransformerConfig(vocab_size=256, width=64, depth=2))
        >>> tokens = torch.randint(256, (2, 16))
        >>> out = model(tokens, labels=tokens)
        >>> out.logits.shape
        torch.Size([2, 16, 256])
        >>> out.loss.backward()

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759; covariance-sde.md, section 1.
    """

    def __init__(
        self,
        config: ShapedTransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, ShapedTransformerConfig):
            fail(
                TypeError,
                "config",
                "must be a ShapedTransformerConfig",
                type(config).__name__,
                "Make one, for example with ShapedTransformerConfig.from_dict.",
            )
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.width, **factory)
        self.position_embedding = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_length, config.width, **factory)
        self.blocks = nn.ModuleList(
            ShapedBlock(**config.block_arguments(), **factory) for _ in range(config.depth)
        )
        self.final_norm = make_norm(config.final_norm, config.width, **factory)
        self.head = None
        if config.head is not None and not config.tie_embeddings:
            is_classifier = config.head == "token_classification"
            outputs = config.num_labels if is_classifier else config.vocab_size
            self.head = Projection(config.width, outputs, **factory)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> ShapedTransformerOutput:
        """Return hidden states, logits if there is a head, and the loss if there are labels.

        Args:
            tokens: (B, T) integers from 0 to vocab_size - 1.
            labels: (B, T) integers, -100 where there is nothing to predict, such as at padding.
                For "causal_lm" they are the tokens themselves: position i is scored on label i + 1.
                Default None: no loss.
            key_start: (B,) int, first token that is not padding; learned positions count from it.
                Default 0.
            key_end: (B,) int, one past the last token that is not padding. Default T.
            attn_mask: bool, broadcastable to (B, heads, T, T), True where a query sees a key.
                Default None: no further mask.

        Returns:
            A `ShapedTransformerOutput`. The loss is the mean cross-entropy in nats over the labels
            that are not -100, and 0 if there are none. Rows of padding tokens mean nothing.

        Raises:
            TypeError: tokens or labels are not integers.
            ValueError: shapes do not fit, more tokens than learned positions, or labels without a
                head.
        """
        _check_integers("tokens", tokens)
        check_shape("tokens", tokens, ("B", "T"))
        if labels is not None:
            self._check_labels(labels, tokens)
        hidden = self._embed(tokens, key_start)
        rotary = None
        if self.config.positions == "rotary":
            head_dim = self.blocks[0].attention.head_dim
            rotary = rotary_table(
                tokens.shape[1],
                head_dim,
                self.config.rotary_base,
                device=hidden.device,
                dtype=hidden.dtype,
            )
        options = {
            "key_start": key_start,
            "key_end": key_end,
            "attn_mask": attn_mask,
            "rotary": rotary,
        }
        for block in self.blocks:
            if self.config.activation_checkpointing:
                hidden = checkpoint(
                    block, hidden, **options, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = block(hidden, **options)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        logits = self._logits(hidden)
        loss = None if labels is None else self._loss(logits, labels)
        return ShapedTransformerOutput(hidden, logits, loss)

    def _embed(self, tokens: Tensor, key_start: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        if self.position_embedding is None:
            return x
        length, room = tokens.shape[1], self.config.max_length
        if length > room:
            fail(
                ValueError,
                "tokens",
                f'must have a length T of at most max_length = {room} for positions="learned"',
                length,
                "Cut them, or raise max_length.",
            )
        position = torch.arange(length, device=tokens.device)
        if key_start is not None:
            position = (position - key_start[:, None]).clamp(min=0)
        return (x + self.position_embedding(position)) / math.sqrt(2)

    def _logits(self, hidden: Tensor) -> Tensor | None:
        if self.config.head is None:
            return None
        if self.head is None:
            return F.linear(hidden / math.sqrt(self.config.width), self.embedding.weight)
        return self.head(hidden)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.head == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten().long(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        return total / (labels != IGNORED_LABEL).sum().clamp(min=1)

    def _check_labels(self, labels: Tensor, tokens: Tensor) -> None:
        _check_integers("labels", labels)
        check_shape("labels", labels, tuple(tokens.shape))
        if self.config.head is None:
            fail(
                ValueError,
                "labels",
                "need a head to be compared with",
                "a configuration with head=None",
                "Leave them out, or choose a head.",
            )

    def extra_repr(self) -> str:
        """Return what the submodules do not show."""
        config = self.config
        return (
            f"kind={config.kind!r}, head={config.head!r}, positions={config.positions!r}, "
            f"tie_embeddings={config.tie_embeddings}"
        )


def _check_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        fail(TypeError, name, "must be a Tensor of integers", got, "Pass a LongTensor.")
