"""``impl="torch"``: against the reference in float64, accuracy in lower precision, memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_calls import GAINS, assert_right
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shaped_attn import composite, shaped_attention
from shaped_attn.testing import (
    Case,
    assert_within_budget,
    eager_attention,
    forward_backward,
    make_inputs,
    make_options,
    relative_error,
    rounding_error,
    rounding_spread,
)

FIXED = dict(zip(GAINS, (0.7, 1.1, 0.9, 0.5, 0.3, 0.4), strict=True))


def run(device, impl, case, gains="head", *, return_lse=True, logit_std=1.0, **overrides):
    """Output, lse and all gradients. The case's own visibility; tensor gains scalar or per head."""
    inputs = make_inputs(case, logit_std=logit_std, scale=FIXED["scale"], device=device)._asdict()
    options = make_options(case, device=device) | {"return_lse": return_lse, "impl": impl}
    weights = {}
    for place, (name, value) in enumerate(FIXED.items()):
        if name == "skip_gain" and case.residual_dtype is None:
            continue
        if name == "identity_gain" and not case.has_own_keys:
            options[name] = 0.0
        elif gains == "float":
            options[name] = value
        else:
            size = case.heads if gains == "head" else 1
            weight = value * (1 + 0.1 * torch.arange(place, place + size, dtype=torch.float64))
            weights[name] = (weight if gains == "head" else weight.squeeze(0)).to(device)
    for name, value in overrides.items():
        weights.pop(name, None)
        options[name] = value
    generator = torch.Generator().manual_seed(1)
    rows = (case.batch, case.heads, case.queries)
    d_out = torch.randn(*rows, case.value_dim, generator=generator, dtype=torch.float64)
    d_lse = torch.randn(rows, generator=generator, dtype=torch.float64)
    tensors = inputs | weights
    return forward_backward(
        shaped_attention, tensors, d_out, d_lse if return_lse else None, **options
    )


def assert_equal_to_reference(device, case, gains="head", **overrides):
    actual = run(device, "torch", case, gains, **overrides)
    expected = run(device, "reference", case, gains, **overrides)
    assert actual.keys() == expected.keys()
    for name, golden in expected.items():
        torch.testing.assert_close(
            actual[name], golden, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


SIZES = [
    # (H, Hkv, T, S, D, Dv)
    (2, 2, 9, 9, 4, 4),
    (4, 2, 5, 11, 4, 3),
    (2, 1, 11, 5, 3, 8),
    (1, 1, 1, 8, 4, 4),
]


@pytest.mark.parametrize("gains", ["float", "scalar", "head"])
@pytest.mark.parametrize("mask", [None, "random", "keys", "rows"])
@pytest.mark.parametrize("padding", [None, "left", "right", "both"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_composite_equals_reference(is_causal, padding, mask, gains, device):
    for (heads, kv_heads, queries, keys, head_dim, value_dim), q_offset in itertools.product(
        SIZES, (None, 0, 3, -2)
    ):
        sizes = (2, heads, kv_heads, queries, keys, head_dim, value_dim, torch.float64)
        case = Case(*sizes, is_causal, q_offset, padding, mask, torch.float64)
        assert_equal_to_reference(device, case, gains)


@pytest.mark.parametrize("mask", [None, "random", "rows"])
@pytest.mark.parametrize("padding", [None, "both"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_composite_equals_reference_over_many_chunks(monkeypatch, is_causal, padding, mask, device):
    """Chunks of 16 rows, the last one partial; offsets before, among and behind the keys."""
    monkeypatch.setattr(composite, "CHUNK_ROWS", 16)
    for keys, q_offset in ((70, 0), (90, None), (40, 0), (50, -20), (50, 60)):
        sizes = (2, 2, 1, 70, keys, 4, 6, torch.float64)
        case = Case(*sizes, is_causal, q_offset, padding, mask, torch.float64)
        assert_equal_to_reference(device, case, "head")
        assert_equal_to_reference(device, case, "float", return_lse=False)


@pytest.mark.parametrize("batch, queries, keys", [(2, 0, 5), (2, 5, 0), (0, 5, 5), (0, 0, 0)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_composite_and_reference_on_empty_tensors(is_causal, batch, queries, keys, device):
    case = Case(
        batch, 4, 2, queries, keys, 8, 6, torch.float64, is_causal, residual_dtype=torch.float64
    )
    for padding, mask in ((None, None), ("both", None), (None, "random"), (None, "keys")):
        case = Case(**{**vars(case), "padding": padding, "mask": mask})
        for impl in ("torch", "reference"):
            result = run(device, impl, case)
            residual = make_inputs(case, device=device).residual
            gain = 0.5 * (1 + 0.1 * torch.arange(3, 7, dtype=torch.float64, device=device))
            gain = gain[:, None, None]
            if batch and queries:
                torch.testing.assert_close(result["out"], gain * residual)
            assert result["out"].shape == (batch, 4, queries, 6)
            assert result["lse"].shape == (batch, 4, queries)
            assert (result["lse"] == -torch.inf).all()
            for name in ("q", "k", "v", "softmax_gain", "center_gain", "scale"):
                assert (result[f"grad {name}"] == 0).all(), name


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_rows_without_a_key_are_zero_and_have_zero_gradients(impl, device):
    """Hidden by attn_mask, by causality before the first key, and by an empty key range."""
    options = [
        {"attn_mask": torch.tensor([False, True, True])[:, None]},
        {"q_offset": -1, "is_causal": True},
        {"key_start": torch.tensor([3]), "key_end": torch.tensor([3])},
        {"key_start": torch.tensor([1]), "is_causal": True},
    ]
    case = Case(1, 2, 2, 3, 3, 4, residual_dtype=torch.float32)
    q, k, v, residual = make_inputs(case, device=device)
    for option in options:
        option = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in option.items()}
        found = forward_backward(
            shaped_attention,
            {"q": q, "k": k, "v": v, "residual": residual},
            torch.ones(1, 2, 3, 4),
            torch.ones(1, 2, 3),
            identity_gain=0.0,
            softmax_gain=0.8,
            return_lse=True,
            impl=impl,
            **option,
        )
        torch.testing.assert_close(found["out"][:, :, 0], residual[:, :, 0])
        assert (found["lse"][:, :, 0] == -torch.inf).all()
        assert (found["grad q"][:, :, 0] == 0).all()
        for name, x in found.items():
            assert not x.isnan().any(), name
            assert name == "lse" or x.isfinite().all(), name


def test_gain_zero_skips_work_and_gives_zero_gradients(monkeypatch, device):
    case = Case(queries=8, head_dim=8)
    q, k, v, _ = make_inputs(case, device=device)
    tensors = {"q": q, "k": k, "v": v}

    def refuse(*args, **kwargs):
        raise AssertionError("called for a gain of zero")

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", refuse)
        found = forward_backward(
            shaped_attention, tensors, torch.ones_like(v), softmax_gain=0.0, impl="torch"
        )
        assert found["grad q"].abs().max() == 0 and found["grad k"].abs().max() == 0
        golden = v - v.mean(2, keepdim=True)
        torch.testing.assert_close(found["out"], golden)
        nothing = forward_backward(
            shaped_attention,
            tensors,
            torch.ones_like(v),
            identity_gain=0.0,
            softmax_gain=0.0,
            center_gain=0.0,
            impl="torch",
        )
        assert nothing["out"].shape == v.shape
        assert all(x.abs().max() == 0 for x in nothing.values())
    with monkeypatch.context() as patch:
        patch.setattr(composite, "_visible_mean", refuse)
        patch.setattr(composite, "_centered", refuse)
        out = shaped_attention(q, k, v, identity_gain=0.0, center_gain=0.0, impl="torch")
        expected = F.scaled_dot_product_attention(q, k, v, scale=case.scale)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_scale_may_be_zero_or_negative(is_causal, scale, device):
    """torch 2.13's attention on a CPU gives NaN for is_causal with such a scale."""
    case = Case(dtype=torch.float64, is_causal=is_causal)
    assert_equal_to_reference(device, case, "float", scale=scale)
    assert_equal_to_reference(device, case, "head", scale=torch.full((4,), scale, device=device))


def test_center_alone_has_the_shape_of_the_output(device):
    q, k, v, _ = make_inputs(Case(queries=5, keys=7, head_dim=4), device=device)
    out = shaped_attention(q, k, v, identity_gain=0.0, softmax_gain=0.0, impl="torch")
    torch.testing.assert_close(out, -v.mean(2, keepdim=True).expand(2, 4, 5, 4))


def test_padding_may_hold_anything(device):
    """Large or infinite values in keys that nobody sees reach neither results nor gradients."""
    case = Case(queries=6, head_dim=4, is_causal=True)
    q, k, v, _ = make_inputs(case, device=device)
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[:, :, :2] = torch.nan
    dirty_v[:, :, :2] = 1e30
    mask = torch.ones(6, dtype=torch.bool, device=device)
    mask[:2] = False
    for option in ({"key_start": torch.tensor([2, 2], device=device)}, {"attn_mask": mask}):
        option = option | {"identity_gain": 0.0, "is_causal": True, "impl": "torch"}
        clean, dirty = (
            forward_backward(
                shaped_attention, {"q": q, "k": k, "v": v}, torch.ones_like(q), **option
            )
            for k, v in ((k, v), (dirty_k, dirty_v))
        )
        for name in clean:
            torch.testing.assert_close(dirty[name], clean[name], msg=name)


@pytest.mark.parametrize("layout", ["expanded", "channel-strided", "fused qkv"])
def test_composite_takes_any_strides(layout, device):
    if layout == "expanded":
        x = torch.randn(3, 1, 1, 1, 4, dtype=torch.float64).to(device)
        q, k, v = x.expand(3, 2, 4, 9, 4)
    elif layout == "channel-strided":
        q, k, v = torch.randn(3, 2, 4, 4, 9, dtype=torch.float64).to(device).transpose(-1, -2)
    else:
        x = torch.randn(2, 9, 4, 12, dtype=torch.float64).to(device)
        q, k, v = x.transpose(1, 2).chunk(3, -1)
    for is_causal in (False, True):
        out, expected = (
            shaped_attention(q, k, v, is_causal=is_causal, impl=impl)
            for impl in ("torch", "reference")
        )
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_same_tensor_as_q_k_and_v(device):
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64).to(device).requires_grad_()
    gradients = [
        torch.autograd.grad(shaped_attention(x, x, x, impl=impl).square().sum(), x)[0]
        for impl in ("torch", "reference")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_residual_of_a_wider_dtype_sets_that_of_the_output(impl, residual_dtype, device):
    """The residual is not rounded, nor the branch to bf16 before the sum."""
    case = Case(dtype=torch.bfloat16, residual_dtype=residual_dtype, is_causal=True)
    q, k, v, residual = make_inputs(case, device=device)
    residual = 100 * residual
    out, lse = shaped_attention(q, k, v, residual, return_lse=True, is_causal=True, impl=impl)
    assert out.dtype == residual_dtype and lse.dtype == torch.float32
    golden = shaped_attention(
        q.double(), k.double(), v.double(), residual.double(), is_causal=True, impl="reference"
    )
    # Half precision is left only in the inputs; the branch itself comes from float32 arithmetic.
    branch = (golden - residual.double()).norm() / golden.norm()
    budget = rounding_error(residual_dtype) + 8 * rounding_error(torch.float32) * branch
    assert relative_error(out, golden) <= budget


REGIMES = {
    "plain": {},
    "v_mean_3": {"value_mean": 3.0},
    "k_mean_4": {"key_mean": 4.0, "value_mean": 1.0},
    "sink": {"sink": True, "value_mean": 1.0},
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("logit_std", [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize(
    "dtype, budget",
    [(torch.bfloat16, 2**-9), (torch.float16, 2**-12), (torch.float32, 3e-5)],
    ids=["bf16", "fp16", "fp32"],
)
def test_centred_term_survives_small_logits(dtype, budget, logit_std, regime, device):
    """softmax minus centre is accurate to the output's rounding of itself, at any logit scale.

    Composing rounded results has errors of order 1 there. float32 has no wider dtype to compute in:
    its budget is that of the cancellation, a few eps / logit_std.
    """
    case = Case(1, 2, 2, 512, 512, 64, 64, dtype, is_causal=True)
    q, k, v, _ = make_inputs(case, logit_std=logit_std, device=device, **REGIMES[regime])
    options = {"identity_gain": 0.0, "is_causal": True}
    golden = shaped_attention(q.double(), k.double(), v.double(), **options, impl="reference")
    out = shaped_attention(q, k, v, **options, impl="torch")
    assert relative_error(out, golden) <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("logit_std", [0.03, 1.0, 10.0])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_composite_gradients_within_budget(is_causal, logit_std, dtype, device):
    case = Case(2, 4, 2, 96, 96, 32, 32, dtype, is_causal, residual_dtype=dtype)
    inputs = make_inputs(case, logit_std=logit_std, device=device)._asdict()
    gains = {
        name: torch.full((4,), value, device=device)
        for name, value in (FIXED | {"scale": case.scale}).items()
    }
    d_out = torch.randn(2, 4, 96, 32).to(dtype).to(device)
    doubles = {name: x.double() for name, x in (inputs | gains).items()}
    options = {"is_causal": is_causal, "impl": "reference"}
    golden, spread = rounding_spread(
        lambda: forward_backward(shaped_attention, doubles, d_out, **options), dtype
    )
    narrow = inputs | {name: gain.to(dtype) for name, gain in gains.items()}
    eager = forward_backward(eager_attention, narrow, d_out, is_causal=is_causal)
    options["impl"] = "torch"
    actual = forward_backward(shaped_attention, inputs | gains, d_out, **options)
    assert_right(actual, golden, eager, spread)
    assert_within_budget(actual["out"], golden["out"], eager["out"], factor=1, name="out")


class Memory(TorchDispatchMode):
    """Records the largest result of an operator and the peak of all live ones, in bytes."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.live = {}
        self.peak = self.largest = 0
        self.operator = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.live = {key: x for key, x in self.live.items() if not x[0].expired()}
        for x in tree_leaves(results):
            if not isinstance(x, torch.Tensor) or x.untyped_storage()._cdata in self.inputs:
                continue
            storage = x.untyped_storage()
            self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            if storage.nbytes() > self.largest:
                self.largest, self.operator = storage.nbytes(), str(function)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return results


def memory(device, length, *, return_lse=False, impl="torch", **options):
    """Memory of forward and backward for T = length, S = length // 2."""
    keys = length // 2
    shapes = (1, 2, length, 8), (1, 1, keys, 8), (1, 1, keys, 12)
    q, k, v = (torch.randn(shape).to(device).requires_grad_() for shape in shapes)
    options = {name: x(length, keys) if callable(x) else x for name, x in options.items()}
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    mask = [options["attn_mask"]] if "attn_mask" in options else []
    with Memory(q, k, v, *mask) as used:
        result = shaped_attention(
            q, k, v, identity_gain=0.0, impl=impl, return_lse=return_lse, **options
        )
        result = result if return_lse else (result,)
        sum(x.sum() for x in result).backward()
    return used


MEMORY_OPTIONS = {
    "full": {},
    "causal": {"is_causal": True, "q_offset": 0},
    "causal_offset": {"is_causal": True, "q_offset": 100},
    "padding": {"key_start": torch.tensor([3]), "key_end": torch.tensor([200])},
    "causal_padding": {"is_causal": True, "q_offset": 0, "key_start": torch.tensor([3])},
    "mask": {"attn_mask": lambda queries, keys: torch.rand(queries, keys) < 0.7},
    "mask_expanded": {
        "attn_mask": lambda queries, keys: (torch.rand(keys) < 0.7).expand(queries, keys)
    },
    "mask_of_rows": {"attn_mask": lambda queries, keys: torch.rand(queries, 1) < 0.7},
    "lse": {"is_causal": True, "q_offset": 0, "return_lse": True},
}


@pytest.mark.parametrize("name", MEMORY_OPTIONS)
def test_memory_is_linear_in_the_length(monkeypatch, name, device):
    """Forward and backward, on every path; chunks of 8 rows are many at these lengths."""
    monkeypatch.setattr(composite, "CHUNK_ROWS", 8)
    short, long = (memory(device, length, **MEMORY_OPTIONS[name]) for length in (512, 1024))
    assert long.peak < 2.2 * short.peak
    matrix = 1024 * 512 * 4  # bytes of one T x S matrix in float32
    assert long.largest < matrix / 8, long.operator


def test_a_mask_of_keys_needs_no_chunks(monkeypatch, device):
    """Whether it came with a dimension of size 1 or was expanded by the caller."""

    def refuse(*args, **kwargs):
        raise AssertionError("split into chunks")

    monkeypatch.setattr(composite, "checkpoint", refuse)
    q, k, v, _ = make_inputs(Case(1, 2, 2, 300, 300, 4, 4, torch.float32), device=device)
    mask = torch.rand(300).to(device) < 0.7
    options = {"key_start": torch.tensor([9], device=device), "impl": "torch"}
    with torch.enable_grad():
        narrow = shaped_attention(q, k, v, attn_mask=mask, **options)
        expanded = shaped_attention(q, k, v, attn_mask=mask.expand(1, 2, 300, 300), **options)
        with pytest.raises(AssertionError, match="split into chunks"):
            shaped_attention(q, k, v, attn_mask=mask.repeat(300, 1), **options)
    assert torch.equal(narrow, expanded)


def test_memory_of_the_reference_is_not(device):
    """The measurement sees what it should."""
    short, long = (memory(device, length, impl="reference") for length in (512, 1024))
    assert long.peak > 3.5 * short.peak
    assert long.largest >= 2 * 1024 * 512 * 4


def test_a_learnable_gain_of_terms_that_are_all_absent_has_gradient_zero(device):
    """All terms fixed at 0.0 once dropped the branch gain from the graph, gradient None."""
    q, k, v = (torch.randn(1, 2, 5, 4).to(device).requires_grad_() for _ in range(3))
    branch_gain = torch.ones(2, device=device, requires_grad=True)
    absent = {"identity_gain": 0.0, "softmax_gain": 0.0, "center_gain": 0.0}
    out = shaped_attention(q, k, v, branch_gain=branch_gain, **absent, impl="torch")
    (gradient,) = torch.autograd.grad(out.sum(), branch_gain)
    assert torch.equal(gradient, torch.zeros(2, device=device))
