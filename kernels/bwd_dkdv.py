"""Second backward kernel: gradients of k and v, one block of keys per program."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    BRANCH,
    CENTER,
    IDENTITY,
    LOG2_E,
    SCALE,
    SOFTMAX,
    aligned_rows,
    cast,
    dot,
    index,
    load_gain,
    load_tile,
    softmax_sign,
    store_tile,
)
from .visibility import MASK, load_bounds, query_blocks, visible_keys


@triton.jit
def _group_scales(
    gains,
    gain_strides,
    GAIN_IS_TENSOR: tl.constexpr,
    kv_head,
    GROUP: tl.constexpr,
    dtype: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
):
    """Common factors under which the heads of one group accumulate dk and dv.

    Returns the scale of largest size, and the power of two that lifts weights of order 1/n out of
    float16's subnormal range: they are at most D (|softmax_gain| + |center_gain|), which leaves
    a factor of 16 to overflow where D = 1. A prior that keeps variances has D up to the root of
    the number of keys: it gets a factor of 2048.
    """
    largest_scale = tl.full((), 0.0, tl.float32)
    largest_weight = tl.full((), 1e-6, tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        scale = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)
        largest_scale = tl.where(tl.abs(scale) > tl.abs(largest_scale), scale, largest_scale)
        if dtype == tl.float16:
            branch_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, BRANCH, head)
            softmax_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SOFTMAX, head)
            center_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, CENTER, head)
            size = tl.abs(branch_gain) * (tl.abs(softmax_gain) + tl.abs(center_gain))
            largest_weight = tl.maximum(largest_weight, size)
    weight_lift = tl.full((), 1.0, tl.float32)
    if dtype == tl.float16:
        lift = 12.0 if UNIFORM_PRIOR else 5.0
        weight_lift = tl.math.exp2(lift - tl.math.ceil(tl.math.log2(largest_weight)))
    return largest_scale, weight_lift


@triton.jit(do_not_specialize=["H", "T", "S", "q_offset", "diagonal"])
def attention_bwd_dkdv_kernel(
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
    dk_ptr,
    dv_ptr,
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
    HAS_IDENTITY: tl.constexpr,
    CENTERED: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    TIMES_PRIOR: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    WEIGHED: tl.constexpr = (visibility[MASK] is not None) or (not UNIFORM_PRIOR)
    # Loops over the heads of a group and over their tiles, or, with fewer registers, one over both.
    MEMBERS: tl.constexpr = 1 if WEIGHED else GROUP
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    blocks = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    # First keys first: under a causal mask they take longest.
    key = pid % blocks * BLOCK_S
    pid_bh = pid // blocks
    kv_heads = H // GROUP
    batch = pid_bh // kv_heads
    kv_head = pid_bh % kv_heads
    plane = tl.cast(tl.num_programs(0) // blocks, tl.int64) * GROUP * aligned_rows(T)

    k_rows = (k_descriptor, k_ptr, batch, kv_head, S) + strides[4:8]
    v_rows = (v_descriptor, v_ptr, batch, kv_head, S) + strides[8:12]
    # [BLOCK_S, BLOCK_D], [BLOCK_S, BLOCK_DV]
    k = load_tile(k_rows, key, D, BLOCK_S, WIDE)
    v = load_tile(v_rows, key, DV, BLOCK_S, WIDE)
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(v.shape, tl.float32)

    bounds = load_bounds(visibility, batch, T, S, diagonal)
    key_lo = bounds[2]
    masked_from, full_from = query_blocks(key, bounds, BLOCK_T, BLOCK_S, WEIGHED)
    largest_scale, weight_lift = _group_scales(
        gains, gain_strides, GAIN_IS_TENSOR, kv_head, GROUP, dtype, UNIFORM_PRIOR
    )
    # First the rows that need a mask, then those that see all keys of the block.
    for phase in tl.static_range(1 if WEIGHED else 2):
        from_row = masked_from if phase == 0 else full_from
        tiles = (
            (full_from - masked_from) // BLOCK_T if phase == 0 else tl.cdiv(T - full_from, BLOCK_T)
        )
        for member in tl.range(0, MEMBERS, num_stages=1):
            head = kv_head * GROUP + member
            scale = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)
            sign = softmax_sign(gains, gain_strides, GAIN_IS_TENSOR, head)
            steps = GROUP // MEMBERS * tiles
            for step in tl.range(0, steps, num_stages=MASKED_STAGES if phase == 0 else None):
                row = from_row + step * BLOCK_T
                if GROUP > MEMBERS:
                    head = kv_head * GROUP + step // tiles
                    row = from_row + step % tiles * BLOCK_T
                    scale = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)
                    sign = softmax_sign(gains, gain_strides, GAIN_IS_TENSOR, head)
                q_rows = (q_descriptor, q_ptr, batch, head, T) + strides[0:4]
                d_out_rows = (d_out_descriptor, d_out_ptr, batch, head, T) + strides[12:16]
                row_terms = row_terms_ptr + (tl.cast(batch, tl.int64) * H + head) * aligned_rows(T)
                # [BLOCK_T]
                offs_t = row + tl.arange(0, BLOCK_T)
                # Rows past T have weight 0, so they need no mask below.
                exponent = tl.load(row_terms + offs_t)
                delta = tl.load(row_terms + plane + offs_t)
                # [BLOCK_T, BLOCK_D], [BLOCK_T, BLOCK_DV]
                q = load_tile(q_rows, row, D, BLOCK_T, WIDE)
                d_out = load_tile(d_out_rows, row, DV, BLOCK_T, WIDE)
                if d_out.dtype != dtype:
                    d_out = cast(d_out.to(tl.float32), dtype)
                # [1, BLOCK_T], [BLOCK_S, 1]
                tile_rows = index(BLOCK_T, WIDE)[None, :]
                tile_keys = index(BLOCK_S, WIDE)[:, None]
                positions = (q_offset + offs_t)[None, :]
                keys = (key + tl.arange(0, BLOCK_S))[:, None]
                # [BLOCK_S, BLOCK_T]
                zeros = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
                scores = dot(k, tl.trans(q), zeros, DOT_PRECISION) * (LOG2_E * scale)
                scores = ADD_LOG2_PRIOR(scores, positions, keys, key_lo, head, prior)
                weights = tl.math.exp2(scores - exponent[None, :])
                if phase == 0:
                    visible = visible_keys(
                        visibility, bounds, batch, head, row, key, tile_rows, tile_keys
                    )
                    weights = tl.where(visible, weights, 0.0)
                value_weights = weights * (sign * weight_lift)
                if CENTERED:
                    center_weight = tl.load(row_terms + 2 * plane + offs_t)
                    center_weights = (center_weight * weight_lift)[None, :] + zeros
                    if phase == 0:
                        center_weights = tl.where(visible, center_weights, 0.0)
                    value_weights -= TIMES_PRIOR(
                        center_weights, positions, keys, key_lo, head, prior
                    )
                dv = dot(cast(value_weights, dtype), d_out, dv, DOT_PRECISION)
                d_weights = dot(v, tl.trans(d_out), zeros, DOT_PRECISION)
                score_sign = sign
                if GROUP > 1:
                    # The heads of a group share one accumulator in units of the largest scale.
                    unit = tl.where(largest_scale == 0.0, 0.0, scale / largest_scale)
                    score_sign = sign * unit
                    delta *= unit
                d_scores = weights * (score_sign * d_weights - delta[None, :])
                dk = dot(cast(d_scores, dtype), q, dk, DOT_PRECISION)

    dk *= largest_scale
    dv *= 1.0 / weight_lift
    if HAS_IDENTITY:
        for member in tl.range(0, GROUP):
            head = kv_head * GROUP + member
            branch_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, BRANCH, head)
            identity_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, IDENTITY, head)
            # A descriptor is for tiles of BLOCK_T rows.
            d_out_rows = (None, d_out_ptr, batch, head, T) + strides[12:16]
            d_out = load_tile(d_out_rows, key - q_offset, DV, BLOCK_S, WIDE)
            dv += branch_gain * identity_gain * d_out.to(tl.float32)
    # Gradients are contiguous (B, Hkv, S, ...).
    dk_rows = (None, dk_ptr, 0, pid_bh, S, 0, S * D, D, 1)
    dv_rows = (None, dv_ptr, 0, pid_bh, S, 0, S * DV, DV, 1)
    store_tile(dk_rows, key, dk, D, WIDE)
    store_tile(dv_rows, key, dv, DV, WIDE)
