"""Blocks and whole models: configuration, initial laws, heads and losses, saving, compiling."""

import copy
import dataclasses
import doctest
import importlib
import inspect
import json
import math
from functools import partial

import modules
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import ALLOWED, WIDTH, build, config, double, make_stack

from shaped_attn.nn import (
    ShapedAttention,
    ShapedBlock,
    ShapedMLP,
    ShapedTransformer,
    ShapedTransformerConfig,
    anneal_gains,
    initializers,
    orthogonal,
    parameter_groups,
)
from shaped_attn.testing import relative_error, rounding_error


def assert_equal(actual, expected, *, depth=1):
    """In that many blocks one after another."""
    sums = depth * 6 * WIDTH  # q or k, v, W_O, both matrices of the MLP, the sum over keys
    modules.assert_equal(actual, expected, sums=sums)


# Blocks


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("halves", ["both", "attention", "mlp"])
def test_block_is_its_two_halves(halves, norm, device):
    block = ShapedBlock(
        WIDTH,
        2,
        branch_gain=0.6,
        attention=halves != "mlp",
        mlp=halves != "attention",
        norm=norm,
        is_causal=True,
        impl="torch",
        mlp_ratio=2,
        dtype=torch.float64,
    ).to(device)
    x = double(device, 3, 5, WIDTH)
    key_start = torch.tensor([0, 2, 4], device=device)

    def read(x):
        if norm == "rms":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if norm == "layer":
            return F.layer_norm(x, (WIDTH,), eps=1e-6)
        return x

    expected = x
    if halves != "mlp":
        branch = block.attention(read(expected), key_start=key_start)
        expected = 0.8 * expected + 0.6 * branch
    else:
        assert block.attention is None and block.attention_norm is None
    if halves != "attention":
        expected = 0.8 * expected + 0.6 * block.mlp(read(expected))
    else:
        assert block.mlp is None and block.mlp_norm is None
    assert_equal(block(x, key_start=key_start), expected)


def test_block_passes_its_arguments_on():
    block = ShapedBlock(
        WIDTH,
        4,
        kv_heads=2,
        head_dim=3,
        is_causal=True,
        out_proj="orthogonal",
        scale="standard",
        tau0=2.0,
        identity_gain=0.9,
        softmax_gain=0.8,
        center_gain=0.7,
        gain_scheme="learn",
        learned_gains=("softmax_gain",),
        impl="reference",
        deterministic=False,
        mlp_ratio=2,
        c_plus=0.5,
        c_minus=-0.5,
        trainable_slopes=True,
    )
    attention, mlp = block.attention, block.mlp
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 3)
    assert attention.is_causal and attention.impl == "reference" and not attention.deterministic
    assert attention.out_proj.law is orthogonal
    assert attention.scale == 0.5 / math.sqrt(3)
    gains = {"identity_gain": 0.9, "softmax_gain": 0.8, "center_gain": 0.7}
    assert attention.gains.start == gains and attention.gains.gain_scheme == "learn"
    assert list(dict(attention.gains.named_parameters())) == ["softmax_gain"]
    assert mlp.hidden_width == 2 * WIDTH and mlp.trainable_slopes
    assert mlp.start == {"c_plus": 0.5, "c_minus": -0.5}


def test_block_has_the_arguments_of_its_halves_and_their_defaults():
    block = inspect.signature(ShapedBlock).parameters
    other_methods = {"query_proj", "key_proj", "value_proj", "prior"}
    for half in (ShapedAttention, ShapedMLP):
        for name, parameter in inspect.signature(half).parameters.items():
            if name not in other_methods:
                assert block[name].default == parameter.default, name


@pytest.mark.parametrize("branch_gain", [0.0, 0.6, 1.0])
def test_skip_gain_keeps_the_variance(branch_gain):
    block = ShapedBlock(WIDTH, branch_gain=branch_gain)
    assert math.isclose(block.skip_gain**2 + branch_gain**2, 1.0)
    given = ShapedBlock(WIDTH, branch_gain=branch_gain, skip_gain=block.skip_gain)
    assert given.skip_gain == block.skip_gain


def test_variance_may_be_broken_on_demand(device):
    skip_gain = math.sqrt(0.75 + 1 / WIDTH)
    with pytest.raises(ValueError, match=r"skip_gain must satisfy skip_gain\^2 \+ branch_gain\^2"):
        ShapedBlock(WIDTH, skip_gain=skip_gain)
    block = ShapedBlock(WIDTH, skip_gain=skip_gain, preserves_variance=False, attention=False).to(
        device
    )
    x = double(device, 2, 3, WIDTH).float()
    assert_equal(block(x), skip_gain * x + 0.5 * block.mlp(x))


@pytest.mark.parametrize(
    "error, options, message",
    [
        (ValueError, {"attention": False, "mlp": False}, "attention and mlp must not both be Fal"),
        (ValueError, {"branch_gain": 1.5}, "branch_gain must be from 0 to 1, got 1.5"),
        (TypeError, {"branch_gain": None}, "branch_gain must be a number"),
        (TypeError, {"preserves_variance": None}, "preserves_variance must be True or False"),
        (ValueError, {"norm": "batch"}, "norm must be one of None, 'rms', 'layer', got 'batch'"),
        (TypeError, {"mlp": "yes"}, "mlp must be True or False"),
    ],
)
def test_block_argument_errors(error, options, message):
    with pytest.raises(error, match=message):
        ShapedBlock(**({"width": WIDTH} | options))


def assert_rounded_in_its_branches(block, x, out):
    """A float32 stream: bfloat16 concerns nothing but what the branches add to it."""
    assert out.dtype == torch.float32
    golden = copy.deepcopy(block).double()
    golden.attention.impl = "reference"
    golden = golden(x.double())
    share = relative_error(block.skip_gain**2 * x, golden)  # of the branches in the result
    # Input, norm, q or k or v, attention, W_O; of the MLP one less. Weights under autocast.
    roundings = 2 * 5
    error = relative_error(out, golden)
    assert error <= roundings * share * rounding_error(torch.bfloat16)
    assert error > 16 * rounding_error(torch.float32)  # bfloat16 was at work


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_stream_of_a_block_may_be_wider_than_its_weights(out_proj, norm, device):
    block = ShapedBlock(WIDTH, 2, out_proj=out_proj, norm=norm, dtype=torch.bfloat16).to(device)
    x = torch.randn(2, 5, WIDTH).to(device)
    assert_rounded_in_its_branches(block, x, block(x))
    assert block(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_autocast_keeps_the_stream_wide(norm, device):
    block = ShapedBlock(WIDTH, 2, out_proj="gaussian", norm=norm, gain_scheme="learn").to(device)
    x = torch.randn(2, 5, WIDTH).to(device).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = block(x)
    assert_rounded_in_its_branches(block, x, out)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_narrow_stream_takes_the_dtype_of_the_weights(device):
    block = ShapedBlock(WIDTH, 2).to(device)
    x = torch.randn(2, 5, WIDTH).to(device).bfloat16()
    assert torch.equal(block(x), block(x.float()))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "out_proj": "orthogonal", "gain_scheme": "learn", "norm": "rms"},
        {"trainable_slopes": True, "gain_scheme": "recover"},
    ],
    ids=["causal", "full"],
)
def test_block_compiles_to_one_graph(options, device):
    torch._dynamo.reset()
    block = ShapedBlock(WIDTH, 2, impl="torch", dtype=torch.float64, **options).to(device)
    x = double(device, 2, 5, WIDTH)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), block(x)
    assert_equal(out, expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in (out, expected)
    ]
    for found, wanted in zip(*gradients, strict=True):
        assert_equal(found, wanted, depth=3)
    torch._dynamo.reset()


# Initial laws


def test_gaussian_law():
    """Mean, variance and fourth moment, within five standard errors."""
    mlp = ShapedMLP(64, 4, dtype=torch.float64)
    attention = ShapedAttention(128, 4, kv_heads=2, head_dim=24, out_proj="gaussian")
    weights = {"post": (mlp.post.weight, 256), "pre": (mlp.pre.weight, 64)}
    for name in ("query", "key", "value", "out_proj"):
        weights[name] = (getattr(attention, name).weight, 128)
    for name, (weight, fan_in) in weights.items():
        x = weight.detach().double() * math.sqrt(fan_in)
        count = x.numel()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            error = (x**power).mean() - moment
            assert error.abs() <= 5 * math.sqrt(variance / count), (name, power)
        rows = x.square().mean(1) - 1  # not only on average over rows
        assert rows.abs().max() <= 6 * math.sqrt(2 / fan_in), name


def test_orthogonal_law_is_that_of_haar():
    networks = 2000
    normal = torch.randn(
        networks, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weight = torch.empty_like(normal)
    orthogonal(weight, torch.Generator().manual_seed(0))
    rounding = 5 * 5 * rounding_error(torch.float64)
    assert (weight @ weight.mT - torch.eye(5)).abs().max() <= rounding
    # The orthogonal factor of a Gaussian matrix is uniform if its signs are the unique ones with
    # which the triangular factor has a positive diagonal.
    triangle = weight.mT @ normal
    assert triangle.tril(-1).abs().max() <= rounding * normal.norm(dim=(1, 2)).max()
    assert triangle.diagonal(dim1=1, dim2=2).min() > 0
    # Then an element has mean 0, and the trace mean 0 and variance 1.
    assert weight.mean(0).abs().max() <= 5 * math.sqrt(1 / 5 / networks)
    trace = weight.diagonal(dim1=1, dim2=2).sum(1)
    assert trace.mean().abs() <= 5 / math.sqrt(networks)
    assert (trace.square().mean() - 1).abs() <= 5 * math.sqrt(2 / networks)


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (3, 4, 12), (3, 12, 4)])
def test_orthogonal_law_of_a_rectangle(shape):
    weight = torch.empty(shape, dtype=torch.float64)
    orthogonal(weight, torch.Generator().manual_seed(0))
    rounding = 12 * rounding_error(torch.float64)
    if shape[-1] == 12:
        assert (weight @ weight.mT - torch.eye(4)).abs().max() <= rounding
    else:  # x W^T has three times as many elements as x, and the mean square of x
        assert (weight.mT @ weight - 3 * torch.eye(4)).abs().max() <= 3 * rounding
        x = double("cpu", *shape[:-2], 5, 4)
        out = x @ weight.mT
        ratio = out.square().mean(-1) / x.square().mean(-1)
        assert (ratio - 1).abs().max() <= 2 * rounding


def test_orthogonal_law_of_a_rectangle_is_that_of_haar():
    """An element has mean 0 and variance 1/12, and two columns of a row do not correlate."""
    networks = 2000
    weight = torch.empty(networks, 4, 12, dtype=torch.float64)
    orthogonal(weight, torch.Generator().manual_seed(0))
    assert weight.mean(0).abs().max() <= 5 * math.sqrt(1 / 12 / networks)
    # The fourth moment of an element of a uniform unit vector of 12 is 3 / (12 14).
    spread = math.sqrt((3 / 168 - 1 / 144) / networks)
    assert (weight.square().mean(0) - 1 / 12).abs().max() <= 5 * spread
    products = (weight[:, :, 0] * weight[:, :, 1]).mean(0)
    assert products.abs().max() <= 5 * math.sqrt(1 / 168 / networks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_projection_of_an_attention(dtype):
    weight = ShapedAttention(32, 2, out_proj="orthogonal", dtype=dtype).out_proj.weight
    assert weight.dtype == dtype
    error = (weight @ weight.mT).double() - torch.eye(32)
    assert error.abs().max() <= 32 * rounding_error(dtype)


def test_laws_reach_blocks_in_modules_of_others():
    tree = torch.nn.Sequential(torch.nn.Linear(3, WIDTH), ShapedBlock(WIDTH, norm="rms"))
    names = {name for name, _ in tree.named_parameters() if name.startswith("1.")}
    assert set(initializers(tree)) == names


@pytest.mark.parametrize(
    "make",
    [
        partial(ShapedBlock, heads=2, out_proj="orthogonal", mlp_ratio=2, impl="torch"),
        partial(ShapedMLP, mlp_ratio=2),
        *(
            partial(ShapedAttention, heads=2, kv_heads=1, is_causal=True, out_proj=x, impl="torch")
            for x in ("none", "gaussian", "orthogonal")
        ),
    ],
)
def test_a_stack_equals_its_networks_one_by_one(make, device):
    stack = make_stack(make(WIDTH, dtype=torch.float64), 3).to(device)
    x, residual = double(device, 2, 3, 5, WIDTH)
    arguments, options = (x,), {}
    if not isinstance(stack, ShapedBlock):
        arguments, options = (x, residual), {"skip_gain": 0.8, "branch_gain": 0.6}
    out = stack(*arguments, **options)
    maps = stack.attention_matrix(x) if isinstance(stack, ShapedAttention) else None
    for i in range(3):
        single = make(WIDTH, dtype=torch.float64).to(device)
        single.load_state_dict({name: w[i] for name, w in stack.state_dict().items()})
        one = slice(i, i + 1)
        assert_equal(out[one], single(*(tensor[one] for tensor in arguments), **options))
        if maps is not None:
            assert_equal(maps[one], single.attention_matrix(x[one]))
    if getattr(stack, "out_proj", None) is not None:
        assert modules.count(lambda: stack(*arguments, **options))["baddbmm"] == 1


@pytest.mark.parametrize("batch, length", [(2, 0), (0, 3), (0, 0)])
def test_empty_streams(batch, length, device):
    for block in (
        ShapedBlock(WIDTH, 2).to(device),
        ShapedBlock(WIDTH, 2, out_proj="gaussian", norm="rms", trainable_slopes=True).to(device),
    ):
        x = torch.empty(batch, length, WIDTH, device=device)
        assert block(x).shape == x.shape
        maps = block.attention.attention_matrix(x)
        assert maps.shape == (batch, 2, length, length)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_blocks_keep_the_mean_variance(half, device):
    """E[V'_11] = V_11 of the MLP half; of the attention half at small logits."""
    networks, width = 300, 32
    options = {"attention": half == "attention", "mlp": half == "mlp", "impl": "torch"}
    block = ShapedBlock(width, 2, branch_gain=1.0, tau0=1e6, dtype=torch.float64, **options)
    block = make_stack(block, networks).to(device)
    x = torch.linalg.qr(double(device, networks, width, 4)).Q.mT * math.sqrt(width)
    with torch.no_grad():
        variance = block(x).square().mean(-1)
    standard_error = variance.std() / math.sqrt(variance.numel())
    assert (variance.mean() - 1).abs() <= 4 * standard_error
    assert standard_error < 0.02


# Configuration


def test_config_has_the_arguments_of_blocks_and_their_defaults():
    known = {f.name: f.default for f in dataclasses.fields(ShapedTransformerConfig)}
    others = {"is_causal", "attention", "mlp", "device", "dtype"}
    others |= {"width", "heads", "mlp_ratio"}  # of a model they are larger
    for name, parameter in inspect.signature(ShapedBlock).parameters.items():
        if name not in others:
            assert known[name] == parameter.default, name
    made = config(heads=4, kv_heads=2, branch_gain=0.3).block_arguments()
    assert made["heads"] == 4 and made["kv_heads"] == 2 and made["branch_gain"] == 0.3
    assert made["is_causal"] is True
    assert config(kind="encoder", head=None).block_arguments()["is_causal"] is False


GAIN = st.floats(-2, 2) | st.integers(-2, 2)


@st.composite
def configs(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    kind, head = draw(
        st.sampled_from(
            [
                ("decoder", "causal_lm"),
                ("encoder", "masked_lm"),
                ("decoder", "token_classification"),
                ("encoder", None),
            ]
        )
    )
    per_head = GAIN | st.lists(GAIN, min_size=heads, max_size=heads)
    options = {
        "vocab_size": draw(st.integers(1, 10**6)),
        "width": heads * 2 * draw(st.integers(1, 8)),
        "depth": draw(st.integers(1, 1000)),
        "heads": heads,
        "kind": kind,
        "head": head,
        "tie_embeddings": draw(st.booleans()) and head in ("causal_lm", "masked_lm"),
    }
    shared = {
        "num_labels": st.integers(1, 100),
        "positions": st.sampled_from(["learned", "rotary", "none"]),
        "norm": st.sampled_from([None, "rms", "layer"]),
        "final_norm": st.sampled_from([None, "rms", "layer"]),
        "mlp_ratio": st.integers(1, 4),
        "activation_checkpointing": st.booleans(),
    }
    shaped = {
        "branch_gain": st.floats(0, 1),
        "scale": st.sampled_from(["width", "standard", 0.25]),
        "center_gain": st.none() | per_head,
        "out_proj": st.sampled_from(["none", "orthogonal", "gaussian"]),
        "identity_gain": per_head,
        "softmax_gain": per_head,
        "gain_scheme": st.sampled_from(["fixed", "learn", "recover"]),
        "learned_gains": st.lists(
            st.sampled_from(["identity_gain", "softmax_gain", "center_gain"]), min_size=1
        ),
        "c_plus": st.floats(-0.5, 2),
        "trainable_slopes": st.booleans(),
    }
    method, has_skip, has_normalization = draw(st.sampled_from(ALLOWED))
    if method != "shaped" or has_skip:
        options |= {"has_skip": has_skip}
    if method != "shaped":
        options |= {"method": method, "has_normalization": has_normalization}
        shared["norm"] = shared["norm"] if has_normalization else st.none()
    optional = shared | (shaped if method == "shaped" else {})
    return options | draw(st.fixed_dictionaries({}, optional=optional))


@given(configs())
@settings(max_examples=60)
def test_config_round_trips(options):
    made = ShapedTransformerConfig(**options)
    assert ShapedTransformerConfig.from_dict(made.to_dict()) == made
    again = ShapedTransformerConfig.from_json(made.to_json())
    assert again == made and hash(again) == hash(made)
    assert json.loads(made.to_json())["vocab_size"] == options["vocab_size"]
    for name, value in options.items():
        found = getattr(made, name)
        assert (list(found) if isinstance(found, tuple) else found) == value, name


def test_config_is_frozen_and_draws_nothing():
    state = torch.get_rng_state()
    made = config(out_proj="orthogonal")
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.width = 32


@pytest.mark.parametrize(
    "error, options, message",
    [
        (ValueError, {"vocab_size": 0}, "vocab_size must be at least 1"),
        (TypeError, {"width": "16"}, "width must be an int, got '16'"),
        (ValueError, {"depth": 0}, "depth must be at least 1"),
        (ValueError, {"heads": 5}, "heads must divide width, 16, got 5"),
        (ValueError, {"num_labels": 0}, "num_labels must be at least 1"),
        (TypeError, {"max_length": 1.5}, "max_length must be an int"),
        (ValueError, {"kind": "both"}, "kind must be one of 'decoder', 'encoder', got 'both'"),
        (ValueError, {"head": "lm"}, "head must be one of 'causal_lm', 'masked_lm', 'token_cla"),
        (ValueError, {"kind": "encoder"}, 'head must not be "causal_lm" for kind="encoder"'),
        (ValueError, {"head": "masked_lm"}, 'head must not be "masked_lm" for kind="decoder"'),
        (ValueError, {"positions": "sine"}, "positions must be one of 'learned', 'rotary', 'none'"),
        (ValueError, {"rotary_base": 0.0}, "rotary_base must be greater than 0"),
        (ValueError, {"head_dim": 3}, 'head_dim must be even for positions="rotary"'),
        (
            ValueError,
            {"head": None, "tie_embeddings": True},
            "tie_embeddings needs a language-model head, got head=None",
        ),
        (TypeError, {"tie_embeddings": "no"}, "tie_embeddings must be True or False"),
        (TypeError, {"activation_checkpointing": 1}, "activation_checkpointing must be True or"),
        (ValueError, {"final_norm": "none"}, "final_norm must be one of None, 'rms', 'layer'"),
        (ValueError, {"norm": "none"}, "norm must be one of None, 'rms', 'layer'"),
        (ValueError, {"identity_gain": (1.0,)}, "identity_gain must be a number or 2 numbers"),
        (ValueError, {"branch_gain": -0.1}, "branch_gain must be from 0 to 1"),
        (ValueError, {"skip_gain": 1.0}, "skip_gain must satisfy"),
        (ValueError, {"mlp_ratio": 0.3}, "mlp_ratio times width"),
        (ValueError, {"gain_scheme": "none"}, "gain_scheme must be one of"),
        (ValueError, {"impl": "cuda"}, "impl must be one of"),
        (TypeError, {"trainable_slopes": 0}, "trainable_slopes must be True or False"),
    ],
)
def test_config_errors(error, options, message):
    with pytest.raises(error, match=message):
        config(**options)


def test_config_keys():
    values = config().to_dict()
    with pytest.raises(ValueError, match="values must have the fields .* unknown 'layers'"):
        ShapedTransformerConfig.from_dict(values | {"layers": 2})
    with pytest.raises(ValueError, match="values must have 'vocab_size', which has no default"):
        ShapedTransformerConfig.from_json('{"width": 16}')
    with pytest.raises(TypeError, match="config must be a ShapedTransformerConfig, got dict"):
        ShapedTransformer(values)


# The model


def test_model_is_embedding_blocks_norm_and_head(device):
    model = build(device, positions="learned", norm="rms", final_norm="layer", out_proj="gaussian")
    tokens = torch.randint(11, (3, 5)).to(device)
    x = (model.embedding.weight[tokens] + model.position_embedding.weight[:5]) / math.sqrt(2)
    for block in model.blocks:
        x = block(x)
    x = F.layer_norm(x, (WIDTH,), eps=1e-6)
    out = model(tokens)
    assert_equal(out.hidden_states, x, depth=2)
    assert_equal(out.logits, x @ model.head.weight.T, depth=2)
    assert out.loss is None


@pytest.mark.parametrize("kind, head", [("decoder", "causal_lm"), ("encoder", "masked_lm")])
def test_tied_head(kind, head, device):
    model = build(device, kind=kind, head=head, tie_embeddings=True)
    tokens = torch.randint(11, (3, 5)).to(device)
    out = model(tokens)
    expected = out.hidden_states @ model.embedding.weight.T / math.sqrt(WIDTH)
    assert_equal(out.logits, expected)
    assert model.head is None
    assert [name for name in model.state_dict() if "embedding" in name] == ["embedding.weight"]
    untied = build(device, kind=kind, head=head)
    assert set(untied.state_dict()) - set(model.state_dict()) == {"head.weight"}


def test_head_sizes(device):
    tokens = torch.randint(11, (3, 5)).to(device)
    out = build(device, head="token_classification", num_labels=4)(tokens)
    assert out.logits.shape == (3, 5, 4)
    out = build(device, head=None)(tokens)
    assert out.hidden_states.shape == (3, 5, WIDTH) and out.logits is None and out.loss is None
    with pytest.raises(ValueError, match="labels need a head"):
        build(device, head=None)(tokens, tokens)


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
def test_stream_starts_at_variance_one(positions, device):
    """V_ii = |x_i|^2 / width: its mean over tokens, within four standard errors."""
    options = {"vocab_size": 500, "width": 64, "positions": positions, "max_length": 500}
    model = build(device, **options, depth=1)
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(torch.randperm(500).to(device)[None])
    variance = inputs[0].square().mean(-1)
    assert (variance.mean() - 1).abs() <= 4 * math.sqrt(2 / 64 / 500)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_logits_start_at_variance_one(tie_embeddings, device):
    """Of a stream that does not know the embeddings, so that tied is as untied."""
    options = {"vocab_size": 400, "width": 64, "depth": 1, "tie_embeddings": tie_embeddings}
    model = build(device, **options, final_norm="rms")
    model.blocks[0].register_forward_hook(lambda *_: double(device, 1, 50, 64))
    logits = model(torch.randint(400, (1, 50)).to(device)).logits
    # Each column is a weight of the law times unit-variance rows: 400 of them, of 64 elements.
    assert (logits.square().mean() - 1).abs() <= 4 * math.sqrt(2 / 64 / 400 + 2 / 50 / 400)


def test_positions_are_seen(device):
    """One token everywhere: a decoder without positions cannot tell them apart."""
    tokens = torch.full((1, 6), 3, device=device)
    for positions, differs in (("learned", True), ("none", False)):
        logits = build(device, positions=positions, tau0=0.1)(tokens).logits
        assert (relative_error(logits[:, 1:], logits[:, :-1]) > 1e-3) == differs
    # Rotary positions act between tokens.
    model = build(device, positions="rotary", tau0=0.01, kind="encoder", head=None)
    tokens = torch.tensor([[1, 2, 3, 4]], device=device)
    hidden, swapped = (model(t).hidden_states for t in (tokens, tokens.flip(1)))
    assert relative_error(swapped.flip(1), hidden) > 1e-3


def test_attention_mask_hides_keys(device):
    model = build(device, kind="encoder", head="masked_lm", positions="learned", tau0=0.1)
    tokens = torch.randint(11, (2, 7)).to(device)
    mask = torch.ones(7, 7, device=device).tril().bool()
    decoder = build(device, positions="learned", tau0=0.1)
    decoder.load_state_dict(model.state_dict())
    assert_equal(model(tokens, attn_mask=mask).logits, decoder(tokens).logits, depth=2)


# Losses


def written_out_loss(logits, labels):
    """Mean over the labels that are not -100 of -log softmax."""
    terms = []
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != -100:
            terms.append(row.logsumexp(0) - row[label])
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    "kind, head",
    [
        ("decoder", "causal_lm"),
        ("encoder", "masked_lm"),
        ("encoder", "token_classification"),
        ("decoder", "token_classification"),
    ],
)
def test_loss(kind, head, device):
    model = build(device, kind=kind, head=head, num_labels=11)
    tokens, labels = torch.randint(11, (2, 3, 6)).to(device)
    labels[torch.rand(3, 6).to(device) < 0.3] = -100
    out = model(tokens, labels)
    if head == "causal_lm":
        expected = written_out_loss(out.logits[:, :-1], labels[:, 1:])
    else:
        expected = written_out_loss(out.logits, labels)
    assert_equal(out.loss, expected)
    assert torch.equal(model(tokens, labels.int()).loss, out.loss)


def test_loss_without_any_label_is_zero(device):
    model = build(device, kind="encoder", head="masked_lm")
    tokens = torch.randint(11, (2, 5)).to(device)
    loss = model(tokens, torch.full((2, 5), -100, device=device)).loss
    assert loss == 0.0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_loss_of_narrow_logits_is_float32(device):
    model = build(device, dtype=torch.bfloat16)
    tokens = torch.randint(11, (2, 5)).to(device)
    out = model(tokens, tokens)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert_equal(out.loss, written_out_loss(out.logits[:, :-1].float(), tokens[:, 1:]))


IDS = torch.zeros(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    "error, arguments, message",
    [
        (ValueError, [IDS.repeat(1, 2)], "tokens must have a length T of at most max_length = 6"),
        (TypeError, [IDS.float()], "tokens must be a Tensor of integers, got torch.float32"),
        (ValueError, [IDS[0]], r"tokens must have shape \(B, T\)"),
        (ValueError, [IDS, IDS[:, 1:]], r"labels must have shape \(2, 6\), got shape \(2, 5\)"),
        (TypeError, [IDS, IDS > 3], "labels must be a Tensor of integers, got torch.bool"),
    ],
)
def test_call_errors(error, arguments, message, device):
    model = build(device, positions="learned", max_length=6)
    with pytest.raises(error, match=message):
        model(*(x.to(device) for x in arguments))


@pytest.mark.parametrize("wrong", [11, -1, 2**40])
def test_ids_outside_of_the_vocabulary_are_an_error_on_a_cpu(wrong):
    model = build("cpu")
    tokens = torch.randint(11, (2, 6))
    outside = tokens.clone()
    outside[1, 4] = wrong
    got = rf"got {wrong} at \(1, 4\). Encode the text for this model"
    with pytest.raises(ValueError, match=f"tokens must be from 0 to 10, {got}"):
        model(outside)
    with pytest.raises(ValueError, match=f"labels must be from 0 to 10, or -100, {got}"):
        model(tokens, outside)
    outside[1, 4] = -100
    with pytest.raises(ValueError, match="tokens must be from 0 to 10, got -100"):
        model(outside)
    assert model(tokens, outside).loss.isfinite()
    labels = torch.tensor([[0, 1, 2, 0, 1, 0]] * 2)
    classifier = build("cpu", kind="encoder", head="token_classification", num_labels=2)
    with pytest.raises(ValueError, match=r"labels must be from 0 to 1, .*got 2 at \(0, 2\)"):
        classifier(tokens, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_may_be_of_any_integer_dtype(dtype, device):
    model = build(device)
    tokens = torch.randint(11, (2, 6)).to(device)
    expected, found = model(tokens, tokens), model(tokens.to(dtype), tokens.to(dtype))
    assert torch.equal(found.logits, expected.logits)
    assert found.loss == expected.loss


def test_activation_checkpointing_changes_no_bit(device):
    plain = build(device, gain_scheme="learn")
    model = build(device, gain_scheme="learn", activation_checkpointing=True)
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (2, 6)).to(device)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for m in (plain, model):
        loss = m(tokens, tokens, key_start=torch.tensor([0, 2], device=device)).loss
        gradients.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
    for expected, actual in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)
    assert len(calls) == 2  # once more in the backward
    with torch.no_grad():
        model(tokens)
    assert len(calls) == 3


def test_extra_repr(device):
    text = repr(build(device, tie_embeddings=True, branch_gain=0.6, norm="rms"))
    assert "kind='decoder', head='causal_lm', positions='rotary', tie_embeddings=True" in text
    assert "(0-1): 2 x ShapedBlock(" in text
    assert "skip_gain=0.8, branch_gain=0.6, norm='rms'" in text


@pytest.mark.parametrize("module", ["transformer", "parameter_groups"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"shaped_attn.nn.{module}"))
    assert result.attempted >= 5 and result.failed == 0


def test_deepcopy_is_independent(device):
    model = build(device, gain_scheme="recover", out_proj="orthogonal")
    other = copy.deepcopy(model)
    anneal_gains(other, 1.0)
    assert model.blocks[0].attention.gains()["identity_gain"] == 1.0
    other.reset_parameters(torch.Generator(device).manual_seed(3))
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


# Parameter groups


def test_parameter_groups_of_other_modules():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(7, 4)
            self.head = torch.nn.Linear(4, 7)
            self.head.weight = self.embedding.weight
            self.shared = torch.nn.Linear(4, 4)
            self.again = self.shared
            self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
            self.attn_mat_gain = torch.nn.Parameter(torch.ones(1, 2, 1, 1))

    module = Foreign()
    name = {id(p): n for n, p in module.named_parameters()}
    decayed, others = (
        sorted(name[id(p)] for p in group["params"]) for group in parameter_groups(module, 0.1)
    )
    assert decayed == ["shared.weight"]
    assert others == ["attn_mat_gain", "embedding.weight", "head.bias", "shared.bias"]


@pytest.mark.parametrize("weight_decay", [-0.1, math.nan, "0.1"])
def test_parameter_groups_error(weight_decay):
    with pytest.raises((ValueError, TypeError), match="weight_decay must be"):
        parameter_groups(ShapedBlock(WIDTH), weight_decay)
