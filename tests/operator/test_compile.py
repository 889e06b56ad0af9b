"""What `torch.compile` traces: calls that the oldest supported torch, 2.11, can trace as well."""

import gc
import sys
from contextlib import contextmanager

import pytest
import torch

from shaped_attn import ESPA, USPA, composite, functional, ops, priors, shaped_attention, validation
from shaped_attn.nn import (
    METHODS,
    Projection,
    ShapedTransformer,
    ShapedTransformerConfig,
    transformer,
)

HERE = __name__.partition(".")[0]
HEADS, LENGTH = 4, 20

# What the package calls while torch.compile traces it: the top module of a function, or of the type
# of a method, and its name. torch 2.11 and 2.13 trace all of them. Before you add one, run this
# file with torch 2.11. It cannot trace, for instance, a loop over vars, or is_autocast_available.
# "_wrapped_call_impl" is the call of a module, "wrapped" an operator with a number on its left.
TRACED = {
    f"{module}.{name}"
    for module, names in {
        "builtins": "all any append get getattr isinstance len max min",
        "collections": "_replace",
        "contextlib": "nullcontext",
        "math": "isnan log sqrt",
        "namedtuple_Gains": "<lambda>",
        "namedtuple_ShapedTransformerOutput": "<lambda>",
        "namedtuple_Visibility": "<lambda>",
        "torch": """
            _wrapped_call_impl abs add addmm any arange autocast baddbmm bmm broadcast_tensors cat
            chunk clamp cos cross_entropy cumsum detach exp expand expm1 flatten flip full
            get_autocast_dtype index_select is_autocast_enabled is_complex is_floating_point
            is_grad_enabled leaky_relu linalg_eigh linalg_solve linear log log2 logsumexp long
            masked_fill mean minimum narrow new_zeros ones pad promote_types relu
            repeat_interleave reshape scaled_dot_product_attention sin softmax sqrt squeeze stack
            stride sum to transpose unbind unflatten view where wrapped zeros_like
        """,
    }.items()
    for name in names.split()
}


def ints(device, *values):
    return torch.tensor(values, device=device)


def heads(device, *values):
    return torch.tensor(values, device=device, requires_grad=True)


CALLS = {
    "defaults": lambda device: {},
    "numbers": lambda device: {
        "softmax_gain": 0.7,
        "center_gain": 0.0,
        "scale": 0.2,
        "is_causal": True,
    },
    "tensors": lambda device: {
        "identity_gain": heads(device, 0.5, 0.6, 0.7, 0.8),
        "softmax_gain": heads(device, 0.9)[0],
        "branch_gain": heads(device, 0.4, 0.3, 0.2, 0.1),
        "scale": heads(device, 0.3)[0],
        "is_causal": True,
    },
    "padding": lambda device: {
        "is_causal": True,
        "key_start": ints(device, 0, 3),
        "key_end": ints(device, LENGTH, 9),
    },
    "mask": lambda device: {
        "attn_mask": torch.arange(LENGTH, device=device) % 3 > 0,
        "q_offset": 0,
    },
    "offset": lambda device: {"identity_gain": 0.0, "q_offset": 5, "is_causal": True},
    "skip_only": lambda device: {"identity_gain": 0.0, "softmax_gain": 0.0, "center_gain": 0.0},
    "espa": lambda device: {"prior": ESPA(3.0, 0.1), "is_causal": True},
    "espa_full": lambda device: {"prior": ESPA(3.0, 0.1)},
    "espa_rates": lambda device: {
        "prior": ESPA(3.0, heads(device, 0.1, 0.3, 0.02, 0.2)),
        "is_causal": True,
    },
    "uspa": lambda device: {
        "prior": USPA(0.1, 0.5),
        "is_causal": True,
        "key_start": ints(device, 0, 3),
    },
    "uspa_full": lambda device: {"prior": USPA(0.1, 0.5)},
    "log_prior": lambda device: {"prior": torch.zeros(HEADS, LENGTH, LENGTH, device=device)},
}


def tensors(device, impl, length=LENGTH):
    """Return q, k, v and a residual; k and v have fewer heads, v has other channels than k."""
    channels = 16 if impl == "triton" else 12
    q = torch.randn(2, HEADS, length, 16)
    k, v = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, channels)
    residual = torch.randn(2, HEADS, length, channels)
    return [x.to(device).requires_grad_() for x in (q, k, v, residual)]


def autocast(device, enabled):
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


MODELS = [
    *({"method": method} for method in METHODS),
    *({"method": method, "kind": "encoder", "head": "masked_lm"} for method in METHODS),
    {"positions": "learned", "tie_embeddings": True, "activation_checkpointing": True},
    {"out_proj": "orthogonal", "gain_scheme": "learn", "norm": "rms"},
    {"trainable_slopes": True, "gain_scheme": "recover"},
    {"head": "token_classification", "num_labels": 11, "final_norm": "layer"},
    {"method": "pre_ln", "norm": "rms", "has_skip": False, "positions": "none"},
]


def model(device, **options):
    config = ShapedTransformerConfig(vocab_size=11, width=16, depth=2, heads=2, **options)
    return ShapedTransformer(config, device=device)


# The calls


@contextmanager
def record_calls():
    """Record what the package calls outside of itself while it runs uncompiled, as a set of names.

    It sees functions and methods, of Python or C, and classes written in Python; not operators,
    attributes, imports and classes written in C, such as ``float``.
    """
    names = set()

    def package(frame):
        return "" if frame is None else frame.f_globals.get("__name__", "").partition(".")[0]

    def profile(frame, event, function):
        if event == "c_call" and package(frame) == "shaped_attn":
            owner = function.__self__
            owner = owner if isinstance(owner, type) else type(owner)
            root = (function.__module__ or owner.__module__).partition(".")[0]
            name = function.__name__
        elif event == "call" and package(frame.f_back) == "shaped_attn":
            root, name = package(frame), frame.f_code.co_name
            if name == "__init__":
                name = type(frame.f_locals[frame.f_code.co_varnames[0]]).__name__
        else:
            return
        if root not in ("shaped_attn", "importlib", HERE) and not name.startswith("__"):
            # Where in torch a function is, in which language, and if it is a method, may change.
            names.add(f"{root}.{name}")

    before = sys.getprofile()
    gc.disable()  # it calls finalizers of anybody's
    sys.setprofile(profile)
    try:
        yield names
    finally:
        sys.setprofile(before)
        gc.enable()


@pytest.fixture
def as_if_compiling(monkeypatch):
    """Run what Dynamo traces, nothing that it does not.

    torch itself stays as it is: Dynamo remembers functions by identity.
    """

    def operator(q, k, v, residual=None, *inputs, **options):
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        return (out, out[..., 0], *(None,) * 3)

    def checkpoint(function, *inputs, use_reentrant, preserve_rng_state, **options):
        return function(*inputs, **options)

    validation.is_interpreted()  # imports kernels at its first call
    monkeypatch.setattr(priors, "CACHED_TOKENS", 0)  # nothing is kept while compiling
    monkeypatch.setattr(ops, "_attention_op", operator)
    monkeypatch.setattr(composite, "checkpoint", checkpoint)
    monkeypatch.setattr(transformer, "checkpoint", checkpoint)


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_attention_calls_what_torch_2_11_traces(as_if_compiling, impl, under_autocast, device):
    with record_calls() as calls, autocast(device, under_autocast):
        for options in CALLS.values():
            shaped_attention(*tensors(device, impl), impl=impl, return_lse=True, **options(device))
        shaped_attention(
            *tensors(device, impl, 300), impl=impl, prior=USPA()
        )  # more rows than a chunk
    assert calls - TRACED == set()


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_models_call_what_torch_2_11_traces(as_if_compiling, options, under_autocast, device):
    network, x = model(device, **options), torch.randint(11, (2, 6)).to(device)
    with record_calls() as calls, autocast(device, under_autocast):
        network(x, x)
    assert calls - TRACED == set()


@pytest.mark.parametrize("under_autocast", [False, True])
def test_projection_of_a_stack_calls_what_torch_2_11_traces(under_autocast, device):
    projection = Projection(16, 16, device=device)
    projection.weight = torch.nn.Parameter(projection.weight.expand(3, 16, 16).clone())
    x = torch.randn(3, 5, 16).to(device)
    with record_calls() as calls, autocast(device, under_autocast):
        projection(x, x, 0.5, 0.5)
        projection(x)
    assert calls - TRACED == set()


@pytest.mark.filterwarnings("ignore:'mkldnn' is no longer used as device type")
def test_types_of_device_without_autocast():
    found = [name for name in functional.NO_AUTOCAST if torch.amp.is_autocast_available(name)]
    assert found == []


# Compiled


def assert_compiles(function, *inputs):
    """One whole graph, of the same operators."""
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("under_autocast", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "impl", ["torch", *(pytest.param(x, marks=pytest.mark.slow) for x in ("triton", "reference"))]
)
def test_attention_compiles_to_one_graph(fresh_compiler, impl, name, under_autocast, device):
    options = CALLS[name](device)
    inputs = tensors(device, impl)

    def attend(*inputs):
        return shaped_attention(*inputs, impl=impl, return_lse=True, **options)

    with autocast(device, under_autocast):
        assert_compiles(attend, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_models_compile_to_one_graph(fresh_compiler, options, device):
    x = torch.randint(11, (2, 6)).to(device)
    with autocast(device, True):
        assert_compiles(model(device, **options), x, x)


def test_meta_tensors_compile(fresh_compiler, device):
    q = torch.randn(1, 2, 8, 16, device="meta")

    def attend(q):
        return shaped_attention(q, q, q, is_causal=True, prior=ESPA(3.0, 0.1))

    with autocast(device, True):
        found = torch.compile(attend, fullgraph=True, backend="eager")(q)
    assert found.shape == q.shape and found.dtype == q.dtype
