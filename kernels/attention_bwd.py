"""Backward: launches three kernels.

Every sum has a fixed order and no atomics, so equal inputs give equal bits.
"""

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
from .value_sums import ValueBlockSums
from .visibility import visibility_arguments

if TYPE_CHECKING:
    from .attention import AttentionGradients, Call, ForwardResult, Needs


class _Products(NamedTuple):
    """A kernel that reads q, k, v and d_out tile by tile, and how it reads them."""

    descriptors: launch.Descriptors
    launch: launch.Launch

    def __call__(self, read: tuple[torch.Tensor, ...], *varying: Any) -> None:
        self.launch(*read, *self.descriptors(*read), *varying)


class _Plan(NamedTuple):
    """The launches of a backward and the shapes of what they leave for each other.

    value_sums is None where it takes no part, and so are the shapes of partial sums.
    """

    value_sums: ValueBlockSums | None
    preprocess: launch.Launch
    dkdv: _Products
    dq: _Products
    row_terms: tuple[int, ...]
    gain_dots: tuple[int, ...] | None
    scale_dots: tuple[int, ...] | None


def _plan(call: Call, d_out: torch.Tensor, needs: Needs) -> _Plan:
    q, k, v, residual = call[:4]
    B, H, T, _ = q.shape
    HKV, S = k.shape[1:3]
    preprocess, dkdv, dq = (call.config(kernel) for kernel in ("preprocess", "dkdv", "dq"))

    def products(kernel: Any, programs: int, config: TileConfig) -> _Products:
        block_t, block_s = config.block_t, config.block_s
        tiles = ((q, block_t), (k, block_s), (v, block_s), (d_out, block_t))
        return _Products(
            launch.Descriptors(config, launch.architecture(q), *tiles),
            launch.Launch.for_call(
                call,
                kernel,
                programs,
                config,
                (q, k, v, d_out),
                PRIOR_ENTRIES=call.prior.entries if needs.prior else 0,
            ),
        )

    aligned = triton.cdiv(T, ROW_ALIGNMENT.value) * ROW_ALIGNMENT.value
    tiles_of_dq = triton.cdiv(T, dq.block_t)
    needs_sums = call.is_centered and call.weighed_by is None
    return _Plan(
        ValueBlockSums(v, preprocess) if needs_sums else None,
        launch.Launch.for_call(
            call,
            attention_bwd_preprocess_kernel,
            aligned // preprocess.block_t * B * H,
            preprocess,
            (v, residual, d_out),
        ),
        products(attention_bwd_dkdv_kernel, triton.cdiv(S, dkdv.block_s) * B * HKV, dkdv),
        products(attention_bwd_dq_kernel, tiles_of_dq * B * H, dq),
        (3, B, H, aligned),
        (4, B, H, aligned // preprocess.block_t) if needs.gains else None,
        (B, H, tiles_of_dq) if needs.scale else None,
    )


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
    rows = q.shape[:3]
    gains = tuple(gains)
    d_lse = None if d_lse is None else d_lse.contiguous()
    seen = visibility_arguments(visibility)

    def empty(shape: tuple[int, ...] | None) -> torch.Tensor | None:
        return None if shape is None else torch.empty(shape, dtype=torch.float32, device=q.device)

    with launch.on_device(q):
        plan = launch.plan_of(_plan, call, (d_out, needs), saved, d_lse)
        row_terms = empty(plan.row_terms)
        gain_dots, scale_dots = empty(plan.gain_dots), empty(plan.scale_dots)
        prior_dots = empty(rows if needs.prior else None)
        d_table = empty((prior.entries, *rows) if needs.prior else None)
        plan.preprocess(
            v,
            residual,
            d_out,
            d_lse,
            saved.excess,
            saved.center,
            saved.row_stats,
            None if plan.value_sums is None else plan.value_sums(v),
            seen,
            row_terms,
            gain_dots,
            prior_dots,
            gradients.residual,
            gains,
        )
        read = (q, k, v, d_out)
        weigh = (seen, prior_parameters)
        plan.dkdv(read, row_terms, *weigh, gradients.k, gradients.v, gains)
        plan.dq(read, row_terms, *weigh, prior_dots, gradients.q, scale_dots, d_table, gains)
    d_gains = None if gain_dots is None else _gain_gradients(gain_dots.sum((1, 3)), gains)
    d_scale = None if scale_dots is None else scale_dots.sum((0, 2))
    # The table is in log2.
    d_prior = None if d_table is None else math.log(2) * d_table.sum((1, 3)).T
    return gradients._replace(gains=d_gains, scale=d_scale, prior=d_prior)


def _gain_gradients(dots: torch.Tensor, gains: tuple[float | torch.Tensor, ...]) -> torch.Tensor:
    """Gradients (5, H) of the gains from the sums (4, H) of dO with each term of the formula."""
    identity, softmax, center, _, branch, _ = (
        gain.float() if isinstance(gain, torch.Tensor) else gain for gain in gains
    )
    d_branch = identity * dots[0] + softmax * dots[1] + center * dots[2]
    return torch.stack([branch * dots[0], branch * dots[1], branch * dots[2], dots[3], d_branch])
