"""Backward: checks nothing, allocates the gradients and launches three kernels, or four.

Every sum has a fixed order and no atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from . import launch
from .attention_fwd import ForwardResult, is_centered
from .bwd_dkdv import attention_bwd_dkdv_kernel
from .bwd_dprior import attention_bwd_dprior_kernel
from .bwd_dq import attention_bwd_dq_kernel
from .bwd_preprocess import attention_bwd_preprocess_kernel
from .columns import pad_columns, trim_columns
from .configs import block_width, pick_config
from .priors import UNIFORM, Prior
from .value_sums import value_block_sums


class AttentionGradients(NamedTuple):
    """Gradients in the dtypes of their inputs; the last four are None if not asked for.

    gains (5, H) float32: identity, softmax, center, skip and branch gain of each head.
    scale (H,) float32. prior (H, 5) float32: the table of a geometric prior, for each head.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    residual: torch.Tensor | None
    gains: torch.Tensor | None
    scale: torch.Tensor | None
    prior: torch.Tensor | None


def _per_head(gain: float | torch.Tensor) -> float | torch.Tensor:
    return gain.to(torch.float32) if isinstance(gain, torch.Tensor) else gain


def attention_bwd(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    residual: torch.Tensor | None,
    gains: tuple[float | torch.Tensor, ...],
    saved: ForwardResult,
    *,
    is_causal: bool,
    q_offset: int,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    needs_residual: bool,
    needs_gains: bool,
    needs_scale: bool,
    prior: Prior = UNIFORM,
    prior_parameters: tuple | None = None,
    needs_prior: bool = False,
) -> AttentionGradients:
    """Launch the backward kernels.

    d_out (B, H, T, Dv) and d_lse (B, H, T) are the gradients of out and lse; `saved` is the result
    of `attention_fwd` with the same arguments and save_for_backward=True (its `out` is not used).
    """
    if q.shape[0] == 0 or q.shape[2] == 0 or k.shape[2] == 0:
        needs = (needs_residual, needs_gains, needs_scale, needs_prior)
        return _empty_gradients(d_out, q, k, v, residual, gains, *needs)

    head_dim, value_dim = q.shape[3], v.shape[3]
    d_out, q, k, v, residual = (pad_columns(x) for x in (d_out, q, k, v, residual))
    B, H, T, D = q.shape
    HKV, S, DV = k.shape[1], k.shape[2], v.shape[3]
    device = q.device
    dq = torch.empty(q.shape, dtype=q.dtype, device=device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=device)
    d_residual = None
    if needs_residual:
        d_residual = torch.empty((B, H, T, DV), dtype=d_out.dtype, device=device)

    arch = launch.architecture(q)
    centered = is_centered(gains[2])
    weighed_by = launch.weighed_by(attn_mask, prior)
    weighed = weighed_by is not None
    preprocess, dkdv, dq_config, dprior = (
        pick_config(kernel, D, DV, q.element_size(), arch, weighed_by=weighed_by)
        for kernel in ("preprocess", "dkdv", "dq", "dprior")
    )
    has_identity = isinstance(gains[0], torch.Tensor) or gains[0] != 0.0
    values, gain_strides, gain_is_tensor = launch.gain_arguments(gains)
    row_terms = torch.empty((4, B, H, T), dtype=torch.float32, device=device)
    gain_dots = scale_dots = prior_dots = d_table = None
    if needs_gains:
        tiles = triton.cdiv(T, preprocess.block_t)
        gain_dots = torch.empty((4, B, H, tiles), dtype=torch.float32, device=device)
    if needs_scale:
        tiles = triton.cdiv(T, dq_config.block_t)
        scale_dots = torch.empty((B, H, tiles), dtype=torch.float32, device=device)
    if needs_prior:
        prior_dots = torch.empty((B, H, T), dtype=torch.float32, device=device)
        d_table = torch.empty((5, B, H, T), dtype=torch.float32, device=device)
    mask = launch.as_bytes(attn_mask)
    sizes = (
        H,
        H // HKV,
        T,
        S,
        launch.clamp_offset(q_offset),
        launch.diagonal(is_causal, q_offset, T, S),
    )
    head_dims = {
        "D": D,
        "DV": DV,
        "BLOCK_D": block_width(D),
        "BLOCK_DV": block_width(DV),
    }
    flags = {
        "GAIN_IS_TENSOR": gain_is_tensor,
        "DOT_PRECISION": launch.dot_precision(q.dtype, arch, D, DV),
    }
    tensor_strides = tuple(x.stride() for x in (q, k, v, d_out)) + (launch.strides(attn_mask),)

    with launch.on_device(q):
        attention_bwd_preprocess_kernel[(triton.cdiv(T, preprocess.block_t) * B * H,)](
            v,
            residual,
            d_out,
            None if d_lse is None else d_lse.contiguous(),
            saved.excess,
            saved.center if centered and weighed else None,
            saved.row_stats,
            value_block_sums(v, preprocess) if centered and not weighed else None,
            key_start,
            key_end,
            row_terms,
            gain_dots,
            prior_dots,
            d_residual,
            values,
            gain_strides,
            v.stride(),
            launch.strides(residual),
            d_out.stride(),
            *sizes,
            DV=DV,
            BLOCK_DV=head_dims["BLOCK_DV"],
            BLOCK_T=preprocess.block_t,
            SUM_BLOCK=preprocess.sum_block,
            HAS_IDENTITY=has_identity,
            CENTERED=centered,
            UNIFORM_PRIOR=prior.is_uniform,
            WIDE=launch.needs_wide_index(preprocess, v, residual, d_out),
            **flags,
            **launch.launch_options(preprocess),
        )
        attention_bwd_dkdv_kernel[(triton.cdiv(S, dkdv.block_s) * B * HKV,)](
            q,
            k,
            v,
            d_out,
            row_terms,
            mask,
            key_start,
            key_end,
            prior_parameters,
            dk,
            dv,
            values,
            gain_strides,
            *tensor_strides,
            *sizes,
            BLOCK_T=dkdv.block_t,
            BLOCK_S=dkdv.block_s,
            HAS_IDENTITY=has_identity,
            CENTERED=centered,
            ADD_LOG2_PRIOR=prior.add_log2,
            TIMES_PRIOR=prior.times,
            UNIFORM_PRIOR=prior.is_uniform,
            WIDE=launch.needs_wide_index(dkdv, q, k, v, d_out, attn_mask),
            **head_dims,
            **flags,
            **launch.launch_options(dkdv),
        )
        attention_bwd_dq_kernel[(triton.cdiv(T, dq_config.block_t) * B * H,)](
            q,
            k,
            v,
            d_out,
            row_terms,
            mask,
            key_start,
            key_end,
            prior_parameters,
            dq,
            scale_dots,
            values,
            gain_strides,
            *tensor_strides,
            *sizes,
            BLOCK_T=dq_config.block_t,
            BLOCK_S=dq_config.block_s,
            ADD_LOG2_PRIOR=prior.add_log2,
            UNIFORM_PRIOR=prior.is_uniform,
            WIDE=launch.needs_wide_index(dq_config, q, k, v, d_out, attn_mask),
            **head_dims,
            **flags,
            **launch.launch_options(dq_config),
        )
        if needs_prior:
            attention_bwd_dprior_kernel[(triton.cdiv(T, dprior.block_t) * B * H,)](
                q,
                k,
                v,
                d_out,
                row_terms,
                prior_dots,
                mask,
                key_start,
                key_end,
                prior_parameters,
                d_table,
                values,
                gain_strides,
                *tensor_strides,
                *sizes,
                BLOCK_T=dprior.block_t,
                BLOCK_S=dprior.block_s,
                ADD_LOG2_PRIOR=prior.add_log2,
                TIMES_PRIOR=prior.times,
                WIDE=launch.needs_wide_index(dprior, q, k, v, d_out, attn_mask),
                **head_dims,
                **flags,
                **launch.launch_options(dprior),
            )
    d_gains = None if gain_dots is None else _gain_gradients(gain_dots.sum((1, 3)), gains)
    d_scale = None if scale_dots is None else scale_dots.sum((0, 2))
    # The table is in log2.
    d_prior = None if d_table is None else math.log(2) * d_table.sum((1, 3)).T
    dq, dk = (trim_columns(x, head_dim) for x in (dq, dk))
    dv, d_residual = (trim_columns(x, value_dim) for x in (dv, d_residual))
    return AttentionGradients(dq, dk, dv, d_residual, d_gains, d_scale, d_prior)


def _gain_gradients(dots: torch.Tensor, gains: tuple[float | torch.Tensor, ...]) -> torch.Tensor:
    """Gradients (5, H) of the gains from the sums (4, H) of dO with each term of the formula."""
    identity, softmax, center, _, branch, _ = (_per_head(gain) for gain in gains)
    d_branch = identity * dots[0] + softmax * dots[1] + center * dots[2]
    return torch.stack([branch * dots[0], branch * dots[1], branch * dots[2], dots[3], d_branch])


def _empty_gradients(
    d_out, q, k, v, residual, gains, needs_residual, needs_gains, needs_scale, needs_prior
) -> AttentionGradients:
    """Gradients when there is no query, no key or no batch entry: only the residual has a part."""
    H = d_out.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_residual = d_gains = d_scale = None
    if needs_residual:
        skip = _per_head(gains[3])
        if isinstance(skip, torch.Tensor) and skip.ndim == 1:
            skip = skip[:, None, None]
        d_residual = (skip * d_out).to(d_out.dtype)
    if needs_gains:
        d_gains = torch.zeros((5, H), dtype=torch.float32, device=d_out.device)
        if residual is not None:
            d_gains[3] = (d_out.float() * residual.float()).sum((0, 2, 3))
    if needs_scale:
        d_scale = torch.zeros((H,), dtype=torch.float32, device=d_out.device)
    d_prior = None
    if needs_prior:
        d_prior = torch.zeros((H, 5), dtype=torch.float32, device=d_out.device)
    return AttentionGradients(dq, dk, dv, d_residual, d_gains, d_scale, d_prior)
