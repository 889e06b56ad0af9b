"""The Triton kernels against float64: forward and every gradient, in every dtype and regime."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_calls import (
    DTYPES,
    GAINS,
    assert_right,
    of_dtype,
    reference_attention,
    triton_attention,
)

from shaped_attn import shaped_attention
from shaped_attn.kernels import launch
from shaped_attn.kernels.configs import TileConfig, override_config
from shaped_attn.kernels.visibility import visibility_arguments
from shaped_attn.testing import (
    SPREADS,
    Case,
    assert_within_budget,
    eager_attention,
    forward_backward,
    make_inputs,
    make_options,
    relative_error,
    rounding_spread,
)
from shaped_attn.visibility import Visibility

pytestmark = pytest.mark.usefixtures("poison")

# Fewer, larger tiles: the interpreter's cost is per operation, not per element.
LARGE_TILES = TileConfig(block_t=128, block_s=64, num_warps=4, num_stages=1, sum_block=64)

# Each row names what it is there for; sizes are odd on purpose.
CASES = {
    "one_query_one_key": Case(1, 1, queries=1, head_dim=16),
    "exact_tiles": Case(1, 2, queries=64, head_dim=32),
    "ragged_full": Case(1, 2, queries=33, keys=47, head_dim=16),
    "ragged_causal": Case(1, 2, queries=75, head_dim=16, is_causal=True, residual_dtype=...),
    "grouped_heads_and_cache": Case(
        2, 4, 2, 37, 70, 24, 40, is_causal=True, residual_dtype=torch.float32
    ),
    "one_kv_head": Case(1, 3, 1, 34, 34, 16, is_causal=True),
    "more_queries_than_keys": Case(1, 1, queries=70, keys=20, head_dim=16, is_causal=True),
    "offset_in_cache": Case(1, 2, queries=20, keys=75, head_dim=16, is_causal=True, q_offset=21),
    "offset_before_keys": Case(1, 1, queries=40, head_dim=16, is_causal=True, q_offset=-9),
    "offset_past_keys": Case(1, 1, queries=9, keys=40, head_dim=16, is_causal=True, q_offset=99),
    "left_padding": Case(2, 2, queries=50, head_dim=16, is_causal=True, padding="left"),
    "both_paddings": Case(3, 2, queries=40, keys=77, head_dim=16, padding="both"),
    "random_mask": Case(2, 2, 1, 35, 50, 16, is_causal=True, mask="random", residual_dtype=...),
    "mask_of_keys": Case(2, 2, queries=35, head_dim=16, mask="keys", padding="right"),
    "row_without_keys": Case(1, 2, queries=34, keys=40, head_dim=16, mask="rows"),
    "wide_keys": Case(1, 1, queries=33, head_dim=80, value_dim=16, is_causal=True),
    "wide_values": Case(1, 1, queries=33, head_dim=16, value_dim=136, is_causal=True),
    "odd_head_dims": Case(2, 2, 1, 33, 40, 17, 5, is_causal=True, residual_dtype=torch.float32),
    "odd_head_dims_and_mask": Case(1, 2, 1, 33, 40, 31, 33, mask="random", residual_dtype=...),
    "smallest_head_dims": Case(1, 2, queries=33, head_dim=1, value_dim=1, is_causal=True),
    "narrow_head_dims": Case(1, 2, queries=33, head_dim=8, value_dim=12, padding="both"),
    "largest_head_dim": Case(1, 1, queries=33, head_dim=256, value_dim=256, is_causal=True),
}


def draw_gains(device, case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """Learnable gains per head, two of them shared; identity only where it is legal."""
    generator = torch.Generator().manual_seed(seed)
    typical = (0.9, 1.1, 0.8, 0.7, 0.6, 1 / case.head_dim**0.5)
    gains = {
        name: value * (1 + 0.3 * torch.randn(case.heads, generator=generator))
        for name, value in zip(GAINS, typical, strict=True)
    }
    gains["branch_gain"] = gains["branch_gain"][0]
    gains["center_gain"] = gains["center_gain"][0]
    if not case.has_own_keys:
        del gains["identity_gain"]
    if case.residual_dtype is None:
        del gains["skip_gain"]
    return {name: gain.to(device) for name, gain in gains.items()}


def compare(device, case: Case, gains: dict, fixed: dict, **draw) -> None:
    """Check out, lse and every gradient of the kernels against the float64 reference."""
    tensors = make_inputs(case, scale=1 / case.head_dim**0.5, device=device, **draw)._asdict()
    options = make_options(case, device=device) | fixed | {"return_lse": True}
    if not case.has_own_keys:
        options["identity_gain"] = 0.0
    rows = (case.batch, case.heads, case.queries)
    d_out = torch.randn(*rows, case.value_dim).to(case.dtype).to(device)
    d_lse = torch.randn(rows).to(device)

    def run(function, convert):
        arguments = {name: None if x is None else convert(x) for name, x in tensors.items()}
        arguments |= {name: convert(gain) for name, gain in gains.items()}
        return forward_backward(function, arguments, d_out, d_lse, **options)

    actual = run(triton_attention, lambda x: x)
    eager = run(eager_attention, lambda x: x)

    def exact():
        return run(reference_attention, lambda x: x.double())

    golden, spread = rounding_spread(exact, case.dtype) if gains else (exact(), {})
    assert_right(actual, golden, eager, spread)
    if case.dtype == torch.float32 and case.keys > 1:  # else that of the scale is 0
        for name in (f"grad {gain}" for gain in gains):
            assert SPREADS * spread[name].norm() <= 0.01 * golden[name].norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_and_gradients(name, dtype, device):
    case = of_dtype(CASES[name], dtype)
    compare(device, case, draw_gains(device, case), {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fixed",
    [
        {},
        {"identity_gain": 0.0, "center_gain": 0.0},
        {"softmax_gain": 0.0, "center_gain": 0.0},
        {"identity_gain": 0.0, "softmax_gain": 0.0},
        {"identity_gain": 0.7, "softmax_gain": -1.3, "center_gain": 0.4, "branch_gain": -0.5},
        {"scale": 0.0},
        {"scale": -0.2},
    ],
    ids=lambda fixed: "-".join(f"{k.removesuffix('_gain')}{v}" for k, v in fixed.items()),
)
def test_fixed_gains(fixed, dtype, device):
    compare(device, Case(1, 2, 1, queries=40, head_dim=16, is_causal=True, dtype=dtype), {}, fixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_of_zero_still_has_a_gradient(dtype, device):
    # The heads of a group share one accumulator for dk, in units of the largest scale.
    case = Case(1, 2, 1, queries=40, head_dim=16, is_causal=True, dtype=dtype)
    for scale in ([0.0, 0.3], [0.0, 0.0]):
        gains = {"scale": torch.tensor(scale, device=device)}
        compare(device, case, gains, {"branch_gain": 0.7})


@pytest.mark.parametrize(
    "tiles",
    [
        TileConfig(16, 64, 4, 1, sum_block=32),
        TileConfig(64, 16, 4, 1, sum_block=64),
        TileConfig(128, 128, 4, 1, sum_block=16),
    ],
    ids=lambda tiles: f"{tiles.block_t}x{tiles.block_s}",
)
@pytest.mark.parametrize("name", ["grouped_heads_and_cache", "both_paddings", "random_mask"])
def test_every_shape_of_tile(name, tiles, device):
    case = of_dtype(CASES[name], torch.float32)
    with override_config(tiles):
        compare(device, case, draw_gains(device, case), {})


@pytest.mark.parametrize("batch, queries, keys", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_zero_sizes(batch, queries, keys, device):
    case = Case(batch, 2, queries=queries, keys=keys, head_dim=16, residual_dtype=torch.float32)
    gains = draw_gains(device, case)
    gains.pop("identity_gain", None)
    compare(device, case, gains, {"identity_gain": 0.0})


# The centred term itself: identity 0, softmax and centre 1, so out is that term and nothing else.
CENTERED = {"identity_gain": 0.0, "softmax_gain": 1.0, "center_gain": 1.0}
CENTERED_ERROR = {torch.float32: 3e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}
REGIMES = {
    "plain": {},
    "values_of_mean_3": {"value_mean": 3.0},
    "keys_of_mean_4": {"key_mean": 4.0, "value_mean": 1.0},
    "sink_key": {"sink": True, "value_mean": 1.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "logit_std",
    [0.01, 0.1, 1.0, 10.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.03, 0.3, 3, 30))],
)
@pytest.mark.parametrize("regime", REGIMES)
def test_centered_term_is_accurate_to_its_own_rounding(regime, logit_std, dtype, device):
    is_causal = logit_std in (0.01, 0.3, 10.0, 30)
    case = Case(1, 1, queries=512, head_dim=64, dtype=dtype, is_causal=is_causal)
    q, k, v, _ = make_inputs(case, logit_std=logit_std, device=device, **REGIMES[regime])
    options = {"is_causal": is_causal, **CENTERED}
    with override_config(LARGE_TILES):
        out = shaped_attention(q, k, v, **options, impl="triton")
    golden = shaped_attention(q.double(), k.double(), v.double(), **options, impl="reference")
    assert relative_error(out, golden) <= CENTERED_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_std", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_of_the_centered_term(regime, logit_std, dtype, device):
    case = Case(1, 1, queries=160, head_dim=32, dtype=dtype, is_causal=True)
    scale = 1 / case.head_dim**0.5
    with override_config(LARGE_TILES):
        compare(
            device, case, {}, {**CENTERED, "scale": scale}, logit_std=logit_std, **REGIMES[regime]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_zero_queries_return_v(is_causal, dtype, device):
    case = Case(1, 2, 1, queries=77, head_dim=16, dtype=dtype, is_causal=is_causal)
    q, k, v, _ = make_inputs(case, value_mean=3.0, device=device)
    out = shaped_attention(0 * q, k, v, is_causal=is_causal, impl="triton")
    assert torch.equal(out, v.expand_as(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, queries=45, head_dim=16),
        Case(2, 2, queries=45, head_dim=16, is_causal=True),
        Case(1, 4, 2, queries=45, head_dim=16, is_causal=True),
        Case(2, 2, queries=45, head_dim=16, mask="random"),
    ],
    ids=["full", "causal", "grouped_heads", "mask"],
)
def test_plain_gains_are_scaled_dot_product_attention(case, dtype, device):
    case = dataclasses.replace(case, dtype=dtype)
    scale = 1 / case.head_dim**0.5
    q, k, v, _ = make_inputs(case, scale=scale, device=device)
    mask = make_options(case, device=device).get("attn_mask")
    plain = {"identity_gain": 0.0, "center_gain": 0.0, "scale": scale}
    visible = {"is_causal": case.is_causal, "attn_mask": mask}

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **visible, enable_gqa=True)

    d_out = torch.randn(q.shape).to(q)
    tensors = {"q": q, "k": k, "v": v}
    doubles = {name: x.double() for name, x in tensors.items()}
    actual = forward_backward(triton_attention, tensors, d_out, **plain, **visible)
    golden = forward_backward(sdpa, doubles, d_out)
    eager = forward_backward(eager_attention, tensors, d_out, **plain, **visible)
    for name, value in actual.items():
        assert_within_budget(value, golden[name], eager[name], factor=2, name=name)


def run_all(tensors: dict, gains: dict, **options) -> dict[str, torch.Tensor]:
    """Forward and backward of the kernels on one drawn output gradient."""
    B, H, T, _ = tensors["q"].shape
    generator = torch.Generator().manual_seed(7)
    d_out = torch.randn(B, H, T, tensors["v"].shape[3], generator=generator)
    return forward_backward(triton_attention, {**tensors, **gains}, d_out, **options)


def small_call(device, **changes) -> tuple[dict, dict]:
    case = Case(**{"batch": 2, "heads": 2, "kv_heads": 1, "queries": 50, "head_dim": 16} | changes)
    inputs = make_inputs(case, value_mean=1.0, device=device)
    tensors = {name: x for name, x in inputs._asdict().items() if x is not None}
    return tensors, draw_gains(device, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_calls_give_equal_bits(dtype, device):
    tensors, gains = small_call(device, dtype=dtype, residual_dtype=dtype)
    first = run_all(tensors, gains, is_causal=True)
    second = run_all(tensors, gains, is_causal=True)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_future_rows_leave_the_past_bit_for_bit(device):
    tensors, gains = small_call(device, dtype=torch.bfloat16)
    changed = {name: x.clone() for name, x in tensors.items()}
    for name in ("k", "v"):
        changed[name][:, :, 33:] = 5.0
    before = shaped_attention(**tensors, **gains, is_causal=True, impl="triton")
    after = shaped_attention(**changed, **gains, is_causal=True, impl="triton")
    assert torch.equal(before[:, :, :33], after[:, :, :33])
    assert not torch.equal(before[:, :, 33:], after[:, :, 33:])


def test_one_vector_added_to_all_values_leaves_the_centered_term(device):
    tensors, _ = small_call(device)
    shift = torch.randn(16).to(device)
    options = {"is_causal": True, **CENTERED, "scale": 0.1, "impl": "triton"}
    before = shaped_attention(**tensors, **options)
    after = shaped_attention(**(tensors | {"v": tensors["v"] + shift}), **options)
    # Adding the vector rounds v, and the absolute weights of the centred term sum to at most 2.
    largest = (tensors["v"].abs() + shift.abs()).max()
    assert (after - before).abs().max() <= 2 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("layout", ["fused_qkv", "sequence_first", "reversed_width"])
def test_any_strides_give_equal_bits(layout, device):
    B, H, T, D = 2, 2, 40, 16
    if layout == "fused_qkv":
        packed = torch.randn(B, T, 3, H, D).to(device)
        q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    elif layout == "sequence_first":
        q, k, v = (torch.randn(T, B, H, D).to(device).permute(1, 2, 0, 3) for _ in range(3))
    else:
        q, k, v = (torch.randn(B, H, D, T).to(device).transpose(2, 3) for _ in range(3))
    assert not q.is_contiguous()
    residual = torch.randn(B, T, H, D).to(device).transpose(1, 2)
    views = {"q": q, "k": k, "v": v, "residual": residual}
    dense = {name: x.contiguous() for name, x in views.items()}
    d_out = torch.randn(B, T, H, D).to(device).transpose(1, 2)
    found = []
    for tensors in (views, dense):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        out = shaped_attention(*leaves, is_causal=True, impl="triton")
        found.append([out, *torch.autograd.grad(out, leaves, d_out)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_strides_past_32_bits(device):
    """Rows 2**31 elements apart: an int32 offset wraps around silently."""
    # Only the touched pages of this memory exist.
    rows, stride, D = 3, 2**30 + 8, 16
    needed = (rows - 1) * stride + D
    wide = torch.UntypedStorage(needed * 2, device=device)
    far = torch.empty(0, dtype=torch.float16, device=device)
    far = far.set_(wide, 0, (1, 1, rows, D), (0, 0, stride, 1))
    near = torch.randn(1, 1, rows, D).to(device).half()
    far.copy_(near)
    q = torch.randn(1, 1, rows, D).to(device).half()
    expected = shaped_attention(q, near, near, is_causal=True, impl="triton")
    assert torch.equal(shaped_attention(q, far, far, is_causal=True, impl="triton"), expected)
    assert torch.equal(
        shaped_attention(far, near, near, is_causal=True, impl="triton"),
        shaped_attention(near, near, near, is_causal=True, impl="triton"),
    )


def test_wide_index_is_chosen_by_stride():
    tiles = TileConfig(64, 64, 4, 1)
    dense = torch.empty(2**16, 2, 2**16, 128, device="meta")
    assert dense.numel() > 2**31
    assert not launch.needs_wide_index(tiles, dense, None)
    far = torch.empty_strided((1, 1, 4, 16), (0, 0, 2**26, 1), device="meta")
    assert launch.needs_wide_index(tiles, dense, far)


def test_a_mask_is_read_through_its_strides(device):
    tensors, gains = small_call(device)
    mask = torch.rand(2, 1, 1, 50).to(device) < 0.6
    dense = mask.expand(2, 2, 50, 50).contiguous()
    broadcast = run_all(tensors, gains, attn_mask=mask)
    expanded = run_all(tensors, gains, attn_mask=dense)
    assert all(torch.equal(broadcast[name], expanded[name]) for name in broadcast)
    seen, *strides, _, _ = visibility_arguments(Visibility(attn_mask=mask.expand(2, 2, 50, 50)))
    assert strides == [50, 0, 0, 1] and seen.data_ptr() == mask.data_ptr()


def test_two_key_sets_merge_by_lse(device):
    tensors, _ = small_call(device)
    plain = {"identity_gain": 0.0, "center_gain": 0.0, "scale": 0.3, "return_lse": True}
    whole, whole_lse = shaped_attention(**tensors, **plain, impl="triton")
    split = torch.full((2,), 20, device=device)
    halves = [
        shaped_attention(**tensors, **plain, **part, impl="triton")
        for part in ({"key_end": split}, {"key_start": split})
    ]
    lse = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum((part_lse - lse).exp()[..., None] * out for out, part_lse in halves)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)


# Sizes of models, and what takes many calls: on a GPU alone. Tiles are larger there, loops long.
REAL_SIZES = {
    "full": Case(1, 2, queries=4059, head_dim=64),
    "causal": Case(1, 2, queries=4059, head_dim=128, is_causal=True, residual_dtype=...),
    "grouped_heads_and_cache": Case(
        2, 4, 2, 1000, 3001, 64, is_causal=True, residual_dtype=torch.float32
    ),
    "both_paddings": Case(3, 2, queries=2047, head_dim=128, is_causal=True, padding="both"),
    "random_mask": Case(1, 2, 1, 1025, 2048, 64, mask="random"),
    "largest_head_dim": Case(1, 2, queries=2049, head_dim=256, is_causal=True),
    "odd_head_dims": Case(1, 2, queries=2049, head_dim=97, value_dim=33, is_causal=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_std", [0.03, 1.0, 8.0])
@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes(name, logit_std, dtype, device):
    case = of_dtype(REAL_SIZES[name], dtype)
    compare(device, case, draw_gains(device, case), {}, logit_std=logit_std)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_std", [0.03, 1.0, 8.0])
@pytest.mark.parametrize("regime", REGIMES)
def test_centered_term_at_a_real_size(regime, logit_std, dtype, device):
    case = Case(1, 2, queries=4059, head_dim=64, dtype=dtype, is_causal=True)
    q, k, v, _ = make_inputs(case, logit_std=logit_std, device=device, **REGIMES[regime])
    out = shaped_attention(q, k, v, is_causal=True, **CENTERED, impl="triton")
    golden = reference_attention(q.double(), k.double(), v.double(), is_causal=True, **CENTERED)
    assert relative_error(out, golden) <= CENTERED_ERROR[dtype]


def real_call(device, **changes) -> tuple[dict, dict]:
    sizes = {"heads": 4, "queries": 1111, "head_dim": 64, "residual_dtype": torch.float32}
    return small_call(device, **(sizes | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_repeats_give_equal_bits(dtype, device):
    tensors, gains = real_call(device, dtype=dtype)
    first = run_all(tensors, gains, is_causal=True)
    for repeat in range(1000):
        again = run_all(tensors, gains, is_causal=True)
        differing = [name for name in first if not torch.equal(first[name], again[name])]
        assert differing == [], f"repeat {repeat}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invariants_at_a_real_size(dtype, device):
    tensors, gains = real_call(device, dtype=dtype, residual_dtype=None)
    options = {"is_causal": True, "impl": "triton"}
    q, k, v = (tensors[name] for name in "qkv")
    assert torch.equal(
        shaped_attention(0 * q, k, v, **options), v.repeat_interleave(4, 1).expand_as(q)
    )
    changed = {name: x.clone() for name, x in tensors.items()}
    for name in ("k", "v"):
        changed[name][:, :, 700:] = 5.0
    before = shaped_attention(**tensors, **gains, **options)
    after = shaped_attention(**changed, **gains, **options)
    assert torch.equal(before[:, :, :700], after[:, :, :700])
    strided = {name: x.mT.contiguous().mT for name, x in tensors.items()}
    assert torch.equal(shaped_attention(**strided, **gains, **options), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_the_call(dtype, device):
    tensors, gains = real_call(device, dtype=dtype)
    options = {"is_causal": True, "impl": "triton"}
    shaped_attention(**tensors, **gains, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = shaped_attention(**tensors, **gains, **options)
    tensors["v"].mul_(2)
    graph.replay()
    assert torch.equal(captured, shaped_attention(**tensors, **gains, **options))
