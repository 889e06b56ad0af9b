"""The transformer of every method, encoder or decoder, with its head and its loss."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import check_choice, check_flag, check_positive, check_shape, check_size, fail
from . import saving
from .block import NORMS, ShapedBlock, TransformerBlock, make_norm, normalize
from .gains import GAIN_NAMES, check_head_gain
from .generation import KeyValueCache, generate
from .initialization import Initialized
from .methods import build_blocks, final_norm, resolve_wiring
from .positions import rotary_table
from .projection import Projection

KINDS = ("decoder", "encoder")
HEADS = ("causal_lm", "masked_lm", "token_classification", None)
POSITIONS = ("learned", "rotary", "none")

SHAPED_FIELDS = (
    "branch_gain",
    "skip_gain",
    "preserves_variance",
    "out_proj",
    "scale",
    "tau0",
    "identity_gain",
    "softmax_gain",
    "center_gain",
    "gain_scheme",
    "learned_gains",
    "c_plus",
    "c_minus",
    "trainable_slopes",
)
"""Fields that describe `ShapedBlock` and have no meaning for other methods."""

VERSION_KEY, FORMAT_VERSION = "format_version", 1
"""Of the JSON of a configuration."""

IGNORED_LABEL = -100
"""Label of tokens that the loss leaves out."""


@dataclass(frozen=True, kw_only=True)
class ShapedTransformerConfig:
    """Everything that defines a `ShapedTransformer`, checked when it is made.

    Attributes:
        vocab_size: number of tokens of the vocabulary.
        method: "shaped" (the default), "simplified", "simplified_parallel", "value_skipinit",
            "u_spa", "e_spa" or "pre_ln"; see `ShapedTransformer`.
        has_skip: whether there are skips. Default None: what the method's paper has. "shaped"
            without skips has ``branch_gain`` 1. The simplified methods never have one around their
            attention; that around the MLP of "simplified" always is.
        has_normalization: whether blocks read a normalised stream. Default None: if ``norm`` is
            given, else what the method's paper has.
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
        final_norm: "rms" or "layer", before the head. Default None: none for "shaped"; for other
            methods that of the blocks, which for "simplified_parallel" without is "layer".
        activation_checkpointing: whether training keeps only the stream between blocks and
            computes the inside of each again in the backward. Default False.
        norm: "rms" or "layer", the normalisation of the blocks. Default None: that of the method's
            paper, if there is one at all.
        heads, kv_heads, head_dim, impl, mlp_ratio: of every block, with the defaults of
            `ShapedBlock`, except 4 heads.
        branch_gain, skip_gain, preserves_variance, out_proj, scale, tau0: of every block of
            "shaped", with the defaults of `ShapedBlock`; of other methods they are part of what
            the method is.
        identity_gain, softmax_gain, center_gain, gain_scheme, learned_gains: likewise. Gains per
            head are stored as tuples.
        c_plus, c_minus, trainable_slopes: likewise.

    Raises:
        TypeError: a value has the wrong type, or a field without default is missing.
        ValueError: a value is out of range, an unknown choice, or fields contradict each other; a
            method with a wiring that no paper gives it, or with fields of "shaped". Rules of the
            blocks are those of `ShapedBlock`.
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

    method: str = "shaped"
    has_skip: bool | None = None
    has_normalization: bool | None = None

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
                fail(
                    ValueError,
                    field.name,
                    f"must keep its default for {given}, which has its own",
                    repr(value),
                    'Leave it out, or describe the network with method="shaped".',
                )

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

    def wiring(self) -> tuple[bool, str | None]:
        """Return whether there are skips, and the normalisation of the blocks or None."""
        return resolve_wiring(self.method, self.has_skip, self.has_normalization, self.norm)

    def block_arguments(self) -> dict[str, Any]:
        """Return the arguments of each `ShapedBlock`, or for other methods of `build_blocks`."""
        has_skip, norm = self.wiring()
        is_shaped = self.method == "shaped"
        taken = inspect.signature(ShapedBlock if is_shaped else build_blocks).parameters
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in taken}
        shared |= {"is_causal": self.kind == "decoder", "norm": norm}
        if not is_shaped:
            return shared | {"has_skip": has_skip}
        return shared if has_skip else shared | {"branch_gain": 1.0, "skip_gain": 0.0}

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
            rule = "must be the JSON of a dict of fields"
            fail(ValueError, "text", rule, type(values).__name__, "to_json writes one.")
        version = values.pop(VERSION_KEY, FORMAT_VERSION)
        if version != FORMAT_VERSION:
            fail(
                ValueError,
                VERSION_KEY,
                f"must be {FORMAT_VERSION}, which this version of shaped_attn reads",
                repr(version),
                "Load it with the version of shaped_attn that wrote it, or a later one.",
            )
        return cls.from_dict(values)


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
    r"""Transformer of one of seven methods: embeddings, ``depth`` blocks, final norm, head.

    "shaped"
        `ShapedBlock`, arXiv 2306.17759. With skips and without normalisation unless told otherwise.
    "simplified"
        SAS of 2311.01906: no skip around the attention, no W_V and W_O, W_Q = 0; head h mixes the
        h-th slice of the normalised stream with (P10), whose three gains are trained, and at the
        start returns it unchanged. The MLP has a skip and starts with the weight
        0.1 sqrt(18 / depth); this weight and that of the attention are trained. The first layer
        keeps W_V = value_identity_gain I + value_weight_gain W, W = 0. RMSNorm, ReLU.
    "simplified_parallel"
        SAS-P: the same, with attention and MLP side by side and no skip at all. Without
        normalisation a LayerNorm in front of the first block and one before the head remain, as
        in the code of the authors.
    "value_skipinit"
        2302.10322: attention matrices identity_gain I + softmax_gain softmax, both trained from
        1 and 0. W_Q = 0, and W_V, W_O and the MLP are orthogonal. No skip and no normalisation.
    "u_spa", "e_spa"
        2302.10322: the same weights, and priors `shaped_attn.USPA.schedule(depth)` or
        `shaped_attn.ESPA.schedule(depth)`: the tokens, if they start uncorrelated, have the
        correlation 0.8, or exp(-0.005 |i-j|), after the last attention.
    "pre_ln"
        The standard block: softmax attention, skips of weight 1, LayerNorm, ReLU, N(0, 0.02^2).

    The last four may have skips or not, and normalisation (LayerNorm in front of each half) or not.
    Without normalisation nothing rescales a stream, so weights, activation and skips each keep its
    mean square: "pre_ln" then has weights N(0, 1/in), and skips are normalised, 0.98 X +
    sqrt(1 - 0.98^2) branch(X). Methods of 2302.10322 are like that with normalisation too. The
    activation of networks like that is `TailoredLeakyReLU`: sqrt(2) ReLU with skips, and the slope
    `tat_slope(depth)` without them, where every MLP correlates the tokens. "pre_ln" without skips
    and normalisation is so what the papers call vanilla, and differs from "e_spa" in its attention
    and the law of its weights alone.

    All methods but "shaped" have the scale 1/sqrt(head_dim). No projection has a bias. With W_Q = 0
    W_K gets no gradient before W_Q has moved; nor do, in the first step, W_Q and W_K of
    "value_skipinit", whose softmax starts with the weight 0, and ``value_weight_gain``.

    The stream starts at X_i = E(token_i), or ( E(token_i) + P(i) ) / sqrt(2) with learned
    positions P, so that V_ii = |X_i|^2 / width is 1 on average whatever the width. A tied head
    computes logits X E^T / sqrt(width), which at the start have the law of an untied one.

    | parameter                     | shape               | initial law |
    | --- | --- | --- |
    | ``embedding.weight``          | (vocab_size, width) | N(0, 1), independent |
    | ``position_embedding.weight`` | (max_length, width) | the same ("learned" only) |
    | ``blocks.*``                  |                     | see `TransformerBlock`, `ShapedBlock` |
    | ``final_norm.weight``         | (width,)            | 1 |
    | ``final_norm.bias``           | (width,)            | 0 ("layer" only) |
    | ``head.weight``               | (classes, width)    | N(0, 1/width), independent |

    There is no ``head.weight`` without a head or with tied embeddings; its classes are vocab_size
    or num_labels.

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
        - Noci et al., The Shaped Transformer, arXiv 2306.17759; covariance-sde.md, section 1.
        - He et al., Deep Transformers without Shortcuts, arXiv 2302.10322.
        - He and Hofmann, Simplifying Transformer Blocks, arXiv 2311.01906.
        - papers.md, which tells what of them is confirmed.
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
        self.blocks = nn.ModuleList(config.build_blocks(**factory))
        norm = config.final_norm or final_norm(config.method, config.wiring()[1])
        self.final_norm = make_norm(norm, config.width, **factory)
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
        cache: KeyValueCache | None = None,
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
            cache: of the tokens before these, to which these are added; it has the ``key_start``,
                and takes the place of the other arguments. Only under ``torch.no_grad()``. Default
                None: these are all tokens.

        Returns:
            A `ShapedTransformerOutput`. The loss is the mean cross-entropy in nats over the labels
            that are not -100, and 0 if there are none. Rows of padding tokens mean nothing.

        Raises:
            TypeError: tokens or labels are not integers.
            ValueError: shapes do not fit, more tokens than learned positions, labels without a
                head; a cache that has no room, of an encoder, or beside arguments whose place it
                takes; on a CPU an id or a label that the vocabulary, or the classes, do not have.
                Elsewhere, and under torch.compile, that is an error of torch's own kernels: to
                look before would wait for the device.
        """
        _check_integers("tokens", tokens)
        check_shape("tokens", tokens, ("B", "T"))
        if labels is not None:
            self._check_labels(labels, tokens)
        start = 0
        if cache is not None:
            _check_without_cache(
                labels=labels, key_start=key_start, key_end=key_end, attn_mask=attn_mask
            )
            start, key_start = cache.length, cache.key_start
        hidden = self._embed(tokens, key_start, start)
        rotary = None
        if self.config.positions == "rotary":
            head_dim = self.blocks[0].attention.head_dim
            rotary = rotary_table(
                tokens.shape[1],
                head_dim,
                self.config.rotary_base,
                start=start,
                device=hidden.device,
                dtype=hidden.dtype,
            )
        options = {
            "key_start": key_start,
            "key_end": key_end,
            "attn_mask": attn_mask,
            "rotary": rotary,
        }
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                options["cache"] = cache.layer(layer)
            if self.config.activation_checkpointing:
                hidden = checkpoint(
                    block, hidden, **options, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = block(hidden, **options)
        if cache is not None:
            cache.advance(tokens.shape[1])
        if self.final_norm is not None:
            hidden = normalize(hidden, self.final_norm)
        logits = self._logits(hidden)
        loss = None if labels is None else self._loss(logits, labels)
        return ShapedTransformerOutput(hidden, logits, loss)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key_start: Tensor | None = None,
        end_token: int | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Continue sequences token by token, each computed once with a `KeyValueCache`.

        Every method can, and what it gives is what the model without a cache gives, up to rounding.
        No gradient is kept.

        Args:
            tokens: (B, T) integers, T at least 1: the prompts. Shorter ones have padding in front;
                `pad_left` makes ``tokens`` and ``key_start`` of prompts of different lengths.
            max_new_tokens: how many to add to each. Learned positions limit T + max_new_tokens to
                ``max_length``.
            temperature: 0.0, the default, takes the most likely token, of equal ones the first.
                Otherwise tokens are drawn from softmax(logits / temperature).
            top_k: draw from the k most likely tokens alone. Default None: from all.
            top_p: draw from the fewest most likely tokens (of the k) whose probabilities add up to
                at least p, above 0 and at most 1. Default None: from all.
            key_start: (B,) int, first token of each prompt that is not padding. Default None: no
                padding.
            end_token: after it a sequence is filled with it, and when all have it no further tokens
                are computed. Default None: none ends a sequence.
            generator: source of the draws, on the device of the model; equal states of it give
                equal tokens. Default None: torch's global one.

        Returns:
            (B, T + n) of the dtype of ``tokens``, the prompts in front; n is ``max_new_tokens``, or
            less if all sequences have ended.

        Raises:
            TypeError, ValueError: a model without head "causal_lm", an argument out of its range,
                ``top_k``, ``top_p`` or ``generator`` at temperature 0, logits that are not finite;
                and as ``forward``.
        """
        return generate(
            self,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            key_start=key_start,
            end_token=end_token,
            generator=generator,
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.json``, the configuration, and ``model.safetensors``, the weights.

        Args:
            folder: made if it is not there. A model that is in it is not overwritten.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: the folder cannot be written, or has a model.
            ValueError: the weights are not those of the configuration, such as stacks.
        """
        saving.save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ShapedTransformer:
        """Make the model that `save_pretrained`, or a finished `shaped-attn train`, has written.

        Args:
            folder: that has ``model.json`` and ``model.safetensors``.
            device: of the parameters. Default: torch's default device.
            dtype: of the parameters. Default: as they were saved, bit for bit.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: a file is missing or cannot be read.
            ValueError: a file is damaged, or of another format or version; the two do not fit.
        """
        return saving.load(cls, ShapedTransformerConfig, folder, device, dtype)

    def _embed(self, tokens: Tensor, key_start: Tensor | None, start: int) -> Tensor:
        # Of other integers torch has no embedding.
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.int32))
        try:
            x = self.embedding(tokens)
        except IndexError:  # torch has looked at them anyway
            _check_ids("tokens", tokens, self.config.vocab_size)
            raise
        if self.position_embedding is None:
            return x
        length, room = start + tokens.shape[1], self.config.max_length
        if length > room:
            fail(
                ValueError,
                "tokens",
                f'must have a length T of at most max_length = {room} for positions="learned"',
                length,
                "Cut them, or raise max_length.",
            )
        position = torch.arange(start, length, device=tokens.device)
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
        given = labels
        if self.config.head == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        try:
            total = F.cross_entropy(
                logits.flatten(0, 1),
                labels.flatten().long(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
        except IndexError:
            _check_ids("labels", given, logits.shape[-1], IGNORED_LABEL)
            raise
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
            f"method={config.method!r}, kind={config.kind!r}, head={config.head!r}, "
            f"positions={config.positions!r}, "
            f"tie_embeddings={config.tie_embeddings}"
        )


def _check_without_cache(**arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            remedies = {
                "labels": "Compute losses without a cache.",
                "key_start": "Give it to the cache: KeyValueCache(capacity, key_start=key_start).",
                "key_end": "Put padding in front of the tokens; pad_left does.",
                "attn_mask": "Read the whole sequences without a cache.",
            }
            fail(ValueError, name, "must be None beside a cache", "a Tensor", remedies[name])


def _check_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        fail(TypeError, name, "must be a Tensor of integers", got, "Pass a LongTensor.")


def _check_ids(name: str, ids: Tensor, size: int, ignored: int | None = None) -> None:
    """Check that every id is below ``size``, from 0 on, or ``ignored``."""
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong &= ids != ignored
    if wrong.any():
        besides = "" if ignored is None else f", or {ignored}"
        where = ", ".join(map(str, wrong.nonzero()[0].tolist()))
        fail(
            ValueError,
            name,
            f"must be from 0 to {size - 1}{besides}",
            f"{ids[wrong][0]} at ({where})",
            "Encode the text for this model, or build the model for these ids.",
        )
