"""Backward on Hopper: the portable first launch, then two kernels of this family.

Every sum has a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from .. import launch
from ..attention_bwd import Preprocess, empty, sum_gradients
from ..configs import TileConfig
from ..visibility import visibility_arguments, visibility_sizes
from .bwd_dkdv import DkdvShape, attention_bwd_dkdv_kernel
from .bwd_dq import DqShape, attention_bwd_dq_kernel
from .descriptors import DTYPES, Describe
from .primitives import MOST_REGISTERS, Constants
from .tiles import dkdv_tile, dq_tile, heads_together, width_of

if TYPE_CHECKING:
    from ..attention import AttentionGradients, Call, ForwardResult, Needs


class BackwardPlan:
    """The launches of a backward, for one signature of a call; calling it launches them."""

    def __init__(self, call: Call, d_out: torch.Tensor, needs: Needs) -> None:
        q, k, v, _, gains, visibility, _, _ = call
        B, H, T, D = q.shape
        HKV, S, DV = k.shape[1:3] + v.shape[3:]
        is_causal, group = visibility.is_causal, H // HKV
        width = width_of(D, DV)
        gain_strides, gain_is_tensor = launch.gain_arguments(gains)
        q_offset, diagonal = visibility_sizes(visibility, T, S)
        dkdv = DkdvShape(
            *dkdv_tile(width, is_causal),
            width,
            DTYPES[q.dtype],
            is_causal=is_causal,
            is_centered=call.is_centered,
            has_identity=call.has_identity,
            group=group,
            gain_is_tensor=gain_is_tensor,
        )
        dq = DqShape(
            *dq_tile(width, is_causal),
            width,
            DTYPES[q.dtype],
            is_causal=is_causal,
            group=group,
            gain_is_tensor=gain_is_tensor,
        )
        key_tiles, row_tiles = triton.cdiv(S, dkdv.block_s), triton.cdiv(T, dq.block_t)
        key_heads = heads_together(B * HKV, 1, key_tiles, 4 * T * width * group, is_causal)
        heads = heads_together(B * H, group, row_tiles, 4 * S * width, is_causal)
        self.preprocess = Preprocess(call, d_out, needs)
        self.rounds_d_out = d_out.dtype != v.dtype or not launch.fits_tma(d_out)
        self.dkdv = launch.Launch(
            attention_bwd_dkdv_kernel,
            key_tiles * B * HKV,
            (gain_strides, d_out.stride(), H, T, S, DV, q_offset, diagonal, key_heads),
            self._config(dkdv),
            C=Constants(dkdv),
        )
        self.dq = launch.Launch(
            attention_bwd_dq_kernel,
            row_tiles * B * H,
            (gain_strides, H, T, S, diagonal, heads),
            self._config(dq),
            C=Constants(dq),
        )
        self.scale_dots = (B, H, row_tiles * dq.consumers) if needs.scale else None
        rows = [1, 1, 64, width]
        queries, keys = [1, 1, dkdv.block_t, width], [1, 1, dq.block_s, width]
        terms = [1, 1, dkdv.block_t]
        self.describe_dkdv = Describe(queries, rows, rows, queries, terms, rows, rows)
        self.describe_dq = Describe(rows, keys, keys, rows, rows)

    @staticmethod
    def _config(shape: DkdvShape | DqShape) -> TileConfig:
        registers = MOST_REGISTERS[shape.consumers]
        return TileConfig(shape.block_t, shape.block_s, 4, 1, max_registers=registers)

    def __call__(
        self,
        call: Call,
        saved: ForwardResult,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        gradients: AttentionGradients,
    ) -> AttentionGradients:
        q, k, v, _, gains, visibility, _, _ = call
        gains = tuple(gains)
        seen = visibility_arguments(visibility)
        row_terms, gain_dots, _ = self.preprocess(call, saved, d_out, d_lse, gradients.residual)
        rounded = d_out
        if self.rounds_d_out:
            rounded = torch.empty(d_out.shape, dtype=v.dtype, device=v.device).copy_(d_out)
        planes = row_terms.view(3, -1, row_terms.shape[-1])
        self.dkdv(
            *self.describe_dkdv(q, k, v, rounded, planes, gradients.k, gradients.v),
            d_out,
            seen,
            gains,
        )
        scale_dots = empty(q, self.scale_dots)
        self.dq(
            *self.describe_dq(q, k, v, rounded, gradients.q), row_terms, scale_dots, seen, gains
        )
        return sum_gradients(gradients, gain_dots, scale_dots, gains)
