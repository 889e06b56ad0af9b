"""The transformer of every method, encoder or decoder, with its head and its loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import check_kind, check_shape
from .block import make_norm, normalize
from .cache import KeyValueCache
from .config import ShapedTransformerConfig
from .generation import GenerationMixin
from .initialization import Initialized
from .methods import final_norm
from .positions import rotary_table
from .projection import Projection
from .saving import SavingMixin

IGNORED_LABEL = -100
"""Label of tokens that the loss leaves out."""


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


class ShapedTransformer(GenerationMixin, SavingMixin, Initialized, nn.Module):
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
        device, dtype: of the parameters. Default: those of torch.

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

    config_class = ShapedTransformerConfig

    def __init__(
        self,
        config: ShapedTransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        remedy = "Make one, for example with ShapedTransformerConfig.from_dict."
        self.config = check_kind("config", config, ShapedTransformerConfig, remedy)
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
            raise ValueError(
                f"tokens must have a length T of at most max_length = {room} for "
                f'positions="learned", got {length}. Cut them, or raise max_length.'
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
            raise ValueError(
                "labels need a head to be compared with, got a configuration with head=None. "
                "Leave them out, or choose a head."
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
            raise ValueError(f"{name} must be None beside a cache, got a Tensor. {remedies[name]}")


def _check_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a Tensor of integers, got {got}. Pass a LongTensor.")


def _check_ids(name: str, ids: Tensor, size: int, ignored: int | None = None) -> None:
    """Check that every id is below ``size``, from 0 on, or ``ignored``."""
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong &= ids != ignored
    if wrong.any():
        besides = "" if ignored is None else f", or {ignored}"
        where = ", ".join(map(str, wrong.nonzero()[0].tolist()))
        raise ValueError(
            f"{name} must be from 0 to {size - 1}{besides}, got {ids[wrong][0]} at ({where}). "
            "Encode the text for this model, or build the model for these ids."
        )
