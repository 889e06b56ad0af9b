"""Forward: the whole formula in one launch (after the block sums of v, if it is centred)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from . import launch
from .configs import block_width, pick_config
from .primitives import (
    BRANCH,
    CENTER,
    IDENTITY,
    LN_2,
    LOG2_E,
    SCALE,
    SKIP,
    SOFTMAX,
    cast,
    dot,
    head_base,
    load_gain,
    load_tile,
    store_tile,
)
from .value_sums import ValueBlockSums, visible_value_sum
from .visibility import (
    MASK,
    key_blocks,
    load_key_range,
    visibility_arguments,
    visibility_sizes,
    visible_count,
    visible_keys,
)

if TYPE_CHECKING:
    from .attention import Call, ForwardResult


@triton.jit
def _rescale(acc, excess_sum, reference, row_max, scores, CENTERED: tl.constexpr):
    """Raise the row maximum to that of `scores`, if centred to an integer at or above it.

    Factors are then powers of two. Without a centre the largest weight is 1, which no dtype rounds.
    """
    block_max = tl.max(scores, 1)
    if CENTERED:
        block_max = tl.math.ceil(block_max)
    new_max = tl.maximum(row_max, block_max)
    # A row that has seen no key has maximum -inf: a finite pivot keeps exp2 free of inf - inf.
    pivot = tl.where(new_max == -float("inf"), 0.0, new_max)
    factor = tl.math.exp2(row_max - pivot)
    weights = tl.math.exp2(scores - pivot[:, None])
    return weights, acc * factor[:, None], excess_sum * factor, reference * factor, new_max


@triton.jit
def _row_sum(weights, rounded, CENTERED: tl.constexpr):
    """Row sums of the weights; of the rounded ones where a common rounding error must cancel."""
    return tl.sum(rounded.to(tl.float32) if CENTERED else weights, 1)


@triton.jit(do_not_specialize=["H", "GROUP", "T", "S", "q_offset", "diagonal"])
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    residual_ptr,
    out_ptr,
    lse_ptr,
    excess_ptr,
    center_ptr,
    row_stats_ptr,
    block_sums_ptr,
    visibility,
    prior,
    gains,
    gain_strides,
    q_strides,
    k_strides,
    v_strides,
    residual_strides,
    out_strides,
    H,
    GROUP,
    T,
    S,
    q_offset,
    diagonal,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    CENTERED: tl.constexpr,
    GAIN_IS_TENSOR: tl.constexpr,
    ADD_LOG2_PRIOR: tl.constexpr,
    TIMES_PRIOR: tl.constexpr,
    UNIFORM_PRIOR: tl.constexpr,
    WIDE: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):
    # Keys per row are known in closed form unless a mask or a prior weighs them one by one.
    WEIGHED: tl.constexpr = (visibility[MASK] is not None) or (not UNIFORM_PRIOR)
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    # Last rows first: under a causal mask they take longest.
    row = (tiles - 1 - pid % tiles) * BLOCK_T
    pid_bh = pid // tiles
    batch = pid_bh // H
    head = pid_bh % H
    kv_head = head // GROUP

    q_base = head_base(q_ptr, batch, head, q_strides)
    k_base = head_base(k_ptr, batch, kv_head, k_strides)
    v_base = head_base(v_ptr, batch, kv_head, v_strides)

    scale_log2 = LOG2_E * load_gain(gains, gain_strides, GAIN_IS_TENSOR, SCALE, head)

    key_lo, key_hi = load_key_range(visibility, batch, S)
    # [BLOCK_T]
    offs_t = row + tl.arange(0, BLOCK_T)
    positions = (q_offset + offs_t)[:, None]
    row_max = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    excess_sum = tl.zeros((BLOCK_T,), tl.float32)
    reference = tl.zeros((BLOCK_T,), tl.float32)
    weight_sum = tl.zeros((BLOCK_T,), tl.float32)
    # u of (4), relative to the row maximum; with a prior log2 u, and the sum of u A0.
    reference_log2 = tl.zeros((BLOCK_T,), tl.float32)
    # [BLOCK_T, BLOCK_DV]
    acc = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    value_sum = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    # [BLOCK_T, BLOCK_D]
    q = load_tile(q_base, row, T, q_strides[2:], D, BLOCK_T, BLOCK_D, True, WIDE)

    first, full_end, masked = key_blocks(
        row, T, key_lo, key_hi, diagonal, BLOCK_T, BLOCK_S, WEIGHED
    )
    # The first block and those at the edges of the visible range; the first sets the reference.
    for block in tl.range(0, masked):
        key = tl.where(block == 0, first, full_end + (block - 1) * BLOCK_S)
        # [1, BLOCK_S]
        keys = (key + tl.arange(0, BLOCK_S))[None, :]
        # [BLOCK_S, BLOCK_D], [BLOCK_S, BLOCK_DV]
        k = load_tile(k_base, key, S, k_strides[2:], D, BLOCK_S, BLOCK_D, True, WIDE)
        v = load_tile(v_base, key, S, v_strides[2:], DV, BLOCK_S, BLOCK_DV, True, WIDE)
        # [BLOCK_T, BLOCK_S]
        zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        logits = dot(q, tl.trans(k), zeros, DOT_PRECISION) * scale_log2
        scores = ADD_LOG2_PRIOR(logits, positions, keys, key_lo, head, prior)
        visible = visible_keys(
            visibility,
            batch,
            head,
            row,
            key,
            T,
            S,
            key_lo,
            key_hi,
            diagonal,
            BLOCK_T,
            BLOCK_S,
            False,
            WIDE,
        )
        scores = tl.where(visible, scores, -float("inf"))
        weights, acc, excess_sum, reference, row_max = _rescale(
            acc, excess_sum, reference, row_max, scores, CENTERED
        )
        if WEIGHED:
            ones = tl.where(visible, 1.0, 0.0)
            count = tl.sum(ones, 1)
            at_zero = TIMES_PRIOR(ones, positions, keys, key_lo, head, prior)
            tile_sum = count if UNIFORM_PRIOR else tl.sum(at_zero, 1)
            if CENTERED:
                value_sum = dot(cast(at_zero, v.dtype), v, value_sum, DOT_PRECISION)
        else:
            count = visible_count(offs_t, key, key_lo, key_hi, diagonal, BLOCK_S)
            tile_sum = count
        if CENTERED:
            # The geometric mean weight of a row's first visible tile, exact in the dtype of v.
            starts = (weight_sum == 0.0) & (count > 0.0)
            mean = tl.sum(tl.where(visible, logits, 0.0), 1) / tl.where(starts, count, 1.0)
            if UNIFORM_PRIOR:
                typical = cast(tl.math.exp2(mean - row_max), v.dtype).to(tl.float32)
                reference = tl.where(starts, typical, reference)
                weights -= tl.where(visible, reference[:, None], 0.0)
            else:
                # In logs: far from the diagonal A0 underflows, and u alone overflows.
                reference_log2 = tl.where(starts, mean, reference_log2)
                at_reference = ADD_LOG2_PRIOR(
                    reference_log2[:, None] + zeros, positions, keys, key_lo, head, prior
                )
                at_reference = tl.math.exp2(at_reference - row_max[:, None])
                at_reference = tl.where(visible, at_reference, 0.0)
                reference += tl.sum(at_reference, 1)
                weights -= at_reference
        weight_sum += tile_sum
        rounded = cast(weights, v.dtype)
        excess_sum += _row_sum(weights, rounded, CENTERED)
        acc = dot(rounded, v, acc, DOT_PRECISION)

    if not WEIGHED:
        # Blocks that every row sees whole.
        for key in tl.range(first + BLOCK_S, full_end, BLOCK_S):
            k = load_tile(k_base, key, S, k_strides[2:], D, BLOCK_S, BLOCK_D, False, WIDE)
            v = load_tile(v_base, key, S, v_strides[2:], DV, BLOCK_S, BLOCK_DV, False, WIDE)
            # [BLOCK_T, BLOCK_S]
            zeros = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
            scores = dot(q, tl.trans(k), zeros, DOT_PRECISION) * scale_log2
            weights, acc, excess_sum, reference, row_max = _rescale(
                acc, excess_sum, reference, row_max, scores, CENTERED
            )
            if CENTERED:
                weights -= reference[:, None]
            rounded = cast(weights, v.dtype)
            excess_sum += _row_sum(weights, rounded, CENTERED)
            acc = dot(rounded, v, acc, DOT_PRECISION)
        row_end = tl.minimum(key_hi, offs_t + diagonal)
        weight_sum = tl.maximum(row_end - key_lo, 0).to(tl.float32)

    # [BLOCK_T]
    normalizer = excess_sum + (weight_sum * reference if UNIFORM_PRIOR else reference)
    has_keys = row_max > -float("inf")
    inverse_normalizer = tl.where(has_keys, 1.0 / tl.where(has_keys, normalizer, 1.0), 0.0)
    inverse_weight_sum = tl.where(weight_sum > 0.0, 1.0 / tl.maximum(weight_sum, 1e-30), 0.0)
    # D of the formula: 1 for a prior whose rows sum to 1.
    prior_sum = 1.0 if UNIFORM_PRIOR else weight_sum[:, None]
    if CENTERED:
        if not WEIGHED:
            sums_base = block_sums_ptr + tl.cast(pid_bh // GROUP, tl.int64) * (
                tl.cdiv(S, SUM_BLOCK) * DV
            )
            value_sum = visible_value_sum(
                v_base,
                sums_base,
                row,
                T,
                S,
                key_lo,
                key_hi,
                diagonal,
                v_strides[2:],
                DV,
                BLOCK_T,
                BLOCK_DV,
                SUM_BLOCK,
                WIDE,
                DOT_PRECISION,
            )
        center = value_sum
        excess = acc - (excess_sum * inverse_weight_sum)[:, None] * value_sum
        excess *= inverse_normalizer[:, None]
        if UNIFORM_PRIOR:
            center *= inverse_weight_sum[:, None]
    else:
        excess = acc * inverse_normalizer[:, None]

    # Saved tensors are contiguous (B, H, T, ...). They go first: their registers are then free.
    first_row = tl.cast(pid_bh, tl.int64) * T
    inside = offs_t < T
    lse = LN_2 * (row_max + tl.math.log2(tl.where(has_keys, normalizer, 1.0)))
    tl.store(lse_ptr + first_row + offs_t, lse, mask=inside)
    if excess_ptr is not None:
        excess_base = excess_ptr + first_row * DV
        store_tile(excess_base, row, T, (DV, 1), excess, DV, BLOCK_T, BLOCK_DV, WIDE)
        if center_ptr is not None:
            center_base = center_ptr + first_row * DV
            store_tile(center_base, row, T, (DV, 1), center, DV, BLOCK_T, BLOCK_DV, WIDE)
        plane = tl.cast(tl.num_programs(0) // tiles, tl.int64) * T
        stats = row_stats_ptr + first_row + offs_t
        tl.store(stats, row_max, mask=inside)
        tl.store(stats + plane, inverse_normalizer, mask=inside)
        tl.store(stats + 2 * plane, weight_sum, mask=inside)

    # Loaded this late, the gains cost no registers above.
    branch_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, BRANCH, head)
    softmax_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, SOFTMAX, head)
    out = softmax_gain * prior_sum * excess
    if CENTERED:
        center_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, CENTER, head)
        out += (softmax_gain - center_gain) * center
    if HAS_IDENTITY:
        identity_gain = branch_gain * load_gain(gains, gain_strides, GAIN_IS_TENSOR, IDENTITY, head)
        own = load_tile(v_base, q_offset + row, S, v_strides[2:], DV, BLOCK_T, BLOCK_DV, True, WIDE)
        out += identity_gain * own.to(tl.float32)
    if residual_ptr is not None:
        skip_gain = load_gain(gains, gain_strides, GAIN_IS_TENSOR, SKIP, head)
        residual_base = head_base(residual_ptr, batch, head, residual_strides)
        residual = load_tile(
            residual_base, row, T, residual_strides[2:], DV, BLOCK_T, BLOCK_DV, True, WIDE
        )
        out += skip_gain * residual.to(tl.float32)
    out_base = head_base(out_ptr, batch, head, out_strides)
    store_tile(out_base, row, T, out_strides[2:], out, DV, BLOCK_T, BLOCK_DV, WIDE)


class _Plan(NamedTuple):
    """The launches of a forward; value_sums is None where it does not need the sums."""

    value_sums: ValueBlockSums | None
    forward: launch.Launch


def _plan(call: Call) -> _Plan:
    q, k, v, residual, gains, visibility, prior, _ = call
    B, H, T, D = q.shape
    HKV, S, DV = k.shape[1], k.shape[2], v.shape[3]
    attn_mask = visibility.attn_mask
    arch = launch.architecture(q)
    config = pick_config("forward", D, DV, q.element_size(), arch, weighed_by=call.weighed_by)
    gain_strides, gain_is_tensor = launch.gain_arguments(gains)
    forward = launch.Launch(
        attention_fwd_kernel,
        triton.cdiv(T, config.block_t) * B * H,
        (
            gain_strides,
            q.stride(),
            k.stride(),
            v.stride(),
            launch.strides(residual),
            (H * T * DV, T * DV, DV, 1),
            H,
            H // HKV,
            T,
            S,
            *visibility_sizes(visibility, T, S),
        ),
        config,
        D=D,
        DV=DV,
        BLOCK_D=block_width(D),
        BLOCK_DV=block_width(DV),
        BLOCK_T=config.block_t,
        BLOCK_S=config.block_s,
        SUM_BLOCK=config.sum_block,
        HAS_IDENTITY=call.has_identity,
        CENTERED=call.is_centered,
        GAIN_IS_TENSOR=gain_is_tensor,
        ADD_LOG2_PRIOR=prior.add_log2,
        TIMES_PRIOR=prior.times,
        UNIFORM_PRIOR=prior.is_uniform,
        WIDE=launch.needs_wide_index(config, q, k, v, residual, attn_mask),
        DOT_PRECISION=launch.dot_precision(q.dtype, arch, D, DV),
    )
    needs_sums = call.is_centered and call.weighed_by is None
    return _Plan(ValueBlockSums(v, config) if needs_sums else None, forward)


def launch_forward(call: Call, result: ForwardResult) -> None:
    """Launch the forward kernel, which fills `result`; both as in `attention`."""
    q, k, v, residual, gains, visibility, _, prior_parameters = call
    with launch.on_device(q):
        plan = launch.plan_of(_plan, call, (), result.excess is None)
        plan.forward(
            q,
            k,
            v,
            residual,
            *result,
            None if plan.value_sums is None else plan.value_sums(v),
            visibility_arguments(visibility),
            prior_parameters,
            tuple(gains),
        )
