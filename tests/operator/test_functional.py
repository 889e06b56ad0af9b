"""The public function: properties of the formula, dispatch, autocast, compile, checkpointing."""

import doctest
import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from shaped_attn import shaped_attention
from shaped_attn.testing import (
    Case,
    assert_within_spread,
    forward_backward,
    make_inputs,
    make_options,
    relative_error,
    rounding_error,
    rounding_spread,
)

IMPLS = ["reference", "torch", "triton"]


@pytest.fixture(params=IMPLS)
def impl(request):
    """Each implementation: one property, three witnesses."""
    return request.param


def inputs(impl, device, **sizes):
    """q, k, v, residual in the widest dtype of the implementation."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    sizes = {"queries": 20, "head_dim": 16, "dtype": dtype, "residual_dtype": dtype} | sizes
    return make_inputs(Case(**sizes), device=device)


def assert_equal(actual, expected, *, amplification=1.0):
    """Up to rounding: 16 roundings in a row, times what the two sides amplify them by."""
    error = relative_error(actual, expected)
    assert error <= 16 * amplification * rounding_error(actual.dtype)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_zero_queries_return_v(impl, device, dtype, is_causal):
    """At zero logits softmax is the mean: with all gains 1 only the identity is left."""
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels have no float64")
    _, k, v, _ = make_inputs(
        Case(queries=20, head_dim=16, dtype=dtype), value_mean=3.0, device=device
    )
    out = shaped_attention(torch.zeros_like(v), k, v, is_causal=is_causal, impl=impl)
    assert out.dtype == dtype
    assert relative_error(out, v) <= 4 * rounding_error(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(out, v, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_zero_queries_with_other_gains(impl, device, is_causal):
    q, k, v, residual = inputs(impl, device)
    gains = {"identity_gain": 0.5, "softmax_gain": 2.0, "center_gain": 0.75}
    out = shaped_attention(
        0 * q,
        k,
        v,
        residual,
        **gains,
        skip_gain=0.25,
        branch_gain=3.0,
        is_causal=is_causal,
        impl=impl,
    )
    mean = v.mean(2, keepdim=True)
    if is_causal:
        mean = v.cumsum(2) / torch.arange(1, 21, dtype=v.dtype, device=device)[:, None]
    assert_equal(out, 0.25 * residual + 3.0 * (0.5 * v + 1.25 * mean))


def test_one_vector_added_to_all_values(impl, device):
    """leaves softmax minus centre, and moves the sum of the terms by their gains."""
    q, k, v, _ = inputs(impl, device)
    shift = 3 * torch.randn(2, 4, 1, 16, dtype=v.dtype).to(device)
    options = {"is_causal": True, "impl": impl, "scale": 0.25}
    centred = shaped_attention(q, k, v, identity_gain=0.0, **options)
    shifted = shaped_attention(q, k, v + shift, identity_gain=0.0, **options)
    assert_equal(shifted, centred, amplification=4)  # v + shift is rounded
    gains = {"identity_gain": 0.5, "softmax_gain": 2.0, "center_gain": 0.75}
    plain = shaped_attention(q, k, v, **gains, **options)
    moved = shaped_attention(q, k, v + shift, **gains, **options)
    assert_equal(moved, plain + 1.75 * shift)


def test_one_vector_added_to_all_keys_changes_nothing(impl, device):
    q, k, v, _ = inputs(impl, device)
    shift = 3 * torch.randn(2, 4, 1, 16, dtype=v.dtype).to(device)
    out, shifted = (
        shaped_attention(q, keys, v, scale=0.25, is_causal=True, impl=impl)
        for keys in (k, k + shift)
    )
    assert_equal(shifted, out, amplification=12)  # rounding of logits of that size


def test_order_of_the_keys_does_not_matter(impl, device):
    q, k, v, _ = inputs(impl, device, keys=33)
    order = torch.randperm(33).to(device)
    options = {"identity_gain": 0.0, "softmax_gain": 2.0, "scale": 0.25, "impl": impl}
    out = shaped_attention(q, k, v, **options)
    assert_equal(shaped_attention(q, k[:, :, order], v[:, :, order], **options), out)


def test_causal_queries_do_not_see_later_rows(impl, device):
    q, k, v, residual = inputs(impl, device)
    later = [x.clone() for x in (q, k, v, residual)]
    for x in later:
        x[:, :, 12:] += torch.randn(2, 4, 8, 16, dtype=x.dtype).to(device)
    out, changed = (
        shaped_attention(*x, scale=0.25, is_causal=True, impl=impl)[:, :, :12]
        for x in ((q, k, v, residual), later)
    )
    if impl == "torch":
        assert_equal(changed, out)  # the mean of v that it subtracts first rounds differently
    else:
        assert torch.equal(changed, out)


def test_linear_in_values_and_residual(impl, device):
    q, k, v, residual = inputs(impl, device)
    other_v, other_residual = torch.randn(2, *v.shape, dtype=v.dtype).to(device)
    options = {
        "scale": 0.25,
        "skip_gain": 0.5,
        "softmax_gain": 1.5,
        "is_causal": True,
        "impl": impl,
    }
    sum_of = shaped_attention(q, k, 2 * v + other_v, 2 * residual + other_residual, **options)
    first = shaped_attention(q, k, v, residual, **options)
    second = shaped_attention(q, k, other_v, other_residual, **options)
    assert_equal(sum_of, 2 * first + second)


def test_linear_in_every_gain(impl, device):
    """out is the sum of its terms; one gain at a time gives them."""
    q, k, v, residual = inputs(impl, device)
    names = ("identity_gain", "softmax_gain", "center_gain", "skip_gain")
    values = dict(zip(names, (0.5, 2.0, 0.75, 0.25), strict=True))
    options = {"scale": 0.25, "is_causal": True, "impl": impl}
    zero = dict.fromkeys(names, 0.0)
    out = shaped_attention(q, k, v, residual, **values, **options)
    terms = [
        value * shaped_attention(q, k, v, residual, **(zero | {name: 1.0}), **options)
        for name, value in values.items()
    ]
    assert_equal(out, sum(terms))
    assert_equal(terms[0], 0.5 * v)
    assert_equal(terms[3], 0.25 * residual)
    half = shaped_attention(q, k, v, residual, **values, branch_gain=0.5, **options)
    assert_equal(half, 0.5 * out + 0.5 * terms[3])


def test_tensor_gains_equal_floats(impl, device):
    q, k, v, residual = inputs(impl, device)
    values = {
        "identity_gain": 0.5,
        "softmax_gain": 2.0,
        "center_gain": 0.75,
        "skip_gain": 0.25,
        "branch_gain": 1.5,
        "scale": 0.25,
    }
    options = {"is_causal": True, "impl": impl}
    out = shaped_attention(q, k, v, residual, **values, **options)
    for shape in ((), (4,)):
        gains = {name: torch.full(shape, value, device=device) for name, value in values.items()}
        assert_equal(shaped_attention(q, k, v, residual, **gains, **options), out)


def test_gains_per_head_equal_calls_per_head(impl, device):
    q, k, v, _ = inputs(impl, device, kv_heads=2)
    gains = {"softmax_gain": torch.rand(4).to(device) + 0.5, "scale": torch.rand(4).to(device)}
    out = shaped_attention(q, k, v, **gains, impl=impl)
    for h in range(4):
        one = shaped_attention(
            q[:, h : h + 1],
            k[:, h // 2 : h // 2 + 1],
            v[:, h // 2 : h // 2 + 1],
            **{name: gain[h].item() for name, gain in gains.items()},
            impl=impl,
        )
        assert_equal(out[:, h : h + 1], one)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_padded_batch_equals_separate_calls(impl, device, is_causal):
    """Left, right and both-sided padding; queries keep their positions."""
    q, k, v, _ = inputs(impl, device, batch=3)
    start, end = [4, 0, 2], [20, 13, 17]
    out, lse = shaped_attention(
        q,
        k,
        v,
        scale=0.25,
        is_causal=is_causal,
        key_start=torch.tensor(start, device=device),
        key_end=torch.tensor(end, device=device),
        return_lse=True,
        impl=impl,
    )
    for b in range(3):
        rows = slice(start[b], end[b])
        entry = slice(b, b + 1)
        one, one_lse = shaped_attention(
            q[entry, :, rows],
            k[entry, :, rows],
            v[entry, :, rows],
            scale=0.25,
            is_causal=is_causal,
            return_lse=True,
            impl=impl,
        )
        assert_equal(out[entry, :, rows], one)
        assert_equal(lse[entry, :, rows], one_lse)


def test_key_range_and_causality_equal_a_mask(impl, device):
    q, k, v, _ = inputs(impl, device, queries=9, keys=20)
    start, end = torch.tensor([[4, 0], [20, 13]], device=device)
    key = torch.arange(20, device=device)
    position = 11 + torch.arange(9, device=device)[:, None]
    mask = (key >= start[:, None, None, None]) & (key < end[:, None, None, None])
    mask = mask & (key <= position)
    out = shaped_attention(q, k, v, is_causal=True, key_start=start, key_end=end, impl=impl)
    assert_equal(shaped_attention(q, k, v, attn_mask=mask, impl=impl), out)


def test_prefill_equals_decode(impl, device):
    """One query at a time over a growing cache, with the default q_offset."""
    q, k, v, residual = inputs(impl, device, kv_heads=2)
    options = {"scale": 0.25, "is_causal": True, "impl": impl}
    out = shaped_attention(q, k, v, residual, **options)
    for t in (0, 1, 7, 19):
        row = slice(t, t + 1)
        step = shaped_attention(
            q[:, :, row], k[:, :, : t + 1], v[:, :, : t + 1], residual[:, :, row], **options
        )
        assert_equal(step, out[:, :, row])
    # A chunk of queries, and the same with a cache that has room for more keys.
    expected = out[:, :, 5:9]
    chunk = shaped_attention(q[:, :, 5:9], k[:, :, :9], v[:, :, :9], residual[:, :, 5:9], **options)
    assert_equal(chunk, expected)
    chunk = shaped_attention(q[:, :, 5:9], k, v, residual[:, :, 5:9], q_offset=5, **options)
    assert_equal(chunk, expected)


def test_disjoint_key_sets_merge_by_lse(impl, device):
    q, k, v, _ = inputs(impl, device, keys=33)
    options = {"identity_gain": 0.0, "center_gain": 0.0, "scale": 0.25}
    options |= {"return_lse": True, "impl": impl}
    out, lse = shaped_attention(q, k, v, **options)
    parts = [
        shaped_attention(q, k[:, :, s], v[:, :, s], **options) for s in (slice(9), slice(9, 33))
    ]
    lses = torch.stack([part_lse for _, part_lse in parts])
    weights = (lses - lses.logsumexp(0)).exp()[..., None]
    assert_equal(lses.logsumexp(0), lse)
    assert_equal(sum(w * o for w, (o, _) in zip(weights, parts, strict=True)), out)


@pytest.mark.parametrize("grouped", [False, True], ids=["heads", "grouped"])
@pytest.mark.parametrize("visibility", ["full", "causal", "mask"])
def test_softmax_alone_is_sdpa(impl, device, visibility, grouped):
    q, k, v, _ = inputs(impl, device, kv_heads=2 if grouped else 4)
    options = {
        "full": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": (torch.rand(20, 20).gt(0.3) | torch.eye(20).bool()).to(device)},
    }[visibility]
    out = shaped_attention(
        q, k, v, identity_gain=0.0, center_gain=0.0, scale=0.25, **options, impl=impl
    )
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), scale=0.25, enable_gqa=True, **options
    )
    assert_equal(out, expected)


@pytest.mark.parametrize("gain", ["softmax_gain", "center_gain", "scale", "identity_gain"])
@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradient_of_a_gain_is_the_difference_quotient(impl, device, gain, value):
    """At zero as well, where a fixed gain would skip its term."""
    q, k, v, residual = inputs(impl, device)
    d_out = torch.randn(v.shape, dtype=v.dtype).to(device)

    def loss(x):
        out = shaped_attention(q, k, v, residual, **{gain: x}, is_causal=True, impl=impl)
        return (out * d_out).sum()

    x = torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-6
    with torch.no_grad():
        quotient = (loss(x + step) - loss(x - step)) / (2 * step)
    torch.testing.assert_close(gradient, quotient, rtol=1e-6, atol=1e-6)


def test_equal_calls_give_equal_bits(impl, device):
    q, k, v, residual = inputs(impl, device, kv_heads=2)
    mask, gain = torch.rand(20, 20).gt(0.3).to(device), torch.rand(4).to(device)
    first, second = (
        forward_backward(
            shaped_attention,
            {"q": q, "k": k, "v": v, "residual": residual, "softmax_gain": gain},
            torch.ones_like(residual),
            torch.ones(2, 4, 20, device=device),
            attn_mask=mask,
            return_lse=True,
            impl=impl,
        )
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


# Dispatch


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu(device):
    chosen = "triton" if device.type == "cuda" else "torch"
    q, k, v, residual = inputs(chosen, device)
    auto, expected, reference = (
        shaped_attention(q, k, v, residual, is_causal=True, impl=impl)
        for impl in ("auto", chosen, "reference")
    )
    assert torch.equal(auto, expected)
    assert not torch.equal(auto, reference)  # rounded differently


def test_kernels_get_the_resolved_arguments(monkeypatch, device):
    from shaped_attn.kernels import attention

    found = []
    launch = attention.attention_fwd
    monkeypatch.setattr(
        attention, "attention_fwd", lambda *a, **o: found.append(a) or launch(*a, **o)
    )
    q, k, v, residual = make_inputs(
        Case(queries=5, keys=9, head_dim=16, residual_dtype=torch.float32), device=device
    )
    gain = torch.ones(4, device=device)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
    options = {"softmax_gain": gain, "branch_gain": 2, "is_causal": True, "attn_mask": mask}
    shaped_attention(q, k, v, residual, **options, impl="triton")
    *tensors, gains, visibility = found[0]
    for given, wanted in zip(tensors, (q, k, v, residual), strict=True):
        assert given.data_ptr() == wanted.data_ptr()
    assert gains.softmax.data_ptr() == gain.data_ptr()
    assert gains[::2] == (1.0, 1.0, 2.0) and gains.scale == 1 / (16 * 4**0.5)
    assert visibility[:4] == (True, 4, None, None)
    expanded = visibility.attn_mask
    assert expanded.shape == (2, 4, 5, 9) and expanded.data_ptr() == mask.data_ptr()
    assert expanded.stride()[1:3] == (0, 0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_second_derivatives_are_right_or_an_error(impl, device):
    q, k, v, _ = make_inputs(Case(1, 1, 1, 3, 3, 2, dtype=torch.float64), device=device)
    arguments = [x.requires_grad_() for x in (q, k, v)]

    def function(q, k, v):
        return shaped_attention(q, k, v, is_causal=True, impl=impl)

    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, arguments)
        return
    gradients = torch.autograd.grad(
        function(*arguments).square().sum(), arguments, create_graph=True
    )
    with pytest.raises(RuntimeError, match="derivative .* not implemented"):
        sum(x.square().sum() for x in gradients).backward()


def test_docstring_example():
    module = importlib.import_module("shaped_attn.functional")
    result = doctest.testmod(module)
    assert result.attempted >= 5 and result.failed == 0


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_q_k_v_and_keeps_a_wider_residual(impl, dtype, device):
    case = Case(queries=20, residual_dtype=torch.float32)
    q, k, v, residual = make_inputs(case, value_mean=3, device=device)
    q = q.to(torch.float16)  # mixed dtypes are an error without autocast
    gain = torch.tensor(0.9, device=device, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v, residual)]
    options = {"softmax_gain": gain, "is_causal": True, "return_lse": True, "impl": impl}
    with torch.autocast(device.type, dtype=dtype):
        out, lse = shaped_attention(*leaves, **options)
        without_residual, _ = shaped_attention(*leaves[:3], **options)
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    assert without_residual.dtype == dtype
    # All arithmetic is as outside of autocast, on cast inputs.
    narrow = [x.to(dtype) for x in leaves[:3]]
    expected, expected_lse = shaped_attention(*narrow, residual, **options)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    gradients = torch.autograd.grad((out.sum() + lse.sum()), [*leaves, gain])
    for x, gradient in zip([*leaves, gain], gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_leaves_float64_and_narrow_residuals_right(impl, device):
    q, k, v, residual = inputs(impl, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = shaped_attention(q, k, v, residual, impl=impl)
        assert torch.equal(out, shaped_attention(q, k, v, residual, impl=impl))
        assert out.dtype == torch.float64
        # float16 does not fit into bfloat16, so the two meet in float32.
        mixed = shaped_attention(*(x.float() for x in (q, k, v)), residual.half(), impl=impl)
        assert mixed.dtype == torch.float32


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_meta_tensors_give_shapes(impl):
    """A device without autocast, and without values."""
    case = Case(kv_heads=2, queries=5, keys=9, padding="left", residual_dtype=torch.float64)
    q, k, v, residual = (x.to("meta") for x in make_inputs(case))
    options = make_options(case, device="meta") | {"is_causal": True, "impl": impl}
    out, lse = shaped_attention(q, k, v, residual, return_lse=True, **options)
    assert out.shape == residual.shape and out.dtype == torch.float64
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32


# torch.compile

COMPILED = {
    "causal": {"is_causal": True},
    "causal_padding": {"is_causal": True, "key_start": lambda length: torch.tensor([3, length])},
    "mask": {"attn_mask": lambda length: torch.arange(length) % 3 > 0},
}


def assert_call_is_accurate(function, device, length, options):
    """Of one call, with the gradients of all inputs and gains."""
    case = Case(queries=length, kv_heads=2, head_dim=8, residual_dtype=torch.float32)
    tensors = make_inputs(case)._asdict()
    tensors |= {"identity_gain": torch.rand(4), "softmax_gain": torch.tensor(0.9)}
    tensors |= {"scale": torch.rand(4)}
    tensors = {name: x.to(device) for name, x in tensors.items()}
    options = {name: x(length).to(device) if callable(x) else x for name, x in options.items()}
    d_out, d_lse = torch.randn(2, 4, length, 8).to(device), torch.randn(2, 4, length).to(device)

    found = forward_backward(
        function, tensors, d_out, d_lse, return_lse=True, impl="torch", **options
    )
    assert_accurate(found, tensors, d_out, d_lse, return_lse=True, **options)


def assert_accurate(found, tensors, d_out, d_lse=None, **options):
    """Up to the rounding of the float32 arithmetic behind each result, in any order."""
    doubles = {name: x.double() for name, x in tensors.items()}
    golden, spread = rounding_spread(
        lambda: forward_backward(
            shaped_attention, doubles, d_out, d_lse, impl="reference", **options
        ),
        torch.float32,
    )
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        finite = expected.isfinite()
        assert torch.equal(found[name].isfinite(), finite), name
        assert_within_spread(found[name][finite], expected[finite], spread[name][finite], name=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compile_with_a_dynamic_length(fresh_compiler, device, name):
    """One whole graph, compiled once for several lengths.

    They are multiples of 8, for which torch's attention on GPUs does not pad the mask.
    """
    function = torch.compile(shaped_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 48, 64):
        assert_call_is_accurate(function, device, length, COMPILED[name])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler",
)
def test_compile_with_inductor(fresh_compiler, device):
    function = torch.compile(shaped_attention, fullgraph=True, dynamic=True)
    for length in (40, 60):
        assert_call_is_accurate(function, device, length, COMPILED["causal"])


@pytest.mark.parametrize("name", COMPILED)
def test_compile_of_several_chunks(fresh_compiler, device, name):
    """More rows than one chunk has: a whole graph again, but one for each length."""
    function = torch.compile(shaped_attention, fullgraph=True, backend="aot_eager")
    assert_call_is_accurate(function, device, 300, COMPILED[name])


def test_compile_reports_argument_errors(fresh_compiler, device):
    function = torch.compile(shaped_attention, backend="eager")
    q, k, v, _ = make_inputs(Case(queries=8), device=device)
    with pytest.raises(Exception, match="k must have the head dimension of q, 32"):
        function(q, k[..., :16], v)


# Activation checkpointing


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=24, is_causal=True),
        Case(queries=300, heads=2, head_dim=8, is_causal=True, padding="both"),
        Case(queries=300, heads=2, head_dim=8, mask="rows"),
    ],
    ids=lambda case: case.id,
)
def test_activation_checkpointing_changes_nothing(case, device):
    """Also around the chunks that ``impl="torch"`` recomputes itself."""
    q, k, v, _ = make_inputs(case, device=device)
    options = make_options(case, device=device)

    def plain(q, k, v, softmax_gain):
        return shaped_attention(q, k, v, softmax_gain=softmax_gain, **options, impl="torch")

    def checkpointed(q, k, v, softmax_gain):
        return checkpoint(plain, q, k, v, softmax_gain, use_reentrant=False)

    tensors = {"q": q, "k": k, "v": v, "softmax_gain": torch.tensor(0.8, device=device)}
    d_out = torch.randn(q.shape).to(device)
    actual = forward_backward(checkpointed, tensors, d_out)
    expected = forward_backward(plain, tensors, d_out)
    # On a GPU torch's attention adds up its gradients in no fixed order.
    for name in expected if device.type == "cpu" else ["out"]:
        assert torch.equal(actual[name], expected[name]), name
    assert_accurate(actual, tensors, d_out, **options)
