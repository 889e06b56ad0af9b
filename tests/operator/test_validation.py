"""Every argument error: which exception, and that it names argument, rule, value and remedy."""

import math
import re

import pytest
import torch
from fresh_python import python
from hypothesis import given, settings
from hypothesis import strategies as st

import shaped_attn.validation
from shaped_attn import shaped_attention
from shaped_attn.testing import forward_backward


def tensors(device, **changes):
    """q, k, v, residual of shapes (2, 4, 6, 16), (2, 2, 6, 16), (2, 2, 6, 24), (2, 4, 6, 24).

    Changes are shapes, dtypes, functions of the tensor, or other values; a Tensor among them is
    moved to the device, unless it is on the meta device.
    """
    shapes = {"q": (2, 4, 6, 16), "k": (2, 2, 6, 16), "v": (2, 2, 6, 24), "residual": (2, 4, 6, 24)}
    arguments = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    for name, change in changes.items():
        if isinstance(change, tuple):
            arguments[name] = torch.zeros(change, device=device)
        elif isinstance(change, torch.Tensor) and not change.is_meta:
            arguments[name] = change.to(device)
        elif isinstance(change, torch.dtype):
            arguments[name] = arguments[name].to(change)
        elif callable(change):
            arguments[name] = change(arguments[name])
        else:
            arguments[name] = change
    return arguments


def on(device, arguments):
    """The Tensors among the arguments moved to the device."""
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}


def to_meta(x):
    return x.to("meta")


# changes of valid arguments, the exception, and parts of its message in their order:
# argument ... rule ... value ... remedy
ERRORS = {
    "q_none": ({"q": None}, TypeError, "q ... must be a torch.Tensor ... got NoneType ... Pass"),
    "k_list": ({"k": [1.0]}, TypeError, "k ... must be a torch.Tensor ... got list ... Pass"),
    "residual_float": (
        {"residual": 1.0},
        TypeError,
        "residual ... must be a torch.Tensor ... got float ... Pass",
    ),
    "v_sparse": (
        {"v": lambda x: x.to_sparse()},
        TypeError,
        "v ... must be a dense ... got torch.sparse_coo ... key_start",
    ),
    "q_int": ({"q": torch.int64}, TypeError, "q ... float16 ... got torch.int64 ... q.to("),
    "v_complex": (
        {"v": torch.complex64},
        TypeError,
        "v ... must be float16 ... got torch.complex64 ... v.to(",
    ),
    "q_float8": (
        {"q": torch.float8_e4m3fn},
        TypeError,
        "q ... must be float16 ... got torch.float8_e4m3fn ... q.to(",
    ),
    "q_rank": (
        {"q": (4, 6, 16)},
        ValueError,
        "q ... the 4 dimensions (B, H, T, D) ... got shape (4, 6, 16) ... Add",
    ),
    "v_rank": (
        {"v": (2, 2, 6, 24, 1)},
        ValueError,
        "v ... (B, Hkv, S, Dv) ... got shape (2, 2, 6, 24, 1) ... merge",
    ),
    "q_no_heads": (
        {"q": (2, 0, 6, 16)},
        ValueError,
        "q ... at least one head ... got shape (2, 0, 6, 16) ... may be 0",
    ),
    "k_no_heads": (
        {"k": (2, 0, 6, 16)},
        ValueError,
        "k ... at least one head ... got shape (2, 0, 6, 16) ... may be 0",
    ),
    "q_no_channels": (
        {"q": (2, 4, 6, 0)},
        ValueError,
        "q ... at least one channel (D) ... got shape (2, 4, 6, 0) ... may be 0",
    ),
    "v_no_channels": (
        {"v": (2, 2, 6, 0)},
        ValueError,
        "v ... at least one channel (Dv) ... got shape (2, 2, 6, 0) ... may be 0",
    ),
    "batch": (
        {"k": (1, 2, 6, 16)},
        ValueError,
        "k and v ... the batch size of q, 2 ... got shapes (1, 2, 6, 16) and (2, 2, 6, 24) ... "
        "Expand",
    ),
    "v_keys": (
        {"v": (2, 2, 7, 24)},
        ValueError,
        "v ... heads and keys of k, (B, 2, 6, Dv) ... got shape (2, 2, 7, 24) ... one value",
    ),
    "v_heads": (
        {"v": (2, 4, 6, 24)},
        ValueError,
        "v ... heads and keys of k, (B, 2, 6, Dv) ... got shape (2, 4, 6, 24) ... one value",
    ),
    "k_head_dim": (
        {"k": (2, 2, 6, 24)},
        ValueError,
        "k ... the head dimension of q, 16 ... got shape (2, 2, 6, 24) ... Project",
    ),
    "kv_heads": (
        {"k": (2, 3, 6, 16), "v": (2, 3, 6, 24)},
        ValueError,
        "k ... divides that of q, 4 ... got 3 heads ... divisor",
    ),
    "more_kv_heads": (
        {"k": (2, 8, 6, 16), "v": (2, 8, 6, 24)},
        ValueError,
        "k ... divides that of q, 4 ... got 8 heads ... divisor",
    ),
    "k_dtype": (
        {"k": torch.bfloat16},
        TypeError,
        "k ... the dtype of q, torch.float32 ... got torch.bfloat16 ... k.to(q.dtype)",
    ),
    "v_dtype": (
        {"v": torch.float64},
        TypeError,
        "v ... the dtype of q, torch.float32 ... got torch.float64 ... v.to(q.dtype)",
    ),
    "v_device": (
        {"v": to_meta},
        ValueError,
        "v ... the device of q, DEVICE ... got meta ... v.to(q.device)",
    ),
    "residual_device": (
        {"residual": to_meta},
        ValueError,
        "residual ... the device of q, DEVICE ... got meta ... residual.to(q.device)",
    ),
    "residual_shape": (
        {"residual": (2, 4, 6, 16)},
        ValueError,
        "residual ... the shape of the output, (2, 4, 6, 24) ... got shape (2, 4, 6, 16) ... "
        "(B, H, T, Dv)",
    ),
    "residual_narrow": (
        {"residual": torch.bfloat16},
        TypeError,
        "residual ... the dtype of q, torch.float32 ... got torch.bfloat16 ... residual.float()",
    ),
    "gain_bool": (
        {"identity_gain": True},
        TypeError,
        "identity_gain ... a number or a Tensor ... got True ... Pass a float",
    ),
    "gain_str": (
        {"softmax_gain": "1"},
        TypeError,
        "softmax_gain ... a number or a Tensor ... got '1' ... Pass a float",
    ),
    "gain_none": (
        {"center_gain": None},
        TypeError,
        "center_gain ... a number or a Tensor ... got None ... Pass a float",
    ),
    "gain_complex": (
        {"center_gain": 1j},
        TypeError,
        "center_gain ... a number or a Tensor ... got 1j ... Pass a float",
    ),
    "gain_nan": (
        {"branch_gain": float("nan")},
        ValueError,
        "branch_gain ... must be finite ... got nan ... finite",
    ),
    "gain_inf": (
        {"skip_gain": -float("inf")},
        ValueError,
        "skip_gain ... must be finite ... got -inf ... finite",
    ),
    "scale_inf": (
        {"scale": float("inf")},
        ValueError,
        "scale ... must be finite ... got inf ... finite",
    ),
    "scale_str": (
        {"scale": "auto"},
        TypeError,
        "scale ... a number or a Tensor ... got 'auto' ... Pass a float",
    ),
    "gain_int_tensor": (
        {"softmax_gain": torch.ones((), dtype=torch.int64)},
        TypeError,
        "softmax_gain ... a floating dtype ... got torch.int64 ... softmax_gain.float()",
    ),
    "gain_shape": (
        {"softmax_gain": torch.ones(2)},
        ValueError,
        "softmax_gain ... shape () or (H,) = (4,) ... got shape (2,) ... per query head",
    ),
    "gain_rank": (
        {"scale": torch.ones(4, 1)},
        ValueError,
        "scale ... shape () or (H,) = (4,) ... got shape (4, 1) ... per query head",
    ),
    "gain_device": (
        {"center_gain": torch.ones((), device="meta")},
        ValueError,
        "center_gain ... the device of q, DEVICE ... got meta ... center_gain.to(q.device)",
    ),
    "skip_without_residual": (
        {"residual": None, "skip_gain": 0.5},
        ValueError,
        "skip_gain ... acts on residual, which is None ... got 0.5 ... Pass residual",
    ),
    "skip_tensor_without_residual": (
        {"residual": None, "skip_gain": torch.ones(4)},
        ValueError,
        "skip_gain ... acts on residual, which is None ... got a Tensor of shape (4,) ... "
        "Pass residual",
    ),
    "is_causal_tensor": (
        {"is_causal": torch.ones(6, 6).tril()},
        TypeError,
        "is_causal ... must be True or False ... got a Tensor of shape (6, 6) ... bool",
    ),
    "is_causal_int": (
        {"is_causal": 1},
        TypeError,
        "is_causal ... must be True or False ... got 1 ... bool",
    ),
    "return_lse_none": (
        {"return_lse": None},
        TypeError,
        "return_lse ... must be True or False ... got None ... bool",
    ),
    "deterministic_int": (
        {"deterministic": 0},
        TypeError,
        "deterministic ... must be True or False ... got 0 ... bool",
    ),
    "q_offset_bool": (
        {"q_offset": False},
        TypeError,
        "q_offset ... must be an int or None ... got False ... S - T",
    ),
    "q_offset_float": (
        {"q_offset": 1.0},
        TypeError,
        "q_offset ... must be an int or None ... got 1.0 ... S - T",
    ),
    "q_offset_tensor": (
        {"q_offset": torch.tensor(1)},
        TypeError,
        "q_offset ... must be an int or None ... got a Tensor of shape () ... S - T",
    ),
    "identity_before": (
        {"q_offset": -1},
        ValueError,
        "identity_gain ... 0 <= q_offset + i < S = 6 for i < T = 6 ... "
        "got 1.0 with queries at -1 to 4 ... identity_gain=0.0",
    ),
    "identity_after": (
        {"q_offset": 1, "identity_gain": torch.zeros(4)},
        ValueError,
        "identity_gain ... 0 <= q_offset + i < S = 6 for i < T = 6 ... "
        "got a Tensor of shape (4,) with queries at 1 to 6 ... identity_gain=0.0",
    ),
    "identity_short": (
        {"k": (2, 2, 5, 16), "v": (2, 2, 5, 24)},
        ValueError,
        "identity_gain ... 0 <= q_offset + i < S = 5 for i < T = 6 ... queries at -1 to 4 ... "
        "between 0 and S - T",
    ),
    "identity_no_keys": (
        {"k": (2, 2, 0, 16), "v": (2, 2, 0, 24)},
        ValueError,
        "identity_gain ... S = 0 ... queries at -6 to -1 ... identity_gain=0.0",
    ),
    "key_start_int": (
        {"key_start": 3},
        TypeError,
        "key_start ... Tensor of shape (B,) or None ... got 3 ... torch.tensor(",
    ),
    "key_end_float": (
        {"key_end": torch.ones(2)},
        TypeError,
        "key_end ... an integer dtype ... got torch.float32 ... key_end.to(",
    ),
    "key_end_bool": (
        {"key_end": torch.ones(2, dtype=torch.bool)},
        TypeError,
        "key_end ... an integer dtype ... got torch.bool ... attn_mask",
    ),
    "key_start_shape": (
        {"key_start": torch.zeros(2, 1, dtype=torch.int64)},
        ValueError,
        "key_start ... shape (B,) = (2,) ... got shape (2, 1) ... per batch entry",
    ),
    "key_end_batch": (
        {"key_end": torch.ones(1, dtype=torch.int32)},
        ValueError,
        "key_end ... shape (B,) = (2,) ... got shape (1,) ... per batch entry",
    ),
    "key_start_device": (
        {"key_start": torch.zeros(2, dtype=torch.int32, device="meta")},
        ValueError,
        "key_start ... the device of q, DEVICE ... got meta ... key_start.to(q.device)",
    ),
    "mask_list": (
        {"attn_mask": [True]},
        TypeError,
        "attn_mask ... a bool Tensor or None ... got list ... True where",
    ),
    "mask_float": (
        {"attn_mask": torch.zeros(6, 6)},
        TypeError,
        "attn_mask ... dtype torch.bool ... got torch.float32 ... mask of 0 and 1 ... "
        "attn_mask.bool() ... nothing but 0 and -inf ... attn_mask == 0 ... additive bias ... "
        "prior=b - b.logsumexp(-1, keepdim=True) ... the centre has the weights softmax(b)",
    ),
    "mask_shape": (
        {"attn_mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        "attn_mask ... broadcast to (B, H, T, S) = (2, 4, 6, 6) ... got shape (2, 6) ... "
        "mask[:, None, None, :]",
    ),
    "mask_kv_heads": (
        {"attn_mask": torch.ones(2, 2, 6, 6, dtype=torch.bool)},
        ValueError,
        "attn_mask ... broadcast to (B, H, T, S) = (2, 4, 6, 6) ... got shape (2, 2, 6, 6) ... "
        "size 1",
    ),
    "mask_rank": (
        {"attn_mask": torch.ones(1, 2, 4, 6, 6, dtype=torch.bool)},
        ValueError,
        "attn_mask ... broadcast to (B, H, T, S) ... got shape (1, 2, 4, 6, 6) ... size 1",
    ),
    "mask_device": (
        {"attn_mask": torch.ones(6, dtype=torch.bool, device="meta")},
        ValueError,
        "attn_mask ... the device of q, DEVICE ... got meta ... attn_mask.to(q.device)",
    ),
    "prior_type": (
        {"prior": "espa"},
        TypeError,
        "prior ... None (uniform), an ESPA, a USPA or a Tensor ... got str ... Leave it out",
    ),
    "prior_dtype": (
        {"prior": torch.ones(6, 6, dtype=torch.bool), "impl": "reference"},
        TypeError,
        "prior ... a floating dtype ... got torch.bool ... logarithm",
    ),
    "prior_shape": (
        {"prior": torch.zeros(2, 6, 6), "impl": "reference"},
        ValueError,
        "prior ... broadcast to (H, T, S) = (4, 6, 6) ... got shape (2, 6, 6) ... (T, S)",
    ),
    "prior_rank": (
        {"prior": torch.zeros(1, 4, 6, 6), "impl": "reference"},
        ValueError,
        "prior ... broadcast to (H, T, S) = (4, 6, 6) ... got shape (1, 4, 6, 6) ... (T, S)",
    ),
    "prior_device": (
        {"prior": torch.zeros(6, 6, device="meta"), "impl": "reference"},
        ValueError,
        "prior ... the device of q, DEVICE ... got meta ... prior.to(q.device)",
    ),
    "impl_type": (
        {"impl": None},
        ValueError,
        "impl ... one of 'auto', 'triton', 'torch', 'reference' ... got None ... Choose",
    ),
    "impl_name": (
        {"impl": "flash"},
        ValueError,
        "impl ... one of 'auto', 'triton', 'torch', 'reference' ... got 'flash' ... Choose",
    ),
    "triton_float64": (
        {"q": torch.float64, "k": torch.float64, "v": torch.float64, "residual": None}
        | {"impl": "triton"},
        TypeError,
        "q ... float16, bfloat16 or float32 for impl='triton' ... got torch.float64 ... "
        "impl='torch'",
    ),
    "triton_head_dim": (
        {"q": (2, 4, 6, 257), "k": (2, 2, 6, 257), "impl": "triton"},
        ValueError,
        "q ... head dimension D of at most 256 ... got D = 257 ... impl='torch'",
    ),
    "triton_value_dim": (
        {"v": (2, 2, 6, 264), "residual": None, "impl": "triton"},
        ValueError,
        "v ... head dimension Dv of at most 256 ... got Dv = 264 ... impl='torch'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name, device):
    changes, error, parts = ERRORS[name]
    with pytest.raises(error) as caught:
        shaped_attention(**tensors(device, **changes))
    message = str(caught.value)
    parts = parts.replace("DEVICE", str(device))
    pattern = ".*".join(re.escape(part) for part in parts.split(" ... "))
    assert re.match(pattern, message), message
    # One wording: argument rule, got value. Remedy.
    assert re.fullmatch(r".+, got .+\. [A-Z].+\.", message), message


@pytest.mark.parametrize("center_gain", [0.0, 0.7])
def test_the_advice_on_an_additive_bias_is_right(center_gain, device):
    """Against the equation, in float64: a causal bias that is no mask, such as ALiBi's."""
    q, k, v = torch.randn(3, 2, 4, 6, 16, dtype=torch.float64).to(device)
    distance = torch.arange(6, device=device)[:, None] - torch.arange(6, device=device)
    slopes = 0.5 ** torch.arange(4, device=device)[:, None, None]
    b = torch.where(distance >= 0, -slopes * distance, -torch.inf).double()
    with pytest.raises(TypeError, match=re.escape("prior=b - b.logsumexp(-1, keepdim=True)")):
        shaped_attention(q, k, v, attn_mask=b)
    out = shaped_attention(
        q,
        k,
        v,
        prior=b - b.logsumexp(-1, keepdim=True),
        is_causal=True,
        identity_gain=0.0,
        softmax_gain=1.3,
        center_gain=center_gain,
        scale=0.25,
        impl="torch",
    )
    logits = 0.25 * q @ k.mT
    expected = (1.3 * (logits + b).softmax(-1) - center_gain * b.softmax(-1)) @ v
    # On either side: an exponent has the roundings of a product of 16, of b and of its sum; a
    # weight twice its relative error, once for the sum of them; an output those of 6 weights.
    eps = torch.finfo(torch.float64).eps
    size = 0.25 * (q.abs() @ k.abs().mT).amax() + b[b.isfinite()].abs().amax() + math.log(6)
    relative = 2 * (16 + 3) * eps * size + (6 + 2) * eps
    assert (out - expected).abs().amax() <= 2 * relative * (1.3 + center_gain) * v.abs().amax()


def test_nested_tensor(device):
    parts = [torch.zeros(4, 6, 16, device=device)] * 2
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(TypeError, match="q must be a dense .* got a nested tensor"):
        shaped_attention(**tensors(device, q=nested))


def test_triton_off_gpu_without_the_interpreter():
    """In a fresh process: the tests' own has the interpreter on."""
    code = (
        "import torch, shaped_attn\n"
        "x = torch.zeros(1, 1, 16, 16)\n"
        "shaped_attn.shaped_attention(x, x, x, impl='triton')"
    )
    *_, last = python("-c", code, status=1, TRITON_INTERPRET=None).strip().splitlines()
    for part in ("ValueError: impl 'triton' needs tensors on a GPU", "got q on cpu", "TRITON_INT"):
        assert part in last


def test_auto_is_triton_on_a_gpu_and_never_falls_back():
    """No GPU is needed: the choice looks at the device's type, the limits at dtype and size."""

    class OnGPU:
        device = torch.device("cuda")
        dtype = torch.float64
        shape = (1, 1, 16, 16)

    resolve = shaped_attn.validation.resolve_impl
    assert resolve("auto", OnGPU) == "triton"
    assert resolve("torch", OnGPU) == "torch"
    check = shaped_attn.validation.check_kernel_limits
    with pytest.raises(TypeError, match="the default on a GPU.*impl='torch'"):
        check(OnGPU, OnGPU, None)
    OnGPU.dtype = torch.float32
    check(OnGPU, OnGPU, None)
    wide = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="residual must be float16.*residual.float()"):
        check(OnGPU, OnGPU, wide)
    OnGPU.shape = (1, 1, 16, 260)
    with pytest.raises(ValueError, match="the default on a GPU.*impl='torch'"):
        check(OnGPU, OnGPU, None)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0},
        {"scale": -1.5, "identity_gain": 2, "softmax_gain": -1},
        {"softmax_gain": torch.ones(4, dtype=torch.float64), "scale": torch.tensor(-0.1)},
        {"branch_gain": torch.ones(4, dtype=torch.bfloat16)},
        {"q_offset": 0, "identity_gain": -0.0},
        {"key_start": torch.tensor([0, 3], dtype=torch.uint8), "key_end": torch.tensor([9, -2])},
        {"attn_mask": torch.tensor(True)},
        {"attn_mask": torch.ones(2, 1, 6, 1, dtype=torch.bool)},
        {"residual": torch.float64},
        {"residual": None, "skip_gain": 1},
    ],
    ids=str,
)
def test_accepted(options, impl, device):
    if impl == "auto" and device.type == "cuda" and options.get("residual") == torch.float64:
        pytest.skip("the Triton kernels have no float64")
    arguments = tensors(device, **options)
    assert shaped_attention(**arguments, impl=impl).shape == (2, 4, 6, 24)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_key_range_outside_the_keys_is_clamped(impl, device):
    q, k, v = torch.randn(3, 2, 4, 6, 16, dtype=torch.float64).to(device)
    for is_causal in (False, True):
        for wide, exact in (
            ({"key_start": torch.tensor([-3, 2])}, {"key_start": torch.tensor([0, 2])}),
            ({"key_end": torch.tensor([4, 99])}, {"key_end": torch.tensor([4, 6])}),
            ({"key_start": torch.tensor([7, 0])}, {"key_start": torch.tensor([6, 0])}),
            ({"key_end": torch.tensor([-7, 3])}, {"key_end": torch.tensor([0, 3])}),
        ):
            out, expected = (
                shaped_attention(q, k, v, is_causal=is_causal, impl=impl, **on(device, option))
                for option in (wide, exact)
            )
            assert torch.equal(out, expected)


def test_gain_values_of_tensors_are_not_checked(device):
    """Looking at them would wait for the device; NaN shows in the result instead."""
    out = shaped_attention(**tensors(device, softmax_gain=torch.tensor(float("nan"))))
    assert out.isnan().all()


@st.composite
def calls(draw):
    """A valid call: tensors that get gradients, and the other arguments."""
    size = st.integers(0, 5)
    group = draw(st.integers(1, 2))
    batch, kv_heads = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    heads, queries, keys = group * kv_heads, draw(size), draw(size)
    head_dim, value_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    arguments = {
        "q": normal(batch, heads, queries, head_dim),
        "k": normal(batch, kv_heads, keys, head_dim),
        "v": normal(batch, kv_heads, keys, value_dim),
    }
    if draw(st.booleans()):
        arguments["residual"] = normal(batch, heads, queries, value_dim)
    options = {"is_causal": draw(st.booleans()), "return_lse": draw(st.booleans())}
    options["q_offset"] = draw(st.none() | st.integers(-6, 6))
    offset = keys - queries if options["q_offset"] is None else options["q_offset"]
    has_own_keys = queries == 0 or (offset >= 0 and offset + queries <= keys)
    for name in (
        "identity_gain",
        "softmax_gain",
        "center_gain",
        "skip_gain",
        "branch_gain",
        "scale",
    ):
        kind = draw(st.sampled_from(["default", "zero", "float", "scalar", "head"]))
        if name == "identity_gain" and not has_own_keys:
            kind = "zero"
        if kind == "default" or (name == "skip_gain" and "residual" not in arguments):
            continue
        if kind == "zero":
            options[name] = 0.0
        elif kind == "float":
            options[name] = draw(st.floats(-2, 2))
        else:
            arguments[name] = normal(*([heads] if kind == "head" else []))
    for name in ("key_start", "key_end"):
        if draw(st.booleans()):
            bounds = draw(st.lists(st.integers(-2, 7), min_size=batch, max_size=batch))
            dtype = draw(st.sampled_from([torch.int32, torch.int64]))
            options[name] = torch.tensor(bounds, dtype=dtype)
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
        rank = draw(st.integers(0, 4))
        mask = torch.rand(shape[4 - rank :], generator=generator) < 0.7
        options["attn_mask"] = mask
    return arguments, options


@settings(deadline=None, max_examples=150)
@given(calls())
def test_implementations_agree_on_every_valid_call(device, call):
    """Output, lse and all gradients; and a valid call is never refused, nor gives NaN."""
    arguments, options = (on(device, part) for part in call)
    shape = (*arguments["q"].shape[:3], arguments["v"].shape[3])
    generator = torch.Generator().manual_seed(0)
    d_out = torch.randn(shape, generator=generator)
    d_lse = torch.randn(shape[:3], generator=generator) if options["return_lse"] else None
    results = [
        forward_backward(shaped_attention, arguments, d_out, d_lse, **options, impl=impl)
        for impl in ("torch", "reference")
    ]
    for name, expected in results[1].items():
        actual = results[0][name]
        assert not expected.isnan().any(), name
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    calls(),
    st.sampled_from(["q", "k", "v", "residual"]),
    st.integers(0, 3),
    st.integers(1, 7),
    st.sampled_from(["torch", "reference"]),
)
def test_a_wrong_size_is_an_error_that_names_an_argument(device, call, name, axis, size, impl):
    """Or a valid call of other sizes; never a failure deep inside, nor a broadcast result."""
    arguments, options = (on(device, part) for part in call)
    if name not in arguments or arguments[name].shape[axis] == size:
        return
    shape = list(arguments[name].shape)
    shape[axis] = size
    arguments[name] = torch.zeros(shape, dtype=torch.float64, device=device)
    try:
        result = shaped_attention(**arguments, **options, impl=impl)
    except ValueError as error:
        known = "q|k|v|k and v|residual|attn_mask|key_start|key_end|\\w+_gain|scale"
        assert re.match(rf"({known}) .*, got ", str(error), flags=re.DOTALL), error
    else:
        out = result[0] if options["return_lse"] else result
        assert out.shape == (*arguments["q"].shape[:3], arguments["v"].shape[3])
