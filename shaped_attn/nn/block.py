"""One block of a transformer: attention and MLP, each mixed with the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_number, check_shape, check_size
from ..functional import is_autocast
from .attention import ShapedAttention
from .cache import LayerCache
from .initialization import Initialized, Law, constant
from .mlp import MLP, ShapedMLP
from .positions import Rotary

NORMS = (None, "rms", "layer")
NORM_EPS = 1e-6

# How far skip_gain^2 + branch_gain^2 may be from 1: gains written with six digits pass.
VARIANCE_TOLERANCE = 1e-5


class TransformerBlock(Initialized, nn.Module):
    r"""An attention and an MLP with norms, skips and gains, one after the other or in parallel.

    For the stream X (B, T, width), one after the other:

        Z  = attention_skip_gain X + attention_branch_gain attention(Norm(X))
        X' = mlp_skip_gain Z + mlp_branch_gain mlp(Norm(Z))

    and in parallel, with one norm and no skip:

        X' = attention_branch_gain attention(Norm(X)) + mlp_branch_gain mlp(Norm(X))

    | parameter                       | shape    | initial law |
    | --- | --- | --- |
    | ``attention.*``                 |          | see `ShapedAttention` |
    | ``mlp.*``                       |          | see `MLP`, `ShapedMLP` |
    | ``{attention,mlp}_norm.weight`` | (width,) | 1 |
    | ``{attention,mlp}_norm.bias``   | (width,) | 0 (`torch.nn.LayerNorm` only) |
    | ``attention_branch_gain``       | ()       | the start value (with ``learns_branch_gains``) |
    | ``mlp_branch_gain``             | ()       | the start value (with ``learns_branch_gains``) |

    The weights of all projections may be replaced by stacks (networks, out, in) and drawn by
    ``reset_parameters``; X is then (networks, T, width), one network per batch entry.

    Args:
        attention: the attention, or None for a block without.
        mlp: the MLP, or None for a block without.
        attention_norm: normalises what the attention reads; in parallel, the MLP too. Default None.
        mlp_norm: normalises what the MLP reads; unused in parallel. Default None.
        attention_skip_gain: weight of the skip around the attention, None for no skip; unused in
            parallel. Default 1.0.
        attention_branch_gain: weight of the attention. Default 1.0.
        mlp_skip_gain: weight of the skip around the MLP, None for no skip; unused in parallel.
            Default 1.0.
        mlp_branch_gain: weight of the MLP. Default 1.0.
        learns_branch_gains: whether the two branch gains are parameters, which needs both halves.
            Default False.
        is_parallel: whether both halves read the same, which needs both. Default False.

    References:
        He and Hofmann, Simplifying Transformer Blocks, arXiv 2311.01906, equations (1), (7);
        papers.md, section 4.
    """

    def __init__(
        self,
        attention: ShapedAttention | None,
        mlp: MLP | None,
        *,
        attention_norm: nn.Module | None = None,
        mlp_norm: nn.Module | None = None,
        attention_skip_gain: float | None = 1.0,
        attention_branch_gain: float = 1.0,
        mlp_skip_gain: float | None = 1.0,
        mlp_branch_gain: float = 1.0,
        learns_branch_gains: bool = False,
        is_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.width = (attention or mlp).width
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.is_parallel = is_parallel
        self.attention_skip_gain = None if is_parallel else attention_skip_gain
        self.mlp_skip_gain = None if is_parallel else mlp_skip_gain
        self.branch_start = {
            "attention_branch_gain": attention_branch_gain,
            "mlp_branch_gain": mlp_branch_gain,
        }
        for name, value in self.branch_start.items():
            if learns_branch_gains:
                value = nn.Parameter(mlp.post.weight.new_full((), value))
            setattr(self, name, value)

    def laws(self) -> dict[str, Law]:
        """Return the start values of learned branch gains as laws."""
        if not isinstance(self.mlp_branch_gain, nn.Parameter):
            return {}
        return {name: constant(value) for name, value in self.branch_start.items()}

    def forward(
        self,
        x: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return X' for the stream X, both (B, T, width).

        Args:
            x: (B, T, width). It may be of a wider dtype than the parameters, and a skip keeps it:
                each branch reads it rounded to the dtype of its weights. Autocast does not narrow
                a skip.
            key_start, key_end, attn_mask, rotary, cache: as in `ShapedAttention`; without attention
                they have no effect.

        Raises:
            TypeError, ValueError: as in `ShapedAttention`.
        """
        check_shape("x", x, ("B", "T", self.width))
        if self.attention is not None:
            x, read = _read(x, self.attention_norm, self.attention.query.weight.dtype)
            x = self.attention(
                read,
                **_skip(x, self.attention_skip_gain),
                branch_gain=self.attention_branch_gain,
                key_start=key_start,
                key_end=key_end,
                attn_mask=attn_mask,
                rotary=rotary,
                cache=cache,
            )
        if self.is_parallel:
            return self.mlp(read, x, branch_gain=self.mlp_branch_gain)
        if self.mlp is not None:
            x, read = _read(x, self.mlp_norm, self.mlp.pre.weight.dtype)
            x = self.mlp(read, **_skip(x, self.mlp_skip_gain), branch_gain=self.mlp_branch_gain)
        return x

    def extra_repr(self) -> str:
        """Return the wiring: skips, branch gains, and whether it is parallel."""
        kind = " (learned)" if isinstance(self.mlp_branch_gain, nn.Parameter) else ""
        parts = [f"{name}={value:.6g}{kind}" for name, value in self.branch_start.items()]
        for name in ("attention_skip_gain", "mlp_skip_gain"):
            gain = getattr(self, name)
            parts.append(f"{name}={gain if gain is None else format(gain, '.6g')}")
        return ", ".join((*parts, f"is_parallel={self.is_parallel}"))


class ShapedBlock(TransformerBlock):
    r"""Shaped attention and shaped MLP, each with a weighted skip around it.

    For the stream X (B, T, width):

        Z  = skip_gain X + branch_gain attention(X)
        X' = skip_gain Z + branch_gain mlp(Z) ,            skip_gain^2 + branch_gain^2 = 1

    which is the block of the theory. With ``norm`` each branch, not the skip, reads a normalised
    stream: attention(Norm(X)), mlp(Norm(Z)). Parameters, and stacks of weights, are those of
    `TransformerBlock`.

    Args:
        width: n, size of the last dimension of X.
        heads: number of query heads. Default 1.
        branch_gain: gamma, weight of both branches. Default 0.5.
        skip_gain: lambda, weight of both skips. Default None: sqrt(1 - branch_gain^2).
        preserves_variance: whether skip_gain^2 + branch_gain^2 has to be 1, up to 1e-5. Pass
            False for an ablation that breaks it, such as 1 + e/width of covariance-sde.md (35).
            Default True.
        attention: whether there is an attention half. Default True.
        mlp: whether there is an MLP half. Default True.
        norm: None (the default, as in the theory), "rms" (`torch.nn.RMSNorm`) or "layer"
            (`torch.nn.LayerNorm`), with eps 1e-6.
        kv_heads, head_dim, is_causal, out_proj, scale, tau0: as in `ShapedAttention`.
        identity_gain, softmax_gain, center_gain, gain_scheme, learned_gains: likewise.
        impl, deterministic: likewise.
        mlp_ratio, c_plus, c_minus, trainable_slopes: as in `ShapedMLP`.
        device, dtype: of the parameters. Default: those of torch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the gains break the rule, both halves are left out, an unknown norm, or as in
            `ShapedAttention` and `ShapedMLP`.

    References:
        Noci et al., The Shaped Transformer, arXiv 2306.17759; papers.md (P3)-(P6);
        covariance-sde.md (1)-(6).
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        branch_gain: float = 0.5,
        skip_gain: float | None = None,
        preserves_variance: bool = True,
        attention: bool = True,
        mlp: bool = True,
        norm: str | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        out_proj: str = "none",
        scale: str | float = "width",
        tau0: float = 1.0,
        identity_gain: float | Sequence[float] = 1.0,
        softmax_gain: float | Sequence[float] = 1.0,
        center_gain: float | Sequence[float] | None = None,
        gain_scheme: str = "fixed",
        learned_gains: Sequence[str] = ("identity_gain", "center_gain"),
        impl: str = "auto",
        deterministic: bool = True,
        mlp_ratio: float = 1.0,
        c_plus: float = 0.0,
        c_minus: float = -1.0,
        trainable_slopes: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("width", width)
        skip_gain, branch_gain = _check_gains(skip_gain, branch_gain, preserves_variance)
        check_flag("attention", attention)
        check_flag("mlp", mlp)
        if not attention and not mlp:
            raise ValueError(
                "attention and mlp must not both be False, got a block of neither. "
                "Keep one of the two halves."
            )
        check_choice("norm", norm, NORMS)
        factory = {"device": device, "dtype": dtype}
        halves = {"attention": None, "mlp": None}
        if attention:
            halves["attention_norm"] = make_norm(norm, width, **factory)
            halves["attention"] = ShapedAttention(
                width,
                heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                is_causal=is_causal,
                out_proj=out_proj,
                scale=scale,
                tau0=tau0,
                identity_gain=identity_gain,
                softmax_gain=softmax_gain,
                center_gain=center_gain,
                gain_scheme=gain_scheme,
                learned_gains=learned_gains,
                impl=impl,
                deterministic=deterministic,
                **factory,
            )
        if mlp:
            halves["mlp_norm"] = make_norm(norm, width, **factory)
            halves["mlp"] = ShapedMLP(
                width,
                mlp_ratio,
                c_plus=c_plus,
                c_minus=c_minus,
                trainable_slopes=trainable_slopes,
                **factory,
            )
        super().__init__(
            **halves,
            attention_skip_gain=skip_gain,
            attention_branch_gain=branch_gain,
            mlp_skip_gain=skip_gain,
            mlp_branch_gain=branch_gain,
        )
        self.skip_gain, self.branch_gain = skip_gain, branch_gain
        self.norm = norm

    def extra_repr(self) -> str:
        """Return the gains and the kind of norm."""
        return (
            f"skip_gain={self.skip_gain:.6g}, branch_gain={self.branch_gain:.6g}, "
            f"norm={self.norm!r}"
        )


def make_norm(
    norm: str | None,
    width: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """Return the normalisation layer of that name over the last dimension, or None."""
    if norm is None:
        return None
    layer = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[norm]
    return layer(width, eps=NORM_EPS, device=device, dtype=dtype)


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """Return norm(x); autocast has narrowed x if no skip kept it, but not the weights of a norm."""
    return norm(x.to(torch.promote_types(x.dtype, norm.weight.dtype)))


def _read(x: Tensor, norm: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the stream, no narrower than ``dtype``, and what a branch of that dtype reads."""
    if is_autocast(x):
        return x, x if norm is None else normalize(x, norm)
    x = x.to(torch.promote_types(x.dtype, dtype))
    read = x.to(dtype)
    return x, read if norm is None else norm(read)


def _skip(x: Tensor, gain: float | None) -> dict:
    """Return the arguments of a half that mix x into its result."""
    return {} if gain is None else {"residual": x, "skip_gain": gain}


def _check_gains(
    skip_gain: float | None, branch_gain: float, preserves_variance: bool
) -> tuple[float, float]:
    check_flag("preserves_variance", preserves_variance)
    branch_gain = check_number("branch_gain", branch_gain)
    if skip_gain is None:
        branch_gain = check_number("branch_gain", branch_gain, low=0.0, high=1.0)
        return math.sqrt(1.0 - branch_gain**2), branch_gain
    skip_gain = check_number("skip_gain", skip_gain)
    total = skip_gain**2 + branch_gain**2
    if preserves_variance and abs(total - 1.0) > VARIANCE_TOLERANCE:
        raise ValueError(
            "skip_gain must satisfy skip_gain^2 + branch_gain^2 = 1 for "
            f"branch_gain={branch_gain:g}, got {skip_gain:g}, hence {total:.6g}. "
            "Leave it out for sqrt(1 - branch_gain^2), or pass preserves_variance=False."
        )
    return skip_gain, branch_gain
