"""The methods of `ShapedTransformer`: what each is, written out by hand, and what it starts as."""

import copy
import dataclasses
import itertools
import math

import modules
import pytest
import torch
import torch.nn.functional as F
from modules import (
    ALL,
    ALLOWED,
    HEADS,
    KINDS,
    MODELS,
    VOCABULARY,
    WIDTH,
    WIRINGS,
    build,
    config,
    scatter,
    tokens,
)

from shaped_attn import shaped_attention
from shaped_attn.nn import (
    METHODS,
    MLP,
    Projection,
    ShapedBlock,
    ShapedTransformer,
    ShapedTransformerConfig,
    TransformerBlock,
    anneal_gains,
    attention,
    initializers,
    parameter_groups,
)
from shaped_attn.nn.activations import TailoredLeakyReLU, tat_slope
from shaped_attn.nn.config import SHAPED_FIELDS
from shaped_attn.priors import ESPA, USPA, prior_matrix
from shaped_attn.testing import (
    assert_within_spread,
    relative_error,
    rounding_error,
    rounding_spread,
)

USUAL = {
    "shaped": (True, False),
    "simplified": (False, True),
    "simplified_parallel": (False, True),
    "value_skipinit": (False, False),
    "u_spa": (False, False),
    "e_spa": (False, False),
    "pre_ln": (True, True),
}
SIMPLIFIED = ("simplified", "simplified_parallel")


def stream(device, *shape, dtype=torch.float64):
    return torch.randn(*shape, WIDTH, dtype=dtype).to(device)


def assert_equal(actual, expected, *, depth=1):
    """In that many blocks one after another."""
    sums = depth * 8 * WIDTH  # norms, q or k, v, W_O, both matrices of the MLP, sum over keys
    modules.assert_equal(actual, expected, sums=sums)


# Which there are


def test_names():
    assert set(METHODS) == set(WIRINGS) and METHODS[0] == "shaped"


@pytest.mark.parametrize("method", METHODS)
def test_wirings(method):
    for has_skip, has_normalization in ALL:
        if (has_skip, has_normalization) in WIRINGS[method]:
            made = config(method, has_skip, has_normalization)
            skip, norm = made.wiring()
            assert (skip, norm is not None) == (has_skip, has_normalization)
        else:
            message = rf'must be one of .* for method="{method}", got \({has_skip}, '
            with pytest.raises(ValueError, match=message):
                config(method, has_skip, has_normalization)
    skip, norm = config(method).wiring()
    assert (skip, norm is not None) == USUAL[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_wiring_given_in_part_is_the_usual_one_otherwise(method):
    for place, value in itertools.product((0, 1), (False, True)):
        fitting = [wiring for wiring in WIRINGS[method] if wiring[place] == value]
        given = [None, None]
        given[place] = value
        if not fitting:
            with pytest.raises(ValueError, match="has_skip, has_normalization must be one of"):
                config(method, *given)
            continue
        skip, norm = config(method, *given).wiring()
        found = (skip, norm is not None)
        assert found[place] == value
        # The other half is usual too, unless no wiring has both.
        usual = [wiring for wiring in fitting if wiring[1 - place] == USUAL[method][1 - place]]
        assert found in (usual or fitting)


@pytest.mark.parametrize("method", METHODS)
def test_kind_of_normalization(method):
    usual = "rms" if method in SIMPLIFIED else "layer"
    assert config(method, has_normalization=True).wiring()[1] == usual
    for norm in ("rms", "layer"):
        assert config(method, norm=norm).wiring()[1] == norm
        model = build("cpu", method, norm=norm)
        kind = {"rms": torch.nn.RMSNorm, "layer": torch.nn.LayerNorm}[norm]
        assert type(model.blocks[1].attention_norm) is kind
        assert (type(model.final_norm) is kind) == (method != "shaped")


@pytest.mark.parametrize(
    "error, options, message",
    [
        (ValueError, {"method": "post_ln"}, "method must be one of 'shaped', 'simplified', "),
        (TypeError, {"has_skip": 1}, "has_skip must be True or False"),
        (TypeError, {"has_normalization": "rms"}, "has_normalization must be True or False"),
        (
            ValueError,
            {"has_normalization": False, "norm": "rms"},
            "norm must be None for has_normalization=False, got 'rms'",
        ),
        (ValueError, {"norm": "batch"}, "norm must be one of None, 'rms', 'layer', got 'batch'"),
        (
            ValueError,
            {"method": "shaped", "has_skip": False, "branch_gain": 0.3},
            "branch_gain must keep its default for has_skip=False",
        ),
        (
            ValueError,
            {"method": "shaped", "has_skip": False, "skip_gain": 0.3, "branch_gain": 0.5},
            "skip_gain must keep its default for has_skip=False",
        ),
        (
            ValueError,
            {"method": "simplified", "kv_heads": 1},
            'kv_heads must be heads, 2, for value_proj="identity"',
        ),
        (ValueError, {"mlp_ratio": 0.3}, "mlp_ratio times width"),
    ],
)
def test_config_errors(error, options, message):
    with pytest.raises(error, match=message):
        config(**({"method": "e_spa"} | options))


def test_fields_of_shaped_are_for_shaped_alone():
    other = {
        "branch_gain": 0.3,
        "skip_gain": 0.5,
        "preserves_variance": False,
        "out_proj": "gaussian",
        "scale": "standard",
        "tau0": 2.0,
        "identity_gain": 0.5,
        "softmax_gain": (0.5, 0.5),
        "center_gain": 0.5,
        "gain_scheme": "learn",
        "learned_gains": ["softmax_gain"],
        "c_plus": 0.5,
        "c_minus": 0.5,
        "trainable_slopes": True,
    }
    assert set(other) == set(SHAPED_FIELDS)
    for name, value in other.items():
        with pytest.raises(ValueError, match=rf'{name} must keep its default for method="pre_ln"'):
            config("pre_ln", **{name: value})
    # What is left of the arguments of a block has a meaning for all.
    shared = {"norm", "heads", "kv_heads", "head_dim", "mlp_ratio", "width"}
    shared |= {"impl", "deterministic"}
    block = {f.name for f in dataclasses.fields(ShapedTransformerConfig)}
    block &= set(ShapedBlock.__init__.__annotations__)
    assert block == set(SHAPED_FIELDS) | shared


@pytest.mark.parametrize("method", ["shaped", "e_spa"])
def test_whether_sums_keep_their_order_reaches_the_operator(method, monkeypatch, device):
    seen = []

    def record(*args, **options):
        seen.append(options["deterministic"])
        return shaped_attention(*args, **options)

    monkeypatch.setattr(attention, "shaped_attention", record)
    for deterministic in (True, False):
        model = build(device, method, deterministic=deterministic)
        model(torch.zeros(1, 3, dtype=torch.long, device=device))
    assert seen == [True] * len(model.blocks) + [False] * len(model.blocks)


def test_shaped_is_the_block_of_its_own(device):
    for block in build(device, "shaped").blocks:
        assert type(block) is ShapedBlock
        assert (block.skip_gain, block.branch_gain) == (math.sqrt(0.75), 0.5)
    for block in build(device, "shaped", has_skip=False, has_normalization=True).blocks:
        assert (block.skip_gain, block.branch_gain, block.norm) == (0.0, 1.0, "layer")
        x = stream(device, 2, 5)
        read = F.layer_norm(x, (WIDTH,), eps=1e-6)
        z = block.attention(read)
        assert_equal(block(x), block.mlp(F.layer_norm(z, (WIDTH,), eps=1e-6)))


# They run, and what learns

NO_GRADIENT = {  # at the first step
    "shaped": set(),
    "simplified": {"key.weight", "value_weight_gain"},
    "simplified_parallel": {"key.weight", "value_weight_gain"},
    "value_skipinit": {"query.weight", "key.weight"},
    "u_spa": {"key.weight"},
    "e_spa": {"key.weight"},
    "pre_ln": set(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method, has_skip, has_normalization", ALLOWED)
def test_gradient_reaches_every_parameter(method, has_skip, has_normalization, kind, device):
    model = build(device, method, has_skip, has_normalization, kind=kind, head=KINDS[kind])
    x = tokens(device)
    model(x, x).loss.backward()
    lacking = set()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if parameter.grad.norm() == 0:
            lacking.add(name)
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(name.endswith(f"attention.{end}") for end in NO_GRADIENT[method])
    }
    assert lacking == expected
    # Once away from the start, none is left out.
    scatter(model).zero_grad()
    model(x, x).loss.backward()
    assert all(p.grad.norm() > 0 for p in model.parameters())


# Between its norms, Pre-LN without skips loses the differences of tokens, and learns later.
LEARNING = [
    x for x in MODELS if x.get("method") != "pre_ln" or x["has_skip"] or not x["has_normalization"]
]


@pytest.mark.parametrize("options", LEARNING, ids=str)
def test_learns_a_repeated_sequence(options, device):
    model = build(device, dtype=torch.float32, mlp_ratio=2, **options)
    text = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6], device=device).repeat(2, 4)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-2)
    losses = []
    for step in range(40):
        if model.config.gain_scheme == "recover":
            anneal_gains(model, min(1.0, step / 20))
        loss = model(text, text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Without knowledge of what came before, the next of these tokens is worth 1.9 nats.
    assert losses[0] > 1.9 and losses[-1] < 1.0


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
@pytest.mark.parametrize("method, has_skip, has_normalization", ALLOWED)
def test_decoder_does_not_see_later_tokens(method, has_skip, has_normalization, positions, device):
    model = scatter(build(device, method, has_skip, has_normalization, positions=positions))
    x = tokens(device, length=9)
    later = x.clone()
    later[:, 6:] = (later[:, 6:] + 1) % VOCABULARY
    before, after = model(x).logits, model(later).logits
    assert_equal(after[:, :6], before[:, :6], depth=2)
    assert relative_error(after[:, 6:], before[:, 6:]) > 0.01
    encoder = dataclasses.replace(model.config, kind="encoder", head="masked_lm")
    encoder = ShapedTransformer(encoder, dtype=torch.float64).to(device)
    encoder.load_state_dict(model.state_dict())
    before, after = encoder(x).logits, encoder(later).logits
    assert relative_error(after[:, :6], before[:, :6]) > 1e-3


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
@pytest.mark.parametrize(
    "method, kind", [*((method, "decoder") for method in METHODS), ("shaped", "encoder")]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, method, kind, positions, device):
    model = scatter(build(device, method, kind=kind, head=KINDS[kind], positions=positions))
    lengths = (9, 4, 6)
    texts = [tokens(device, 1, length) for length in lengths]
    padded, rows = tokens(device, 3, 9), []  # padding may be any token
    for b, text in enumerate(texts):
        rows.append(slice(9 - lengths[b], 9) if side == "left" else slice(lengths[b]))
        padded[b, rows[b]] = text[0]
    bound = {"key_start": 9 - torch.tensor(lengths, device=device)}
    if side == "right":
        bound = {"key_end": torch.tensor(lengths, device=device)}
    logits = model(padded, **bound).logits
    for b, text in enumerate(texts):
        assert_equal(logits[b : b + 1, rows[b]], model(text).logits, depth=4)
    if kind == "encoder":  # where it would be seen
        assert relative_error(model(padded).logits[1], logits[1]) > 1e-3


@pytest.mark.parametrize("method, has_skip, has_normalization", ALLOWED)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, method, has_skip, has_normalization, device):
    model = build(
        device,
        method,
        has_skip,
        has_normalization,
        kind=kind,
        head=KINDS[kind],
        dtype=torch.float32,
        width=32,
    )
    x = tokens(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = model(x, x)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if has_skip and not has_normalization:
        assert out.hidden_states.dtype == torch.float32  # the stream is not narrowed
    doubled = copy.deepcopy(model).double()
    for block in doubled.blocks:
        block.attention.impl = "reference"
    golden = doubled(x).hidden_states
    # Per block, one after another: input, norm, q or k, v, attention, W_O; MLP two more, and as
    # many weights.
    roundings = 2 * 2 * 8
    assert relative_error(out.hidden_states, golden) <= roundings * rounding_error(torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_model_compiles_to_one_graph_of_any_length(method, device):
    torch._dynamo.reset()
    model = scatter(build(device, method))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(length):
        x = tokens(device, 2, length)
        found = compiled(x, x)
        expected = model(x, x)
        assert_equal(found.logits, expected.logits, depth=2)
        gradients = [
            torch.autograd.grad(out.loss, list(model.parameters())) for out in (found, expected)
        ]
        for pair in zip(*gradients, strict=True):
            assert_equal(*pair, depth=6)

    check(6)
    check(9)  # from here on the length is a symbol
    with torch.compiler.set_stance("fail_on_recompile"):
        check(13)
    torch._dynamo.reset()


# Blocks, written out


def read(x, norm):
    """Normalise as the paper says, with the trained weights of ``norm``."""
    if norm is None:
        return x
    if isinstance(norm, torch.nn.LayerNorm):
        centered = x - x.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        return centered / (variance + 1e-6).sqrt() * norm.weight + norm.bias
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def shaped_heads(attention, x, values, is_causal, prior=None):
    """Concat_h (identity_gain I + softmax_gain D softmax(S + log A0) - center_gain A0) values_h."""
    length, size = x.shape[1], WIDTH // HEADS
    visible = torch.ones(length, length, dtype=torch.bool, device=x.device)
    visible = visible.tril() if is_causal else visible
    if prior is None:
        prior = visible / visible.sum(-1, keepdim=True, dtype=x.dtype)
    identity, softmax, center = (
        getattr(attention.gains, f"{name}_gain") for name in ("identity", "softmax", "center")
    )
    heads = []
    for h in range(HEADS):
        rows = slice(h * size, (h + 1) * size)
        q, k = (x @ w.weight[rows].T for w in (attention.query, attention.key))
        logits = q @ k.mT / math.sqrt(size) + prior.log()
        weights = prior.sum(-1, keepdim=True) * logits.softmax(-1)
        a, b, c = (g[h] if isinstance(g, torch.Tensor) else g for g in (identity, softmax, center))
        matrix = a * torch.eye(length, dtype=x.dtype, device=x.device) + b * weights - c * prior
        heads.append(matrix @ values[..., rows])
    return torch.cat(heads, dim=-1)


def perceptron(mlp, x, activation):
    return activation(x @ mlp.pre.weight.T) @ mlp.post.weight.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "method, has_normalization",
    [("simplified", True), ("simplified_parallel", True), ("simplified_parallel", False)],
)
def test_simplified_block_is_that_of_the_paper(method, has_normalization, layer, kind, device):
    """2311.01906 (12), (13) and figure 10, with (6) for the values of the first layer."""
    model = build(
        device,
        method,
        has_normalization=has_normalization,
        kind=kind,
        head=KINDS[kind],
        mlp_ratio=3,
    )
    block = scatter(model).blocks[layer]
    x = stream(device, 3, 7)
    attention = block.attention
    assert (block.attention_norm is None) == (not has_normalization and layer == 1)
    normed = read(x, block.attention_norm)
    values = normed
    if layer == 0:
        matrix = (
            attention.value_identity_gain * torch.eye(WIDTH, dtype=x.dtype, device=device)
            + attention.value_weight_gain * attention.value.weight
        )
        values = normed @ matrix.T
    else:
        assert attention.value is None
    assert attention.out_proj is None
    mixed = shaped_heads(attention, normed, values, kind == "decoder")
    mixed = block.attention_branch_gain * mixed
    if method == "simplified":
        seen = read(mixed, block.mlp_norm)
    else:
        assert block.mlp_norm is None
        seen = normed
    expected = mixed + block.mlp_branch_gain * perceptron(block.mlp, seen, torch.relu)
    assert_equal(block(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["value_skipinit", "u_spa", "e_spa"])
@pytest.mark.parametrize("has_skip, has_normalization", sorted(ALL))
def test_block_without_shortcuts_is_that_of_the_paper(
    has_skip, has_normalization, method, kind, device
):
    """2302.10322, papers.md (P8)."""
    depth, length = 16, 7
    options = {"kind": kind, "head": KINDS[kind], "depth": depth, "mlp_ratio": 2}
    model = scatter(build(device, method, has_skip, has_normalization, **options))
    schedule = {"e_spa": ESPA.schedule, "u_spa": USPA.schedule}.get(method)
    slope = 0.0 if has_skip else tat_slope(depth)
    scale = math.sqrt(2 / (1 + slope**2))
    skip, branch = (0.98, math.sqrt(1 - 0.98**2)) if has_skip else (0.0, 1.0)
    for layer in (0, 5, 15):
        block = model.blocks[layer]
        attention, x = block.attention, stream(device, 3, length)
        prior = None
        if schedule:
            prior = prior_matrix(schedule(depth)[layer], length, is_causal=kind == "decoder")
            prior = prior[0].to(device)
        normed = read(x, block.attention_norm)
        values = normed @ attention.value.weight.T
        mixed = shaped_heads(attention, normed, values, kind == "decoder", prior)
        z = skip * x + branch * (mixed @ attention.out_proj.weight.T)
        expected = skip * z + branch * scale * perceptron(
            block.mlp, read(z, block.mlp_norm), lambda h: F.leaky_relu(h, slope)
        )
        assert_equal(block(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_skip, has_normalization", sorted(ALL))
def test_pre_ln_block_is_the_standard_one(has_skip, has_normalization, kind, device):
    model = build(
        device, "pre_ln", has_skip, has_normalization, kind=kind, head=KINDS[kind], mlp_ratio=4
    )
    block = scatter(model).blocks[1]
    x = stream(device, 3, 7)
    attention = block.attention
    normed = read(x, block.attention_norm)
    q, k, v = (
        (normed @ w.weight.T).view(3, 7, HEADS, -1).transpose(1, 2)
        for w in (attention.query, attention.key, attention.value)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=kind == "decoder")
    mixed = mixed.transpose(1, 2).flatten(2) @ attention.out_proj.weight.T
    skip, branch, scale = float(has_skip), 1.0, 1.0
    if not has_normalization:
        scale = math.sqrt(2)
        if has_skip:
            skip, branch = 0.98, math.sqrt(1 - 0.98**2)
    z = skip * x + branch * mixed
    mlp = perceptron(block.mlp, read(z, block.mlp_norm), torch.relu)
    assert_equal(block(x), skip * z + branch * scale * mlp)


def test_padding_without_a_mask_has_no_prior(device):
    """The prior of an encoder is that of all its tokens."""
    model = build(device, "e_spa", kind="encoder", head="masked_lm")
    with pytest.raises(ValueError, match="key_end"):
        model(tokens(device), key_end=torch.tensor([6, 4], device=device))


# How they start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_attention_matrix_at_the_start(method, kind, device):
    depth, length = 5, 20
    model = build(device, method, depth=depth, kind=kind, head=KINDS[kind])
    is_causal = kind == "decoder"
    x = stream(device, 2, length)
    identity = torch.eye(length, dtype=torch.float64, device=device)
    for layer, block in enumerate(model.blocks):
        if method in ("u_spa", "e_spa"):
            prior = {"u_spa": USPA, "e_spa": ESPA}[method].schedule(depth)[layer]
            expected = prior_matrix(prior, length, is_causal=is_causal).to(device)
        elif method == "pre_ln":  # near the uniform one: its logits have a deviation near 1e-2
            assert block.attention.gains()["identity_gain"] == 0
            continue
        else:
            expected = identity[None]
        found = block.attention.attention_matrix(x)
        error = (found - expected).abs().max()
        assert error <= length * rounding_error(torch.float64) * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", SIMPLIFIED)
def test_simplified_attention_starts_as_the_identity(method, kind, dtype, device):
    """The property that defines it, to machine precision."""
    model = build(device, method, kind=kind, head=KINDS[kind], dtype=dtype)
    for block in model.blocks:
        normed = block.attention_norm(stream(device, 3, 40, dtype=dtype))
        out = block.attention(normed, branch_gain=block.attention_branch_gain)
        # Softmax and centre cancel up to the rounding of two sums, each over at most 40 values.
        largest = normed.abs().max()
        assert (out - normed).abs().max() <= 2 * rounding_error(dtype) * largest
        assert relative_error(out, normed) <= rounding_error(dtype)


def correlations(x):
    kernel = x @ x.mT
    size = kernel.diagonal(dim1=-2, dim2=-1).sqrt()
    return kernel / size[..., :, None] / size[..., None, :]


@pytest.mark.parametrize("kind", KINDS)
class TestDepth36:
    depth, width, length = 36, 64, 32

    def network(self, device, method, kind):
        model = build(
            device,
            method,
            has_skip=False,
            has_normalization=False,
            width=self.width,
            heads=4,
            depth=self.depth,
            kind=kind,
            head=None,
        )
        frame = torch.linalg.qr(torch.randn(self.width, self.length, dtype=torch.float64)).Q
        x = math.sqrt(self.width) * frame.mT[None].to(device)
        return model.requires_grad_(False), x

    @pytest.mark.parametrize("method", ["u_spa", "e_spa"])
    def test_attention_keeps_the_tokens_on_target(self, method, kind, device):
        """S_l = A_l S_(l-1) A_l^T with square orthogonal W_V and W_O, (P7): exact at any width."""
        model, x = self.network(device, method, kind)
        for layer, block in enumerate(model.blocks, start=1):
            x = block.attention(x)
            prior = block.attention.prior
            target = prior.kernel(self.length)[0].to(device)
            # Sums of W_V, A and W_O behind an element, and those of the kernel.
            sums = layer * (2 * self.width + self.length) + self.width
            error = (x[0] @ x[0].mT / self.width - target).abs().max()
            assert error <= sums * rounding_error(torch.float64)
        assert prior.kernel(self.length)[0, 0, -1] < 0.9

    def test_vanilla_attention_collapses(self, kind, device):
        model, x = self.network(device, "pre_ln", kind)
        alone = x
        for block in model.blocks:
            x = block(x)
            alone = block.attention(alone)
        for end in (x, alone):
            assert correlations(end).min() > 0.999

    @pytest.mark.parametrize("method", ["u_spa", "e_spa", "value_skipinit"])
    def test_whole_network_keeps_tokens_apart(self, method, kind, device):
        """With MLPs, whose activation is tailored to leave correlations below 1."""
        model, x = self.network(device, method, kind)
        for block in model.blocks:
            x = block(x)
        assert correlations(x).min() < 0.999
        assert 1e-2 < x.square().mean() < 1e2


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_by_hand():
    """Of a block: 4 n^2 + 2 n h for pre_ln, 2 n^2 + 2 n h simplified, and n^2 in its layer 1."""
    n, hidden = WIDTH, 4 * WIDTH
    gains = 3 * HEADS + 2
    expected = {
        "pre_ln": [4 * n**2 + 2 * n * hidden + 4 * n] * 2,
        "simplified": [
            2 * n**2 + 2 * n * hidden + 2 * n + gains + first for first in (n**2 + 2, 0)
        ],
        "simplified_parallel": [
            2 * n**2 + 2 * n * hidden + n + gains + first for first in (n**2 + 2, 0)
        ],
        "value_skipinit": [4 * n**2 + 2 * n * hidden + 2 * HEADS] * 2,
        "u_spa": [4 * n**2 + 2 * n * hidden] * 2,
        "e_spa": [4 * n**2 + 2 * n * hidden] * 2,
    }
    for method, counts in expected.items():
        model = build("cpu", method, mlp_ratio=4)
        assert [count(block) for block in model.blocks] == counts, method


def test_parameter_counts_of_the_paper():
    """2311.01906: 167M parameters with Pre-LN, 146M simplified, in 18 blocks of width 768."""
    counts = {}
    for method in ("pre_ln", *SIMPLIFIED):
        paper = config(
            method,
            vocab_size=50_000,
            width=768,
            depth=18,
            heads=12,
            mlp_ratio=4,
            positions="learned",
            max_length=1024,
            tie_embeddings=True,
        )
        counts[method] = count(ShapedTransformer(paper, device="meta"))
    assert counts["pre_ln"] == 166_645_248
    assert counts["simplified"] == 145_973_678
    assert [round(counts[m] / 1e6) for m in ("pre_ln", "simplified")] == [167, 146]
    assert counts["simplified_parallel"] == counts["simplified"] - 18 * 768


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_triton_is_within_the_spread_of_rounding(method, kind, device):
    """Loss and gradients of a whole network on the fused kernels, against float64."""
    batch = tokens(device, batch=1, length=20)

    def model_on(impl, dtype):
        torch.manual_seed(0)
        options = {"kind": kind, "head": KINDS[kind], "width": 32, "impl": impl}
        return scatter(build(device, method, dtype=torch.float32, **options)).to(dtype)

    def run(model):
        loss = model(batch, labels=batch).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        names = (name for name, _ in model.named_parameters())
        return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}

    exact = model_on("reference", torch.float64)
    golden, spread = rounding_spread(lambda: run(exact), torch.float32)
    for name, fused in run(model_on("triton", torch.float32)).items():
        assert_within_spread(fused, golden[name], spread[name], name=name)


@pytest.mark.parametrize("depth, start", [(18, 0.1), (72, 0.05)])
@pytest.mark.parametrize("method", SIMPLIFIED)
def test_simplified_branch_gains(method, depth, start):
    model = build("cpu", method, depth=depth)
    for block in model.blocks:
        assert isinstance(block.mlp_branch_gain, torch.nn.Parameter)
        assert block.attention_branch_gain.item() == 1.0
        assert math.isclose(block.mlp_branch_gain.item(), start)
        assert block.attention_skip_gain is None
        assert block.mlp_skip_gain == (1.0 if method == "simplified" else None)
        gains = dict(block.attention.gains.named_parameters())
        assert {name: gain.tolist() for name, gain in gains.items()} == dict.fromkeys(
            ("identity_gain", "softmax_gain", "center_gain"), [1.0] * HEADS
        )


def test_final_norm():
    kinds = {}
    for method, has_skip, has_normalization in ALLOWED:
        norm = build("cpu", method, has_skip, has_normalization).final_norm
        kinds[method, has_skip, has_normalization] = type(norm).__name__
    for (method, _, has_normalization), kind in kinds.items():
        expected = "LayerNorm" if has_normalization else "NoneType"
        if method in SIMPLIFIED:
            expected = "RMSNorm" if has_normalization else "LayerNorm"
        assert kind == ("NoneType" if method == "shaped" else expected), method
    assert type(build("cpu", "e_spa", final_norm="rms").final_norm) is torch.nn.RMSNorm


LAWS = {  # W_Q, W_K, W_V, W_O, both of the MLP
    "simplified": ["zero", "gpt2", "zero", None, "gpt2"],
    "simplified_parallel": ["zero", "gpt2", "zero", None, "gpt2"],
    "value_skipinit": ["zero", "gaussian", "orthogonal", "orthogonal", "orthogonal"],
    "u_spa": ["zero", "gaussian", "orthogonal", "orthogonal", "orthogonal"],
    "e_spa": ["zero", "gaussian", "orthogonal", "orthogonal", "orthogonal"],
    "pre_ln": ["gpt2"] * 5,
}


@pytest.mark.parametrize("method, has_skip, has_normalization", ALLOWED[4:])
def test_laws_of_the_weights(method, has_skip, has_normalization):
    model = build("cpu", method, has_skip, has_normalization, mlp_ratio=4, width=64)
    laws = LAWS[method]
    if method == "pre_ln" and not has_normalization:
        laws = ["gaussian"] * 5
    block = model.blocks[0]
    attention = block.attention
    found = [attention.query, attention.key, attention.value, attention.out_proj]
    found += [block.mlp.pre, block.mlp.post]
    for law, projection in zip([*laws, laws[-1]], found, strict=True):
        if law is None:
            assert projection is None
            continue
        assert projection.law.__name__ == law
        weight = projection.weight.detach()
        rows, columns = weight.shape
        if law == "zero":
            assert not weight.any()
        elif law == "orthogonal":
            small = weight @ weight.T if rows <= columns else weight.T @ weight
            error = small / max(1, rows / columns) - torch.eye(min(rows, columns))
            assert error.abs().max() <= 64 * rounding_error(torch.float64)
        else:
            variance = 0.02**2 if law == "gpt2" else 1 / columns
            error = weight.square().mean() / variance - 1
            assert error.abs() <= 5 * math.sqrt(2 / weight.numel())


@pytest.mark.parametrize("method, has_skip, has_normalization", ALLOWED[4:])
def test_activation_and_skips(method, has_skip, has_normalization):
    depth = 16
    block = build("cpu", method, has_skip, has_normalization, depth=depth).blocks[3]
    activation = block.mlp.activation
    if method in SIMPLIFIED or (method == "pre_ln" and has_normalization):
        assert type(activation) is torch.nn.ReLU
    else:
        assert type(activation) is TailoredLeakyReLU
        assert activation.slope == (0.0 if has_skip else tat_slope(depth, 0.9))
    if method not in SIMPLIFIED:
        skip, branch = None, 1.0
        if has_skip and method == "pre_ln" and has_normalization:
            skip = 1.0
        elif has_skip:
            skip, branch = 0.98, math.sqrt(1 - 0.98**2)
        assert (block.attention_skip_gain, block.attention_branch_gain) == (skip, branch)
        assert (block.mlp_skip_gain, block.mlp_branch_gain) == (skip, branch)


def test_few_layers_have_relu():
    """TAT has nothing to do where ReLU does not correlate tokens beyond its bound."""
    slopes = [
        build("cpu", "e_spa", depth=depth).blocks[0].mlp.activation.slope for depth in (1, 12, 13)
    ]
    assert slopes == [0.0, 0.0, tat_slope(13)] and tat_slope(13) > 0
    with pytest.raises(ValueError, match="eta must be below 0.897"):
        tat_slope(12)


# What holds for every module


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_every_tensor_has_a_law(options, device):
    model = build(device, **options)
    assert set(initializers(model)) == set(model.state_dict()) == set(model.initializers())
    assert set(initializers(model.blocks[0])) == set(model.blocks[0].state_dict())
    start = copy.deepcopy(model.state_dict())  # drawn with another seed
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    state = torch.get_rng_state()
    model.reset_parameters(torch.Generator(device).manual_seed(1))
    first = copy.deepcopy(model.state_dict())
    model.reset_parameters(torch.Generator(device).manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name
        is_constant = tensor.ndim < 2 or not start[name].any()
        assert torch.equal(tensor, start[name]) == is_constant, name
    empty = ShapedTransformer(model.config, device="meta", dtype=torch.float64)
    assert all(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
    empty = empty.to_empty(device=device)
    empty.reset_parameters(torch.Generator(device).manual_seed(1))
    x = tokens(device)
    assert torch.equal(empty(x).logits, model(x).logits)


def test_without_a_generator_weights_are_drawn_from_that_of_torch():
    torch.manual_seed(5)
    fresh = build("cpu").state_dict()
    model = build("cpu")
    torch.manual_seed(5)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


def names_of(groups, module):
    name = {id(p): n for n, p in module.named_parameters()}
    return [sorted(name[id(p)] for p in group["params"]) for group in groups]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_projections_decay_and_nothing_else(options, device):
    model = build(device, **options)
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, others = names_of(groups, model)
    assert sorted(decayed + others) == sorted(name for name, _ in model.named_parameters())
    projections = [name for name, part in model.named_modules() if isinstance(part, Projection)]
    assert decayed == sorted(f"{name}.weight" for name in projections)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in scatter(model).parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in others), name


def test_extra_repr():
    text = repr(build("cpu", "simplified"))
    assert "method='simplified', kind='decoder', head='causal_lm', positions='rotary'" in text
    assert "attention_branch_gain=1 (learned), mlp_branch_gain=0.3 (learned)" in text
    assert "attention_skip_gain=None, mlp_skip_gain=1, is_parallel=False" in text
    text = repr(build("cpu", "e_spa", has_skip=True))
    assert "mlp_branch_gain=0.198997, attention_skip_gain=0.98, mlp_skip_gain=0.98" in text
    assert "prior=ESPA(decay_in=inf, decay_out=" in text


# The parts


def test_transformer_block_without_a_half(device):
    mlp = MLP(WIDTH, 2, activation=torch.nn.Tanh(), law="orthogonal", dtype=torch.float64)
    mlp = mlp.to(device)
    block = TransformerBlock(None, mlp, mlp_skip_gain=0.5, mlp_branch_gain=2.0)
    x = stream(device, 2, 5)
    assert_equal(block(x), 0.5 * x + 2 * perceptron(mlp, x, torch.tanh))
    attention = build(device, "value_skipinit").blocks[0].attention
    block = TransformerBlock(attention, None, attention_branch_gain=2.0)
    assert_equal(block(x), x + 2 * attention(x))
    assert dict(block.laws()) == {}
