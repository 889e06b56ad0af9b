"""First backward kernel: what each query row adds to the others, and gradients of the gains."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    BRANCH,
    CENTER,
    SKIP,
    SOFTMAX,
    aligned_rows,
    cast,
    load_gain,
    load_tile,
    softmax_sign,
    store_tile,
)
from .value_sums import lead_of, visible_value_sum
from .visibility import load_bounds


@triton.jit(do_not_specialize=["H", "T", "S", "q_offset", "diagonal"])
def attention_bwd_preprocess_kernel(
    v_ptr,
    residual_ptr,
    d_out_ptr,
    d_lse_ptr,
    excess_ptr,
    center_ptr,
    row_stats_ptr,
    value_sums_ptr,
    visibility,
    row_terms_ptr,
    gain_dots_ptr,
    prior_dots_ptr,
    d_residual_ptr,
    gains,
    gain_strides,
    strides,
    H,
    T,
    S,
    q_offset,
    diagonal,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    CENTERED: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    # Tiles past T too: the other kernels read their rows.
    tiles = aligned_rows(T) // BLOCK_T
    pid = tl.program_id(0)
    pid_t = pid % tiles
    row = pid_t * BLOCK_T
    pid_bh = pid // tiles
    batch = pid_bh // H
    head = pid_bh % H
    kv_head = head // GROUP
    # Saved tensors are contiguous (B, H, T, ...).
    first_row = tl.cast(pid_bh, tl.int64) * T
    heads = tl.cast(tl.num_programs(0) // tiles, tl.int64)
    # [BLOCK_T]
    offs_t = row + tl.arange(0, BLOCK_T)
    inside = offs_t < T

    branch_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, BRANCH, head)
    softmax_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, SOFTMAX, head)
    sign = softmax_sign(gains, gain_strides, GAIN_IS_TENSOR, head)
    center_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, CENTER, head)
    v_rows = (None, v_ptr, batch, kv_head, S) + strides[0:4]

    # [BLOCK_T]
    stats = row_stats_ptr + first_row + offs_t
    log2_normalizer = tl.load(stats, mask=inside, other=-float("inf"))
    weight_sum = tl.load(stats + heads * T, mask=inside, other=0.0)
    inverse_weight_sum = tl.where(weight_sum > 0.0, 1.0 / tl.maximum(weight_sum, 1e-30), 0.0)

    # [BLOCK_T, BLOCK_DV]
    d_out_rows = (None, d_out_ptr, batch, head, T) + strides[8:12]
    d_out = load_tile(d_out_rows, row, DV, BLOCK_T, WIDE)
    d_out = d_out.to(tl.float32)
    excess_rows = (None, excess_ptr, 0, pid_bh, T, 0, T * DV, DV, 1)
    softmax_part = load_tile(excess_rows, row, DV, BLOCK_T, WIDE).to(tl.float32)
    if CENTERED:
        if center_ptr is not None:
            center_rows = (None, center_ptr, 0, pid_bh, T, 0, T * DV, DV, 1)
            center = load_tile(center_rows, row, DV, BLOCK_T, WIDE)
        else:
            bounds = load_bounds(visibility, batch, T, S, diagonal)
            entries = tl.cdiv(S + lead_of(diagonal, SUM_BLOCK), SUM_BLOCK) + 1
            sums_ptr = value_sums_ptr + tl.cast(pid_bh // GROUP, tl.int64) * entries * DV
            center = inverse_weight_sum[:, None] * visible_value_sum(
                v_rows, sums_ptr, row, bounds, DV, BLOCK_T, SUM_BLOCK, WIDE, DOT_PRECISION
            )
        softmax_part += center if UNIFORM_PRIOR else center * inverse_weight_sum[:, None]
    # D of the formula: 1 for a prior whose rows sum to 1.
    prior_sum = tl.where(weight_sum > 0.0, 1.0, 0.0) if UNIFORM_PRIOR else weight_sum

    # The products with v see this rounding of d_out, so delta must see the same one.
    rounded = cast(d_out, v_ptr.dtype.element_ty).to(tl.float32)
    # [BLOCK_T]
    dots = tl.sum(rounded * softmax_part, 1)
    if prior_dots_ptr is not None:
        tl.store(prior_dots_ptr + first_row + offs_t, softmax_gain * dots, mask=inside)
    # |b| of (10), or D alone where b is 0; a row without keys gets t = +inf, hence weight 0.
    size = prior_sum * tl.where(sign == 0.0, 1.0, tl.abs(softmax_gain))
    has_weight = size > 0.0
    size = tl.where(has_weight, size, 1.0)
    delta = sign * dots
    if d_lse_ptr is not None:
        d_lse = tl.load(d_lse_ptr + first_row + offs_t, mask=inside, other=0.0).to(tl.float32)
        delta -= d_lse / size
    center_weight = center_gain * (inverse_weight_sum if UNIFORM_PRIOR else 1.0)
    terms_plane = heads * aligned_rows(T)
    terms = row_terms_ptr + tl.cast(pid_bh, tl.int64) * aligned_rows(T) + offs_t
    exponent = tl.where(has_weight, log2_normalizer - tl.math.log2(size), float("inf"))
    tl.store(terms, exponent)
    tl.store(terms + terms_plane, delta)
    tl.store(terms + 2 * terms_plane, center_weight + tl.zeros((BLOCK_T,), tl.float32))

    if d_residual_ptr is not None:
        skip_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SKIP, head)
        d_residual_rows = (None, d_residual_ptr, 0, pid_bh, T, 0, T * DV, DV, 1)
        store_tile(d_residual_rows, row, skip_gain * d_out, DV, WIDE)
    if gain_dots_ptr is not None:
        # One slot per gain, head and tile: (4, B, H, tiles), summed afterwards in a fixed order.
        slot = gain_dots_ptr + tl.cast(pid_bh, tl.int64) * tiles + pid_t
        slots = tl.cast(tl.num_programs(0), tl.int64)
        if HAS_IDENTITY:
            own = load_tile(v_rows, q_offset + row, DV, BLOCK_T, WIDE)
            tl.store(slot, tl.sum(d_out * own.to(tl.float32)))
        else:
            tl.store(slot, 0.0)
        by_row = prior_sum * tl.sum(d_out * softmax_part, 1)
        tl.store(slot + slots, tl.sum(by_row, 0))
        if CENTERED:
            tl.store(slot + 2 * slots, -tl.sum(d_out * center))
        else:
            tl.store(slot + 2 * slots, 0.0)
        if residual_ptr is not None:
            residual_rows = (None, residual_ptr, batch, head, T) + strides[4:8]
            residual = load_tile(residual_rows, row, DV, BLOCK_T, WIDE)
            tl.store(slot + 3 * slots, tl.sum(d_out * residual.to(tl.float32)))
        else:
            tl.store(slot + 3 * slots, 0.0)
