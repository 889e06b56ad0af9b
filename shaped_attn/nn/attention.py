"""Multi-head shaped self-attention, with its residual."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import Gain
from ..checks import (
    check_choice,
    check_choice_or_number,
    check_divides,
    check_flag,
    check_positive,
    check_shape,
    check_size,
)
from ..functional import shaped_attention
from ..priors import ESPA, USPA
from ..validation import IMPLEMENTATIONS
from .cache import LayerCache
from .gains import ShapingGains
from .initialization import WEIGHT_LAWS, Initialized, Law, constant
from .positions import Rotary, rotate
from .projection import Projection

QUERY_PROJECTIONS = ("gaussian", "gpt2", "zero")
KEY_PROJECTIONS = ("gaussian", "gpt2")
VALUE_PROJECTIONS = ("gaussian", "orthogonal", "gpt2", "none", "identity")
OUT_PROJECTIONS = ("none", "gaussian", "orthogonal", "gpt2")

# The kernels take at most 256 columns of values at once.
MATRIX_COLUMNS = 64


class ShapedAttention(Initialized, nn.Module):
    r"""Shaped self-attention of one or several heads, mixed with a residual.

    For x (B, T, width), per head:

        Z = skip_gain * residual + branch_gain * concat_h( A_h X W_V,h ) W_O

        A = identity_gain I + softmax_gain softmax(Y) - center_gain A0
        Y = scale * (X W_Q) (X W_K)^T ,      scale = 1 / (tau0 sqrt(width head_dim))

    A0 is the matrix of the softmax at zero logits: uniform over the keys that a query sees, or a
    ``prior``, with which the softmax is D softmax(Y + log A0) as in `shaped_attn.shaped_attention`.
    Without W_O the residual is mixed in the epilogue of the attention operator, with it in that of
    the product with W_O, so that neither costs a pass over memory of its own.

    | parameter               | shape                         | initial law |
    | --- | --- | --- |
    | ``query.weight``        | (heads head_dim, width)       | ``query_proj`` |
    | ``key.weight``          | (kv_heads head_dim, width)    | ``key_proj`` |
    | ``value.weight``        | (kv_heads width/heads, width) | ``value_proj``; "identity": 0 |
    | ``value_identity_gain`` | ()                            | 1 ("identity" only) |
    | ``value_weight_gain``   | ()                            | 1 ("identity" only) |
    | ``out_proj.weight``     | (width, width)                | ``out_proj`` |
    | ``gains.*``             | (heads,)                      | see `ShapingGains` |

    The laws are "gaussian", N(0, 1/width), "gpt2", N(0, 0.02^2), "orthogonal", the Haar measure,
    and "zero". A product with a "gaussian" weight is the product with an N(0, 1) matrix divided by
    sqrt(width), as the papers write it. Any of the weights may be replaced by a stack
    (networks, out, in) if all are; x is then (networks, T, width).

    Args:
        width: n, size of the last dimension of x.
        heads: number H of query heads, a divisor of ``width``. Default 1.
        kv_heads: number of key-value heads, a divisor of ``heads``; query head h reads key-value
            head h // (heads // kv_heads). Default None: ``heads``.
        head_dim: n_k, columns of q and k per head. Values always have width // heads. Default None:
            width // heads.
        is_causal: whether no query sees a later key. Default False.
        query_proj: law of W_Q: "gaussian" (the default), "gpt2" or "zero", with which all logits
            start at 0, and W_K gets no gradient until W_Q has moved.
        key_proj: law of W_K: "gaussian" (the default) or "gpt2".
        value_proj: law of W_V: "gaussian" (the default), "orthogonal" or "gpt2"; "none" for no such
            factor, with which head h mixes the h-th slice of x itself; or "identity", which is
            W_V = value_identity_gain I + value_weight_gain W with W = 0 at the start.
        out_proj: W_O: "none" (the default: no such factor), or its law, "gaussian", "orthogonal" or
            "gpt2".
        prior: `shaped_attn.ESPA` or `shaped_attn.USPA`. Default None: the uniform A0.
        scale: "width" (the default) is 1 / (tau0 sqrt(width head_dim)), "standard" is
            1 / (tau0 sqrt(head_dim)), a number is the scale itself. Only the first has a covariance
            SDE.
        tau0: temperature constant. Default 1.0.
        identity_gain, softmax_gain, center_gain: weights of I, of the softmax and of A0, as in
            `ShapingGains`.
        gain_scheme, learned_gains: likewise.
        impl: as in `shaped_attn.shaped_attention`. Default "auto".
        deterministic: whether equal inputs give equal bits, as there. Default True.
        device, dtype: of the parameters. Default: those of torch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive or does not divide the other, an unknown choice, a
            number that is not finite, ``tau0`` given beside a scale that is a number, grouped heads
            whose values are slices of x.

    References:
        - Noci et al., The Shaped Transformer, arXiv 2306.17759; papers.md (P3), (P4).
        - covariance-sde.md (1), (5), (6); heads and W_O: (32)-(34).
        - He et al., Deep Transformers without Shortcuts, arXiv 2302.10322; papers.md (P8).
        - He and Hofmann, Simplifying Transformer Blocks, arXiv 2311.01906, equations (5), (6);
          papers.md (P9), (P10).
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        query_proj: str = "gaussian",
        key_proj: str = "gaussian",
        value_proj: str = "gaussian",
        out_proj: str = "none",
        prior: ESPA | USPA | None = None,
        scale: str | float = "width",
        tau0: float = 1.0,
        identity_gain: float | Sequence[float] = 1.0,
        softmax_gain: float | Sequence[float] = 1.0,
        center_gain: float | Sequence[float] | None = None,
        gain_scheme: str = "fixed",
        learned_gains: Sequence[str] = ("identity_gain", "center_gain"),
        impl: str = "auto",
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = check_size("width", width)
        self.heads = check_size("heads", heads)
        check_divides("heads", heads, "width", width)
        self.kv_heads = check_size("kv_heads", heads if kv_heads is None else kv_heads)
        check_divides("kv_heads", self.kv_heads, "heads", heads)
        value_dim = width // heads
        self.head_dim = check_size("head_dim", value_dim if head_dim is None else head_dim)
        self.is_causal = check_flag("is_causal", is_causal)
        check_choice("query_proj", query_proj, QUERY_PROJECTIONS)
        check_choice("key_proj", key_proj, KEY_PROJECTIONS)
        check_choice("value_proj", value_proj, VALUE_PROJECTIONS)
        check_choice("out_proj", out_proj, OUT_PROJECTIONS)
        has_sliced_values = value_proj in ("none", "identity")
        if has_sliced_values and self.kv_heads != heads:
            raise ValueError(
                f'kv_heads must be heads, {heads}, for value_proj="{value_proj}", got '
                f"{self.kv_heads}. Leave it out: each head has its own slice of x as values."
            )
        if prior is not None and not isinstance(prior, ESPA | USPA):
            raise TypeError(
                f"prior must be an ESPA, a USPA or None, got {type(prior).__name__}. "
                "Call shaped_attention for another prior."
            )
        self.prior = prior
        self.impl = check_choice("impl", impl, IMPLEMENTATIONS)
        self.deterministic = check_flag("deterministic", deterministic)
        self.scale = _resolve_scale(scale, tau0, width, self.head_dim)

        factory = {"device": device, "dtype": dtype}

        def projection(out_features: int, law: str) -> Projection:
            return Projection(width, out_features, law=WEIGHT_LAWS[law], **factory)

        self.query = projection(self.heads * self.head_dim, query_proj)
        self.key = projection(self.kv_heads * self.head_dim, key_proj)
        self.value = self.out_proj = None
        self.value_identity_gain = self.value_weight_gain = None
        if value_proj == "identity":
            self.value = projection(width, "zero")
            self.value_identity_gain = nn.Parameter(torch.ones((), **factory))
            self.value_weight_gain = nn.Parameter(torch.ones((), **factory))
        elif value_proj != "none":
            self.value = projection(self.kv_heads * value_dim, value_proj)
        if out_proj != "none":
            self.out_proj = projection(width, out_proj)
        self.gains = ShapingGains(
            heads,
            identity_gain=identity_gain,
            softmax_gain=softmax_gain,
            center_gain=center_gain,
            gain_scheme=gain_scheme,
            learned_gains=learned_gains,
            **factory,
        )

    def laws(self) -> dict[str, Law]:
        """Return the start values of the gains of the values."""
        return {"value_identity_gain": constant(1.0), "value_weight_gain": constant(1.0)}

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        skip_gain: Gain = 1.0,
        branch_gain: Gain = 1.0,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return ``skip_gain * residual + branch_gain * attention(x)``, (B, T, width).

        Args:
            x: (B, T, width), dtype of the parameters unless under autocast.
            residual: (B, T, width), dtype of x or a wider one, which the result then has; autocast
                does not narrow it. Default None: no such term.
            skip_gain: number or Tensor of shape (), weight of ``residual``. Default 1.0, the only
                value without a residual.
            branch_gain: weight of the attention. Default 1.0. As a number it goes into the product
                with W_O if there is one; a Tensor of shape () or (heads,) goes into the operator.
            key_start: (B,) int, first key that is not padding. Default 0.
            key_end: (B,) int, one past the last key that is not padding. Default T.
            attn_mask: bool, broadcastable to (B, heads, T, T), True where a query sees a key.
                Default None: no further mask.
            rotary: cosines and sines of `rotary_table` that turn q and k. Default None.
            cache: a layer of a `KeyValueCache`; x then follows the tokens in it, and S of them and
                x takes the place of T in the ranges and the mask. Default None.

        Raises:
            TypeError, ValueError: from the check of shapes here, from `shaped_attention` and from
                the cache; a cache without ``is_causal``.
        """
        q, k, operator = self._operator(x, rotary, key_start, key_end, attn_mask)
        v = _split(self._values(x), self.kv_heads)
        if cache is not None:
            if not self.is_causal:
                raise ValueError(
                    "cache needs is_causal=True: what earlier tokens see must not change with "
                    "later ones, got an attention without a causal mask. "
                    "Read the whole sequence without a cache, or build a decoder."
                )
            k, v = cache.append(k, v)
        if self.out_proj is None:
            if residual is not None:
                check_shape("residual", residual, tuple(x.shape))
                residual = _split(residual, self.heads)
            gains = {"skip_gain": skip_gain, "branch_gain": branch_gain}
            return _merge(shaped_attention(q, k, v, residual, **gains, **operator))
        if isinstance(branch_gain, Tensor):
            out = shaped_attention(q, k, v, branch_gain=branch_gain, **operator)
            return self.out_proj(_merge(out), residual, skip_gain)
        out = shaped_attention(q, k, v, **operator)
        return self.out_proj(_merge(out), residual, skip_gain, branch_gain)

    def attention_matrix(
        self,
        x: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Return the matrix A by which ``forward`` multiplies the values, (B, heads, T, T).

        It is not rebuilt from its formula: the values handed to the operator are the columns of the
        identity matrix, and what comes out is A. Arguments as in ``forward``.
        """
        q, k, operator = self._operator(x, rotary, key_start, key_end, attn_mask)
        batch, length, _ = x.shape
        identity = torch.eye(length, max(length, 1), dtype=q.dtype, device=q.device)
        parts = [
            shaped_attention(q, k, values.expand(batch, self.kv_heads, -1, -1), **operator)
            for values in identity.split(MATRIX_COLUMNS, dim=-1)
        ]
        return torch.cat(parts, dim=-1)[..., :length]

    def _values(self, x: Tensor) -> Tensor:
        if self.value is None:
            return x
        if self.value_identity_gain is None:
            return self.value(x)
        return self.value(x, x, self.value_identity_gain, self.value_weight_gain)

    def _operator(
        self,
        x: Tensor,
        rotary: Rotary | None,
        key_start: Tensor | None,
        key_end: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict]:
        """Return q, k, and the keyword arguments of the operator that follow from this module."""
        check_shape("x", x, ("B", "T", self.width))
        q = _split(self.query(x), self.heads)
        k = _split(self.key(x), self.kv_heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return (
            q,
            k,
            {
                **self.gains(),
                "scale": self.scale,
                "is_causal": self.is_causal,
                "key_start": key_start,
                "key_end": key_end,
                "attn_mask": attn_mask,
                "prior": self.prior,
                "impl": self.impl,
                "deterministic": self.deterministic,
            },
        )

    def extra_repr(self) -> str:
        """Return sizes, scale, prior and implementation."""
        prior = "" if self.prior is None else f"prior={self.prior}, "
        return (
            f"width={self.width}, heads={self.heads}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, is_causal={self.is_causal}, scale={self.scale:.4g}, "
            f"{prior}impl={self.impl!r}"
        )


def _resolve_scale(scale: str | float, tau0: float, width: int, head_dim: int) -> float:
    tau0 = check_positive("tau0", tau0)
    temperatures = {"width": math.sqrt(width * head_dim), "standard": math.sqrt(head_dim)}
    scale = check_choice_or_number("scale", scale, temperatures)
    if not isinstance(scale, str):
        if tau0 != 1.0:
            raise ValueError(
                'tau0 must keep its default 1.0 unless scale is "width" or "standard", got '
                f"{tau0}. Divide scale by it, and leave tau0 out."
            )
        return scale
    return 1.0 / (tau0 * temperatures[scale])


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads D) to (B, heads, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """(B, heads, T, D) to (B, T, heads D)."""
    return x.transpose(1, 2).flatten(2)
