"""The public function: checks its arguments and hands them to one implementation."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from . import composite, ops, reference, validation
from .arguments import Gain, Gains
from .priors import ESPA, USPA, resolve_prior
from .visibility import Visibility

# torch.amp.is_autocast_available tells too, but torch 2.11 cannot compile it.
NO_AUTOCAST = ("fpga", "hip", "ideep", "lazy", "meta", "mkldnn", "opencl", "opengl", "ve", "vulkan")
"""Types of device without autocast."""


def shaped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None = None,
    *,
    identity_gain: Gain = 1.0,
    softmax_gain: Gain = 1.0,
    center_gain: Gain = 1.0,
    skip_gain: Gain = 1.0,
    branch_gain: Gain = 1.0,
    scale: Gain | None = None,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prior: ESPA | USPA | Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention with its mean subtracted, an identity term and a residual, in one pass.

    For head h and query i, which sits at key position p(i) = q_offset + i and sees n_i keys:

        out_i = skip_gain * residual_i
              + branch_gain * ( identity_gain * v_p(i)
                              + softmax_gain  * sum_j P_ij v_j
                              - center_gain   * sum_j v_j / n_i )

        P_i. = softmax_j(scale * q_i . k_j)          all sums over the keys that query i sees

    Query i of batch entry b sees key j if ``key_start[b] <= j < key_end[b]``, and ``j <= p(i)`` if
    ``is_causal``, and ``attn_mask`` is True at (b, h, i, j). If it sees none, its softmax and
    centre terms are 0, its lse is -inf and their gradients are 0, never NaN.

    With all gains 1 the branch is v itself at zero logits. ``identity_gain=0, center_gain=0`` is
    plain softmax attention.

    Args:
        q: (B, H, T, D) queries: float16, bfloat16, float32, or float64 (not with Triton). B and T
            may be 0, then the output is empty.
        k: (B, Hkv, S, D) keys, dtype of q. Hkv divides H; query head h reads key-value head
            h // (H // Hkv). S may be 0, then no query sees a key.
        v: (B, Hkv, S, Dv) values, dtype of q. Triton takes D and Dv from 1 to 256, and copies
            what has no multiple of 8; the other implementations take any size.
        residual: (B, H, T, Dv), dtype of q or a wider one. Default None: no such term.
        identity_gain: weight of v at the query's own position, which need not be visible but must
            be a key, 0 <= p(i) < S, unless the gain is the number 0. Default 1.0.
            This and the next five are each a finite number, or a floating Tensor of shape () or
            (H,), which gets a gradient. The values of a Tensor are not looked at; the number 0.0
            saves the work of its term.
        softmax_gain: weight of the softmax term. Default 1.0.
        center_gain: weight of the mean of the visible values. Default 1.0.
        skip_gain: weight of ``residual``. Default 1.0, the only value without a residual.
        branch_gain: weight of the other three terms together. Default 1.0.
        scale: one over the temperature. Default 1 / (D sqrt(H)), which is 1 / sqrt(n n_k) for the
            width n = H D and n_k = D: logits shrink with the width. Standard attention has
            1 / sqrt(D).
        is_causal: whether queries see no key after their own position. Default False.
        q_offset: key position of query 0, any int. Default S - T: the last query sits at the last
            key.
        key_start: (B,) integer Tensor, first key that is not padding. Default 0. Values outside
            0..S act like the nearer end.
        key_end: (B,) integer Tensor, one past the last key that is not padding. Default S.
        attn_mask: bool Tensor that broadcasts to (B, H, T, S), True where a query sees a key.
            Default None: no further mask.
        prior: the attention matrix A0 at zero logits: `ESPA` or `USPA`, or a floating Tensor that
            broadcasts to (H, T, S) with the natural log of A0, -inf to hide a key. Then the
            weights are softmax_j(scale q_i . k_j + log A0_ij), the softmax term is multiplied by
            D_i = sum_j A0_ij, and the centre is sum_j A0_ij v_j, all sums over visible keys. Tokens
            count from ``key_start``. Without ``is_causal`` the priors are those of all S tokens.
            Learnable rates, and a Tensor that requires a gradient, get one; the latter not from
            Triton. Default None: A0_ij = 1 / n_i, D_i = 1.
        deterministic: whether equal inputs give equal bits. Default True. False lets the gradient
            of q be added up in an order that varies from run to run, which is faster where the
            kernels for Hopper run; nothing else uses it, nor does it act under
            ``torch.use_deterministic_algorithms``.
        return_lse: whether to return ``(out, lse)``. Default False.
        impl: "triton": the fused kernels, on a GPU or in Triton's interpreter. "torch": torch's
            own operators, on any device, with memory linear in T and S. "reference": T x S
            matrices, the specification. Default "auto": "triton" on a GPU, "torch" elsewhere. None
            of them falls back to another.

    Returns:
        ``out`` (B, H, T, Dv), dtype of ``residual`` if given, else of q; with ``return_lse`` also
        ``lse`` (B, H, T): the natural log of sum_j exp(scale q_i . k_j), each term times A0_ij if a
        prior is given. It is float32 (float64 for float64 inputs), differentiable, and merges
        results over disjoint sets of keys. Sums are in float32 too, or float64 for float64 inputs.

        Under ``torch.autocast`` q, k and v are cast to its dtype, the residual only if that loses
        nothing.

    Raises:
        TypeError: an argument has a Python type or dtype that it cannot have.
        ValueError: shapes, head counts or devices do not fit each other; a number is not finite;
            some query lacks the key of its identity term; ``impl`` cannot run this input. Every
            message names the argument, the rule, the value given and the remedy.

    Example:
        >>> import torch
        >>> from shaped_attn import shaped_attention
        >>> q, k, v = torch.randn(3, 1, 8, 128, 64)
        >>> out = shaped_attention(q, k, v, is_causal=True)
        >>> out.shape
        torch.Size([1, 8, 128, 64])
        >>> out = shaped_attention(torch.zeros_like(q), k, v, is_causal=True)
        >>> torch.allclose(out, v, atol=1e-5)  # attention starts as the identity
        True

    References:
        - Noci et al., The Shaped Transformer, arXiv 2306.17759: centring, default scale.
        - He et al., Deep Transformers without Shortcuts, arXiv 2302.10322: Value-SkipInit
          (identity_gain 1, the others 0), priors.
        - He and Hofmann, Simplifying Transformer Blocks, arXiv 2311.01906, equation 5: the three
          gains, trained per head.
    """
    gains = Gains(identity_gain, softmax_gain, center_gain, skip_gain, branch_gain, scale)
    visibility = Visibility(is_causal, q_offset, key_start, key_end, attn_mask)
    gains = validation.check_types(q, k, v, residual, gains, visibility)
    validation.check_flag("return_lse", return_lse)
    validation.check_flag("deterministic", deterministic)
    device_type = q.device.type
    under_autocast = is_autocast(q)
    if under_autocast:
        q, k, v, residual = _autocast(q, k, v, residual, torch.get_autocast_dtype(device_type))
    impl = validation.resolve_impl(impl, q)
    table = None
    if impl != "triton" or prior is not None:
        gains, visibility = validation.check_call(q, k, v, residual, gains, visibility)
        table = resolve_prior(prior, q, k, visibility)
    if impl == "triton":  # the operator checks the rest itself
        out, lse = ops.attention_from_gains(
            q, k, v, residual, gains, visibility, prior=table, deterministic=deterministic
        )
        return (out, lse) if return_lse else out
    with torch.autocast(device_type, enabled=False) if under_autocast else nullcontext():
        arguments = (q, k, v, residual, gains, visibility)
        if impl == "torch":
            out, lse = composite.attention(*arguments, prior=table, return_lse=return_lse)
        else:
            out, lse = reference.attention(*arguments, prior=table)
    return (out, lse) if return_lse else out


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is active for the device of ``x``."""
    device_type = x.device.type
    return device_type not in NO_AUTOCAST and torch.is_autocast_enabled(device_type)


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cast as autocast does for a matmul (float64 stays), but never narrow the residual stream.

    Dtypes that are no input at all stay too, for the error that names them.
    """
    castable = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (x.to(dtype) if x.dtype in castable else x for x in (q, k, v))
    if residual is not None and residual.dtype in castable and q.is_floating_point():
        residual = residual.to(torch.promote_types(q.dtype, residual.dtype))
    return q, k, v, residual
