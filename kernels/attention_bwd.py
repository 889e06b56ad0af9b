"""Backward: launches three kernels. Every sum has a fixed order: equal inputs give equal bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from . import launch
from .bwd_dkdv import attention_bwd_dkdv_kernel
from .bwd_dq import attention_bwd_dq_kernel
from .bwd_preprocess import attention_bwd_preprocess_kernel
from .configs import TileConfig
from .primitives import ROW_ALIGNMENT
from .value_sums import ValueSums
from .visibility import visibility_arguments

if TYPE_CHECKING:
    from .attention import AttentionGradients, Call, ForwardResult, Needs


class _Products(NamedTuple):
    """A kernel that reads q, k, v and d_out tile by tile, and how it reads them."""

    descriptors: launch.Descriptors
    launch: launch.Launch

    def __call__(self, read: tuple[torch.Tensor, ...], *varying: Any) -> None:
        self.launch(*read, *self.descriptors(*read), *varying)


def empty(like: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor | None:
    """Memory for sums in float32, None for None."""
    return None if shape is None else torch.empty(shape, dtype=torch.float32, device=like.device)


class Preprocess:
    """First launch of a backward: what each row adds to the others, and sums for the gains.

    A call returns row_terms (3, B, H, T rounded up to ROW_ALIGNMENT) of (17), gain_dots (4, B, H,
    tiles) of (16) and prior_dots (B, H, T) of (19), the last two None unless asked for; it fills
    the gradient of the residual.
    """

    def __init__(self, call: Call, d_out: torch.Tensor, needs: Needs) -> None:
        q, _, v, residual = call[:4]
        B, H, T, _ = q.shape
        config = call.config("preprocess")
        aligned = triton.cdiv(T, ROW_ALIGNMENT.value) * ROW_ALIGNMENT.value
        tiles = aligned // config.block_t
        has_sums = call.is_centered and call.weighed_by is None
        self.value_sums = ValueSums(call, config) if has_sums else None
        self.launch = launch.Launch.for_call(
            call, attention_bwd_preprocess_kernel, tiles * B * H, config, v, residual, d_out
        )
        self.row_terms = (3, B, H, aligned)
        self.gain_dots = (4, B, H, tiles) if needs.gains else None
        self.prior_dots = (B, H, T) if needs.prior else None

    def __call__(
        self,
        call: Call,
        saved: ForwardResult,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        d_residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        v = call.v
        value_sums = None if self.value_sums is None else self.value_sums(call)
        given = (v, call.residual, d_out, d_lse, *saved[2:], value_sums)
        seen = visibility_arguments(call.visibility)
        terms = tuple(
            empty(v, shape) for shape in (self.row_terms, self.gain_dots, self.prior_dots)
        )
        self.launch(*given, seen, *terms, d_residual, tuple(call.gains))
        return terms


class BackwardPlan:
    """The launches of a backward, for one signature of a call; calling it launches them.

    Every sum has a fixed order, asked for or not.
    """

    def __init__(
        self, call: Call, d_out: torch.Tensor, needs: Needs, is_deterministic: bool = True
    ) -> None:
        q, k, v = call[:3]
        B, H, T, _ = q.shape
        HKV, S = k.shape[1:3]
        dkdv, dq = call.config("dkdv"), call.config("dq")
        entries = call.prior.entries if needs.prior else 0

        def products(kernel: Any, programs: int, config: TileConfig) -> _Products:
            block_t, block_s = config.block_t, config.block_s
            tiles = ((q, block_t), (k, block_s), (v, block_s), (d_out, block_t))
            return _Products(
                launch.Descriptors(config, launch.architecture(q), *tiles),
                launch.Launch.for_call(
                    call, kernel, programs, config, q, k, v, d_out, PRIOR_ENTRIES=entries
                ),
            )

        tiles_of_dkdv, tiles_of_dq = triton.cdiv(S, dkdv.block_s), triton.cdiv(T, dq.block_t)
        self.preprocess = Preprocess(call, d_out, needs)
        self.dkdv = products(attention_bwd_dkdv_kernel, tiles_of_dkdv * B * HKV, dkdv)
        self.dq = products(attention_bwd_dq_kernel, tiles_of_dq * B * H, dq)
        self.scale_dots = (B, H, tiles_of_dq) if needs.scale else None
        self.table = (entries, B, H, T) if needs.prior else None

    def __call__(
        self,
        call: Call,
        saved: ForwardResult,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        gradients: AttentionGradients,
    ) -> AttentionGradients:
        q, k, v, _, gains, visibility, _, prior_parameters = call
        gains = tuple(gains)
        row_terms, gain_dots, prior_dots = self.preprocess(
            call, saved, d_out, d_lse, gradients.residual
        )
        scale_dots, d_table = empty(q, self.scale_dots), empty(q, self.table)
        read = (q, k, v, d_out)
        weigh = (visibility_arguments(visibility), prior_parameters)
        self.dkdv(read, row_terms, *weigh, gradients.k, gradients.v, gains)
        self.dq(read, row_terms, *weigh, prior_dots, gradients.q, scale_dots, d_table, gains)
        gradients = sum_gradients(gradients, gain_dots, scale_dots, gains)
        if d_table is None:
            return gradients
        # The table is in log2.
        return gradients._replace(prior=math.log(2) * d_table.sum((1, 3)).T)


def sum_gradients(
    gradients: AttentionGradients,
    gain_dots: torch.Tensor | None,
    scale_dots: torch.Tensor | None,
    gains: tuple[float | torch.Tensor, ...],
) -> AttentionGradients:
    """Add the partial sums up, over batch entries and tiles: scale_dots (B, H, tiles)."""
    d_gains = None if gain_dots is None else _gain_gradients(gain_dots.sum((1, 3)), gains)
    d_scale = None if scale_dots is None else scale_dots.sum((0, 2))
    return gradients._replace(gains=d_gains, scale=d_scale)


def _gain_gradients(dots: torch.Tensor, gains: tuple[float | torch.Tensor, ...]) -> torch.Tensor:
    """Gradients (5, H) of the gains from the sums (4, H) of dO with each term of the formula."""
    identity, softmax, center, _, branch, _ = (
        gain.float() if isinstance(gain, torch.Tensor) else gain for gain in gains
    )
    d_branch = identity * dots[0] + softmax * dots[1] + center * dots[2]
    return torch.stack([branch * dots[0], branch * dots[1], branch * dots[2], dots[3], d_branch])
