"""Backward on Hopper: the portable first launch, then two kernels of this family.

Every sum has a fixed order, equal inputs give equal bits; unless one kernel is asked for that makes
all three gradients, five products instead of seven, and adds dq up as its programs come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from .. import launch
from ..attention_bwd import Preprocess, empty, sum_gradients
from ..configs import TileConfig
from ..primitives import SCALE
from ..visibility import visibility_arguments, visibility_sizes
from .bwd_convert import convert_dq_kernel
from .bwd_dkdv import DkdvShape, attention_bwd_dkdv_kernel
from .bwd_dq import DqShape, attention_bwd_dq_kernel
from .descriptors import DTYPES, Describe
from .primitives import MOST_REGISTERS, Constants
from .tiles import (
    MOST_COLUMNS_AT_ONCE,
    DkdvTile,
    dkdv_tile,
    dq_tile,
    dv_tile,
    fused_tile,
    heads_together,
    width_of,
)

if TYPE_CHECKING:
    from ..attention import AttentionGradients, Call, ForwardResult, Needs


class _Dkdv:
    """Launch of the gradients of k and v; fused, it adds those of q to `dq_sums`."""

    def __init__(
        self,
        call: Call,
        d_out: torch.Tensor,
        tile: DkdvTile,
        makes_dk: bool = True,
        makes_dv: bool = True,
        is_fused: bool = False,
    ) -> None:
        B, H, T, _ = call.q.shape
        HKV, S, DV = call.v.shape[1:]
        constants = _constants(call)
        width, is_causal = constants["width"], constants["is_causal"]
        shape = DkdvShape(
            *tile,
            **constants,
            makes_dk=makes_dk,
            makes_dv=makes_dv,
            is_centered=call.is_centered,
            has_identity=call.has_identity,
            is_fused=is_fused,
        )
        tiles = triton.cdiv(S, shape.block_s)
        bytes_of_head = 4 * T * width * shape.group
        sizes = (
            *(H, T, S, DV, *visibility_sizes(call.visibility, T, S)),
            heads_together(B * HKV, 1, tiles, bytes_of_head, is_causal),
        )
        self.shape = shape
        self.launch = launch.Launch(
            attention_bwd_dkdv_kernel,
            tiles * B * HKV,
            (launch.gain_arguments(call.gains)[0], d_out.stride(), *sizes),
            _config(shape),
            C=Constants(shape),
        )
        queries, keys = [1, 1, shape.block_t, width], [1, 1, 64, width]
        terms = [1, 1, shape.block_t]
        self.describe = Describe(queries, keys, keys, queries, terms, keys, keys)

    def __call__(
        self,
        call: Call,
        rounded: torch.Tensor,
        d_out: torch.Tensor,
        row_terms: torch.Tensor,
        gradients: AttentionGradients,
        dq_sums: torch.Tensor | None,
    ) -> None:
        planes = row_terms.view(3, -1, row_terms.shape[-1])
        v, dk = (call.v, gradients.k) if self.shape.makes_dk else (None, None)
        dv = gradients.v if self.shape.makes_dv else None
        self.launch(
            *self.describe(call.q, call.k, v, rounded, planes, dk, dv),
            d_out,
            dq_sums,
            visibility_arguments(call.visibility),
            tuple(call.gains),
        )


class _DvThenDk:
    """Launches of the gradients of v and of k: one after the other where one kernel cannot."""

    def __init__(self, call: Call, d_out: torch.Tensor) -> None:
        width = width_of(call.q.shape[3], call.v.shape[3])
        self.dv = _Dkdv(call, d_out, dv_tile(width), makes_dk=False)
        tile = dkdv_tile(width, call.visibility.is_causal)
        self.dk = _Dkdv(call, d_out, tile, makes_dv=False)

    def __call__(self, *arguments) -> None:
        self.dv(*arguments)
        self.dk(*arguments)


class _Dq:
    """Launch of the gradient of q, which returns the partial sums for that of the scale."""

    def __init__(self, call: Call, needs: Needs) -> None:
        B, H, T, _ = call.q.shape
        S = call.k.shape[2]
        constants = _constants(call)
        width, is_causal = constants["width"], constants["is_causal"]
        shape = DqShape(*dq_tile(width, is_causal), **constants)
        tiles = triton.cdiv(T, shape.block_t)
        sizes = (
            *(H, T, S, visibility_sizes(call.visibility, T, S)[1]),
            heads_together(B * H, shape.group, tiles, 4 * S * width, is_causal),
        )
        self.launch = launch.Launch(
            attention_bwd_dq_kernel,
            tiles * B * H,
            (launch.gain_arguments(call.gains)[0], *sizes),
            _config(shape),
            C=Constants(shape),
        )
        self.scale_dots = (B, H, tiles * shape.consumers) if needs.scale else None
        rows, keys = [1, 1, 64, width], [1, 1, shape.block_s, width]
        self.describe = Describe(rows, keys, keys, rows, rows)

    def __call__(
        self, call: Call, rounded: torch.Tensor, row_terms: torch.Tensor, dq: torch.Tensor
    ) -> torch.Tensor | None:
        scale_dots = empty(call.q, self.scale_dots)
        self.launch(
            *self.describe(*call[:3], rounded, dq),
            row_terms,
            scale_dots,
            visibility_arguments(call.visibility),
            tuple(call.gains),
        )
        return scale_dots


class _ConvertDq:
    """Launch that makes the gradient of q of the sums of the fused kernel; returns as `_Dq`."""

    def __init__(self, call: Call, needs: Needs) -> None:
        q, _, v = call[:3]
        B, H, T, D = q.shape
        block_t = fused_tile(width_of(D, v.shape[3]), call.visibility.is_causal).block_t
        half_tiles = 2 * triton.cdiv(T, block_t)
        gain_strides, gain_is_tensor = launch.gain_arguments(call.gains)
        self.launch = launch.Launch(
            convert_dq_kernel,
            half_tiles * B * H,
            (gain_strides, q.stride(), H, T),
            TileConfig(block_t, 64, 4, 1),
            D=D,
            BLOCK_T=block_t,
            GAIN_IS_TENSOR=gain_is_tensor,
        )
        self.dq_sums = (B, H, half_tiles, 64, 64)
        self.scale_dots = (B, H, half_tiles) if needs.scale else None

    def __call__(self, call: Call, dq_sums: torch.Tensor, dq: torch.Tensor) -> torch.Tensor | None:
        scale_dots = empty(call.q, self.scale_dots)
        self.launch(call.q, dq_sums, dq, scale_dots, tuple(call.gains))
        return scale_dots


def _constants(call: Call) -> dict[str, Any]:
    """What both kernels are compiled for."""
    q, k, v = call[:3]
    return {
        "width": width_of(q.shape[3], v.shape[3]),
        "dtype": DTYPES[q.dtype],
        "is_causal": call.visibility.is_causal,
        "group": q.shape[1] // k.shape[1],
        "gain_is_tensor": launch.gain_arguments(call.gains)[1],
    }


def _config(shape: DkdvShape | DqShape) -> TileConfig:
    registers = MOST_REGISTERS[shape.consumers]
    return TileConfig(shape.block_t, shape.block_s, 4, 1, max_registers=registers)


def _can_fuse(call: Call) -> bool:
    """Whether one kernel may make all three gradients.

    Not where the heads of a group have scales of their own, in units of which dS is rounded.
    """
    q, k, v = call[:3]
    has_units = q.shape[1] > k.shape[1] and isinstance(call.gains[SCALE.value], torch.Tensor)
    width = width_of(q.shape[3], v.shape[3])
    return not has_units and fused_tile(width, call.visibility.is_causal) is not None


class BackwardPlan:
    """The launches of a backward, for one signature of a call; calling it launches them.

    Where `is_deterministic` is False dq may be added up in an order that varies from run to run.
    """

    def __init__(
        self, call: Call, d_out: torch.Tensor, needs: Needs, is_deterministic: bool = True
    ) -> None:
        self.is_fused = not is_deterministic and _can_fuse(call)
        self.preprocess = Preprocess(call, d_out, needs)
        self.rounds_d_out = d_out.dtype != call.v.dtype or not launch.fits_tma(d_out)
        width, is_causal = width_of(call.q.shape[3], call.v.shape[3]), call.visibility.is_causal
        if width > MOST_COLUMNS_AT_ONCE:
            self.dkdv = _DvThenDk(call, d_out)
        else:
            tile = (fused_tile if self.is_fused else dkdv_tile)(width, is_causal)
            self.dkdv = _Dkdv(call, d_out, tile, is_fused=self.is_fused)
        self.dq = _ConvertDq(call, needs) if self.is_fused else _Dq(call, needs)

    def __call__(
        self,
        call: Call,
        saved: ForwardResult,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        gradients: AttentionGradients,
    ) -> AttentionGradients:
        v = call.v
        row_terms, gain_dots, _ = self.preprocess(call, saved, d_out, d_lse, gradients.residual)
        rounded = d_out
        if self.rounds_d_out:
            rounded = torch.empty(d_out.shape, dtype=v.dtype, device=v.device).copy_(d_out)
        if self.is_fused:
            dq_sums = torch.zeros(self.dq.dq_sums, dtype=torch.float32, device=v.device)
            self.dkdv(call, rounded, d_out, row_terms, gradients, dq_sums)
            scale_dots = self.dq(call, dq_sums, gradients.q)
        else:
            self.dkdv(call, rounded, d_out, row_terms, gradients, None)
            scale_dots = self.dq(call, rounded, row_terms, gradients.q)
        return sum_gradients(gradients, gain_dots, scale_dots, tuple(call.gains))
