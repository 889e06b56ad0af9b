"""Third backward kernel: gradients of q, the scale and a learned prior, by tiles of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2_E,
    SCALE,
    aligned_rows,
    cast,
    dot,
    index,
    load_gain,
    load_tile,
    softmax_sign,
    store_tile,
)
from .visibility import MASK, key_blocks, load_bounds, visible_keys


@triton.jit(do_not_specialize=["H", "T", "S", "q_offset", "diagonal"])
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    d_out_descriptor,
    row_terms_ptr,
    visibility,
    prior,
    prior_dots_ptr,
    dq_ptr,
    scale_dots_ptr,
    d_table_ptr,
    gains,
    gain_strides,
    strides,
    H,
    T,
    S,
    q_offset,
    diagonal,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    TIMES_PRIOR: tl.constexpr,
    ACCUMULATE_PRIOR: tl.constexpr,
    PRIOR_ENTRIES: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    WEIGHED: tl.constexpr = (visibility[MASK] is not None) or (not UNIFORM_PRIOR)
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    # Last rows first: under a causal mask they take longest.
    pid_t = tiles - 1 - pid % tiles
    row = pid_t * BLOCK_T
    pid_bh = pid // tiles
    batch = pid_bh // H
    head = pid_bh % H
    kv_head = head // GROUP
    heads = tl.cast(tl.num_programs(0) // tiles, tl.int64)
    plane = heads * aligned_rows(T)
    first_row = tl.cast(pid_bh, tl.int64) * T

    q_rows = (q_descriptor, q_ptr, batch, head, T) + strides[0:4]
    k_rows = (k_descriptor, k_ptr, batch, kv_head, S) + strides[4:8]
    v_rows = (v_descriptor, v_ptr, batch, kv_head, S) + strides[8:12]
    d_out_rows = (d_out_descriptor, d_out_ptr, batch, head, T) + strides[12:16]
    scale = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)
    sign = softmax_sign(gains, gain_strides, GAIN_IS_TENSOR, head)

    # [BLOCK_T]
    offs_t = row + tl.arange(0, BLOCK_T)
    row_terms = row_terms_ptr + tl.cast(pid_bh, tl.int64) * aligned_rows(T) + offs_t
    exponent = tl.load(row_terms)
    delta = tl.load(row_terms + plane)
    if PRIOR_ENTRIES > 0:
        inside = offs_t < T
        center_weight = tl.load(row_terms + 2 * plane)
        d_prior_sum = tl.load(prior_dots_ptr + first_row + offs_t, mask=inside, other=0.0)
        entries = (tl.zeros((BLOCK_T,), tl.float32),) * PRIOR_ENTRIES
    # [BLOCK_T, BLOCK_D], [BLOCK_T, BLOCK_DV]
    q = load_tile(q_rows, row, D, BLOCK_T, WIDE)
    d_out = load_tile(d_out_rows, row, DV, BLOCK_T, WIDE)
    if d_out.dtype != q.dtype:
        d_out = cast(d_out.to(tl.float32), q.dtype)
    dq = tl.zeros(q.shape, tl.float32)

    # [BLOCK_T, 1]
    tile_rows = index(BLOCK_T, WIDE)[:, None]
    positions = (q_offset + offs_t)[:, None]

    bounds = load_bounds(visibility, batch, T, S, diagonal)
    key_lo = bounds[2]
    first, full_end, masked = key_blocks(row, bounds, BLOCK_T, BLOCK_S, WEIGHED)
    # First the blocks that need a mask, then those that every row sees whole.
    for phase in tl.static_range(1 if WEIGHED else 2):
        blocks = masked if phase == 0 else (full_end - first) // BLOCK_S - 1
        for block in tl.range(0, blocks, num_stages=MASKED_STAGES if phase == 0 else None):
            key = first + (block + 1) * BLOCK_S
            if phase == 0:
                key = tl.where(block == 0, first, full_end + (block - 1) * BLOCK_S)
            # [BLOCK_S, BLOCK_D], [BLOCK_S, BLOCK_DV]
            k = load_tile(k_rows, key, D, BLOCK_S, WIDE, CHECK_ROWS=phase == 0)
            v = load_tile(v_rows, key, DV, BLOCK_S, WIDE, CHECK_ROWS=phase == 0)
            # [1, BLOCK_S]
            tile_keys = index(BLOCK_S, WIDE)[None, :]
            keys = (key + tl.arange(0, BLOCK_S))[None, :]
            # [BLOCK_T, BLOCK_S]
            if phase == 0:
                visible = visible_keys(
                    visibility, bounds, batch, head, row, key, tile_rows, tile_keys
                )
            zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
            scores = dot(q, tl.trans(k), zeros, DOT_PRECISION) * (scale * LOG2_E)
            scores = ADD_LOG2_PRIOR(scores, positions, keys, key_lo, head, prior)
            weights = tl.math.exp2(scores - exponent[:, None])
            if phase == 0:
                weights = tl.where(visible, weights, 0.0)
            d_weights = dot(d_out, tl.trans(v), zeros, DOT_PRECISION)
            d_scores = weights * (sign * d_weights - delta[:, None])
            dq = dot(cast(d_scores, k.dtype), k, dq, DOT_PRECISION)
            if PRIOR_ENTRIES > 0:
                # Of the natural log of A0: through the softmax, through D and through the centre.
                at_zero = tl.where(visible, 1.0, 0.0)
                at_zero = TIMES_PRIOR(at_zero, positions, keys, key_lo, head, prior)
                d_logs = at_zero * (d_prior_sum[:, None] - center_weight[:, None] * d_weights)
                entries = ACCUMULATE_PRIOR(entries, d_scores + d_logs, positions, keys, key_lo)

    if scale_dots_ptr is not None:
        # d loss / d scale = sum_i q_i . (dS K)_i; one slot per head and tile.
        dots = tl.sum(dq * q.to(tl.float32))
        tl.store(scale_dots_ptr + tl.cast(pid_bh, tl.int64) * tiles + pid_t, dots)
    if PRIOR_ENTRIES > 0:
        # (PRIOR_ENTRIES, B, H, T), summed over rows and batch afterwards in a fixed order.
        for entry in tl.static_range(PRIOR_ENTRIES):
            table = d_table_ptr + entry * heads * T + first_row + offs_t
            tl.store(table, entries[entry], mask=inside)
    dq_rows = (None, dq_ptr, 0, pid_bh, T, 0, T * D, D, 1)
    store_tile(dq_rows, row, scale * dq, D, WIDE)
