"""Backward: launches three kernels, or four.

Every sum has a fixed order and no atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton

from . import launch
from .bwd_dkdv import attention_bwd_dkdv_kernel
from .bwd_dprior import attention_bwd_dprior_kernel
from .bwd_dq import attention_bwd_dq_kernel
from .bwd_preprocess import attention_bwd_preprocess_kernel
from .configs import block_width, pick_config
from .value_sums import value_block_sums

if TYPE_CHECKING:
    from .attention import AttentionGradients, Call, ForwardResult, Needs


def _per_head(gain: float | torch.Tensor) -> float | torch.Tensor:
    return gain.to(torch.float32) if isinstance(gain, torch.Tensor) else gain


def launch_backward(
    call: Call,
    saved: ForwardResult,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    gradients: AttentionGradients,
    needs: Needs,
) -> AttentionGradients:
    """Launch the backward kernels, which fill `gradients`; return them with the sums."""
    q, k, v, residual, gains, visibility, prior, prior_parameters = call
    B, H, T, D = q.shape
    HKV, S, DV = k.shape[1], k.shape[2], v.shape[3]
    device = q.device
    arch = launch.architecture(q)
    centered, weighed_by = call.is_centered, call.weighed_by
    preprocess, dkdv, dq_config, dprior = (
        pick_config(kernel, D, DV, q.element_size(), arch, weighed_by=weighed_by)
        for kernel in ("preprocess", "dkdv", "dq", "dprior")
    )
    values, gain_strides, gain_is_tensor = launch.gain_arguments(gains)
    row_terms = torch.empty((4, B, H, T), dtype=torch.float32, device=device)
    gain_dots = scale_dots = prior_dots = d_table = None
    if needs.gains:
        tiles = triton.cdiv(T, preprocess.block_t)
        gain_dots = torch.empty((4, B, H, tiles), dtype=torch.float32, device=device)
    if needs.scale:
        tiles = triton.cdiv(T, dq_config.block_t)
        scale_dots = torch.empty((B, H, tiles), dtype=torch.float32, device=device)
    if needs.prior:
        prior_dots = torch.empty((B, H, T), dtype=torch.float32, device=device)
        d_table = torch.empty((5, B, H, T), dtype=torch.float32, device=device)
    attn_mask = visibility.attn_mask
    mask = launch.as_bytes(attn_mask)
    sizes = (
        H,
        H // HKV,
        T,
        S,
        launch.clamp_offset(visibility.q_offset),
        launch.diagonal(visibility, T, S),
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
            saved.center,
            saved.row_stats,
            value_block_sums(v, preprocess) if centered and weighed_by is None else None,
            visibility.key_start,
            visibility.key_end,
            row_terms,
            gain_dots,
            prior_dots,
            gradients.residual,
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
            HAS_IDENTITY=call.has_identity,
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
            visibility.key_start,
            visibility.key_end,
            prior_parameters,
            gradients.k,
            gradients.v,
            values,
            gain_strides,
            *tensor_strides,
            *sizes,
            BLOCK_T=dkdv.block_t,
            BLOCK_S=dkdv.block_s,
            HAS_IDENTITY=call.has_identity,
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
            visibility.key_start,
            visibility.key_end,
            prior_parameters,
            gradients.q,
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
        if needs.prior:
            attention_bwd_dprior_kernel[(triton.cdiv(T, dprior.block_t) * B * H,)](
                q,
                k,
                v,
                d_out,
                row_terms,
                prior_dots,
                mask,
                visibility.key_start,
                visibility.key_end,
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
    return gradients._replace(gains=d_gains, scale=d_scale, prior=d_prior)


def _gain_gradients(dots: torch.Tensor, gains: tuple[float | torch.Tensor, ...]) -> torch.Tensor:
    """Gradients (5, H) of the gains from the sums (4, H) of dO with each term of the formula."""
    identity, softmax, center, _, branch, _ = (_per_head(gain) for gain in gains)
    d_branch = identity * dots[0] + softmax * dots[1] + center * dots[2]
    return torch.stack([branch * dots[0], branch * dots[1], branch * dots[2], dots[3], d_branch])
