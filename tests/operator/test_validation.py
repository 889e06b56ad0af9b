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


# Parts of the message in their order, argument ... rule ... value ... remedy, and the changes of
# valid arguments that are an error.
TYPE_ERRORS = {
    "q ... must be a torch.Tensor ... got NoneType ... Pass": {"q": None},
    "k ... must be a torch.Tensor ... got list ... Pass": {"k": [1.0]},
    "residual ... must be a torch.Tensor ... got float ... Pass": {"residual": 1.0},
    "v ... must be a dense ... got torch.sparse_coo ... key_start": {"v": lambda x: x.to_sparse()},
    "q ... float16 ... got torch.int64 ... q.to(": {"q": torch.int64},
    "v ... must be float16 ... got torch.complex64 ... v.to(": {"v": torch.complex64},
    "q ... must be float16 ... got torch.float8_e4m3fn ... q.to(": {"q": torch.float8_e4m3fn},
    "k ... the dtype of q, torch.float32 ... got torch.bfloat16 ... k.to(q.dtype)": {
        "k": torch.bfloat16
    },
    "v ... the dtype of q, torch.float32 ... got torch.float64 ... v.to(q.dtype)": {
        "v": torch.float64
    },
    "residual ... the dtype of q, torch.float32 ... got torch.bfloat16 ... residual.float()": {
        "residual": torch.bfloat16
    },
    "identity_gain ... a number or a Tensor ... got True ... Pass a float": {"identity_gain": True},
    "softmax_gain ... a number or a Tensor ... got '1' ... Pass a float": {"softmax_gain": "1"},
    "center_gain ... a number or a Tensor ... got None ... Pass a float": {"center_gain": None},
    "center_gain ... a number or a Tensor ... got 1j ... Pass a float": {"center_gain": 1j},
    "scale ... a number or a Tensor ... got 'auto' ... Pass a float": {"scale": "auto"},
    "softmax_gain ... a floating dtype ... got torch.int64 ... softmax_gain.float()": {
        "softmax_gain": torch.ones((), dtype=torch.int64)
    },
    "is_causal ... must be True or False ... got a Tensor of shape (6, 6) ... bool": {
        "is_causal": torch.ones(6, 6).tril()
    },
    "is_causal ... must be True or False ... got 1 ... bool": {"is_causal": 1},
    "return_lse ... must be True or False ... got None ... bool": {"return_lse": None},
    "deterministic ... must be True or False ... got 0 ... bool": {"deterministic": 0},
    "q_offset ... must be an int or None ... got False ... S - T": {"q_offset": False},
    "q_offset ... must be an int or None ... got 1.0 ... S - T": {"q_offset": 1.0},
    "q_offset ... must be an int or None ... got a Tensor of shape () ... S - T": {
        "q_offset": torch.tensor(1)
    },
    "key_start ... Tensor of shape (B,) or None ... got 3 ... torch.tensor(": {"key_start": 3},
    "key_end ... an integer dtype ... got torch.float32 ... key_end.to(": {
        "key_end": torch.ones(2)
    },
    "key_end ... an integer dtype ... got torch.bool ... attn_mask": {
        "key_end": torch.ones(2, dtype=torch.bool)
    },
    "attn_mask ... a bool Tensor or None ... got list ... True where": {"attn_mask": [True]},
    "attn_mask ... dtype torch.bool ... got torch.float32 ... mask of 0 and 1 ... "
    "attn_mask.bool() ... nothing but 0 and -inf ... attn_mask == 0 ... additive bias ... "
    "prior=b - b.logsumexp(-1, keepdim=True) ... the centre has the weights softmax(b)": {
        "attn_mask": torch.zeros(6, 6)
    },
    "prior ... None (uniform), an ESPA, a USPA or a Tensor ... got str ... Leave it out": {
        "prior": "espa"
    },
    "prior ... a floating dtype ... got torch.bool ... logarithm": {
        "prior": torch.ones(6, 6, dtype=torch.bool),
        "impl": "reference",
    },
    "q ... float16, bfloat16 or float32 for impl='triton' ... got torch.float64 ... impl='torch'": {
        "q": torch.float64,
        "k": torch.float64,
        "v": torch.float64,
        "residual": None,
        "impl": "triton",
    },
}
VALUE_ERRORS = {
    "q ... the 4 dimensions (B, H, T, D) ... got shape (4, 6, 16) ... Add": {"q": (4, 6, 16)},
    "v ... (B, Hkv, S, Dv) ... got shape (2, 2, 6, 24, 1) ... merge": {"v": (2, 2, 6, 24, 1)},
    "q ... at least one head ... got shape (2, 0, 6, 16) ... may be 0": {"q": (2, 0, 6, 16)},
    "k ... at least one head ... got shape (2, 0, 6, 16) ... may be 0": {"k": (2, 0, 6, 16)},
    "q ... at least one channel (D) ... got shape (2, 4, 6, 0) ... may be 0": {"q": (2, 4, 6, 0)},
    "v ... at least one channel (Dv) ... got shape (2, 2, 6, 0) ... may be 0": {"v": (2, 2, 6, 0)},
    "k and v ... batch size of q, 2 ... got shapes (1, 2, 6, 16) and (2, 2, 6, 24) ... Expand": {
        "k": (1, 2, 6, 16)
    },
    "v ... heads and keys of k, (B, 2, 6, Dv) ... got shape (2, 2, 7, 24) ... one value": {
        "v": (2, 2, 7, 24)
    },
    "v ... heads and keys of k, (B, 2, 6, Dv) ... got shape (2, 4, 6, 24) ... one value": {
        "v": (2, 4, 6, 24)
    },
    "k ... the head dimension of q, 16 ... got shape (2, 2, 6, 24) ... Project": {
        "k": (2, 2, 6, 24)
    },
    "k ... divides that of q, 4 ... got 3 heads ... divisor": {
        "k": (2, 3, 6, 16),
        "v": (2, 3, 6, 24),
    },
    "k ... divides that of q, 4 ... got 8 heads ... divisor": {
        "k": (2, 8, 6, 16),
        "v": (2, 8, 6, 24),
    },
    "v ... the device of q, DEVICE ... got meta ... v.to(q.device)": {"v": to_meta},
    "residual ... the device of q, DEVICE ... got meta ... residual.to(q.device)": {
        "residual": to_meta
    },
    "residual ... the shape of the output, (2, 4, 6, 24) ... got shape (2, 4, 6, 16) ... "
    "(B, H, T, Dv)": {"residual": (2, 4, 6, 16)},
    "branch_gain ... must be finite ... got nan ... finite": {"branch_gain": float("nan")},
    "skip_gain ... must be finite ... got -inf ... finite": {"skip_gain": -float("inf")},
    "scale ... must be finite ... got inf ... finite": {"scale": float("inf")},
    "softmax_gain ... shape () or (H,) = (4,) ... got shape (2,) ... per query head": {
        "softmax_gain": torch.ones(2)
    },
    "scale ... shape () or (H,) = (4,) ... got shape (4, 1) ... per query head": {
        "scale": torch.ones(4, 1)
    },
    "center_gain ... the device of q, DEVICE ... got meta ... center_gain.to(q.device)": {
        "center_gain": torch.ones((), device="meta")
    },
    "skip_gain ... acts on residual, which is None ... got 0.5 ... Pass residual": {
        "residual": None,
        "skip_gain": 0.5,
    },
    "skip_gain ... acts on residual, which is None ... got a Tensor of shape (4,) ... "
    "Pass residual": {"residual": None, "skip_gain": torch.ones(4)},
    "identity_gain ... 0 <= q_offset + i < S = 6 for i < T = 6 ... "
    "got 1.0 with queries at -1 to 4 ... identity_gain=0.0": {"q_offset": -1},
    "identity_gain ... 0 <= q_offset + i < S = 6 for i < T = 6 ... "
    "got a Tensor of shape (4,) with queries at 1 to 6 ... identity_gain=0.0": {
        "q_offset": 1,
        "identity_gain": torch.zeros(4),
    },
    "identity_gain ... 0 <= q_offset + i < S = 5 for i < T = 6 ... queries at -1 to 4 ... "
    "between 0 and S - T": {"k": (2, 2, 5, 16), "v": (2, 2, 5, 24)},
    "identity_gain ... S = 0 ... queries at -6 to -1 ... identity_gain=0.0": {
        "k": (2, 2, 0, 16),
        "v": (2, 2, 0, 24),
    },
    "key_start ... shape (B,) = (2,) ... got shape (2, 1) ... per batch entry": {
        "key_start": torch.zeros(2, 1, dtype=torch.int64)
    },
    "key_end ... shape (B,) = (2,) ... got shape (1,) ... per batch entry": {
        "key_end": torch.ones(1, dtype=torch.int32)
    },
    "key_start ... the device of q, DEVICE ... got meta ... key_start.to(q.device)": {
        "key_start": torch.zeros(2, dtype=torch.int32, device="meta")
    },
    "attn_mask ... broadcast to (B, H, T, S) = (2, 4, 6, 6) ... got shape (2, 6) ... "
    "mask[:, None, None, :]": {"attn_mask": torch.ones(2, 6, dtype=torch.bool)},
    "attn_mask ... broadcast to (B, H, T, S) = (2, 4, 6, 6) ... got shape (2, 2, 6, 6) ... 1": {
        "attn_mask": torch.ones(2, 2, 6, 6, dtype=torch.bool)
    },
    "attn_mask ... broadcast to (B, H, T, S) ... got shape (1, 2, 4, 6, 6) ... size 1": {
        "attn_mask": torch.ones(1, 2, 4, 6, 6, dtype=torch.bool)
    },
    "attn_mask ... the device of q, DEVICE ... got meta ... attn_mask.to(q.device)": {
        "attn_mask": torch.ones(6, dtype=torch.bool, device="meta")
    },
    "prior ... broadcast to (H, T, S) = (4, 6, 6) ... got shape (2, 6, 6) ... (T, S)": {
        "prior": torch.zeros(2, 6, 6),
        "impl": "reference",
    },
    "prior ... broadcast to (H, T, S) = (4, 6, 6) ... got shape (1, 4, 6, 6) ... (T, S)": {
        "prior": torch.zeros(1, 4, 6, 6),
        "impl": "reference",
    },
    "prior ... the device of q, DEVICE ... got meta ... prior.to(q.device)": {
        "prior": torch.zeros(6, 6, device="meta"),
        "impl": "reference",
    },
    "impl ... one of 'auto', 'triton', 'torch', 'reference' ... got None ... Choose": {
        "impl": None
    },
    "impl ... one of 'auto', 'triton', 'torch', 'reference' ... got 'flash' ... Choose": {
        "impl": "flash"
    },
    "q ... head dimension D of at most 256 ... got D = 257 ... impl='torch'": {
        "q": (2, 4, 6, 257),
        "k": (2, 2, 6, 257),
        "impl": "triton",
    },
    "v ... head dimension Dv of at most 256 ... got Dv = 264 ... impl='torch'": {
        "v": (2, 2, 6, 264),
        "residual": None,
        "impl": "triton",
    },
}


@pytest.mark.parametrize(
    "error, parts, changes",
    [
        *((TypeError, *entry) for entry in TYPE_ERRORS.items()),
        *((ValueError, *entry) for entry in VALUE_ERRORS.items()),
    ],
)
def test_error(error, parts, changes, device):
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
