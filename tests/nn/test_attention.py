"""`ShapedAttention` and its gains, against the formula written out head by head in float64."""

import math
from collections import Counter
from pathlib import Path

import modules
import pytest
import torch
import torch.nn.functional as F
from fresh_python import python
from modules import count

from shaped_attn.nn import (
    ShapedAttention,
    ShapingGains,
    anneal_gains,
    attention,
    rotary_table,
)
from shaped_attn.priors import ESPA, USPA, prior_matrix
from shaped_attn.testing import (
    assert_within_spread,
    relative_error,
    rounding_error,
    rounding_spread,
)

BATCH, LENGTH, WIDTH = 3, 7, 24
SKIP, BRANCH = 0.8, 0.6

VISIBILITY = {
    "full": {},
    "causal": {"is_causal": True},
    "left": {"key_start": torch.tensor([0, 2, 6])},
    "right": {"is_causal": True, "key_end": torch.tensor([7, 1, 4])},
    "mask": {"attn_mask": (torch.arange(49) % 3 > 0).view(7, 7)},
}


def visibility_of(name, device):
    """Whether it is causal, and the tensors on the device."""
    options = {n: x if x is True else x.to(device) for n, x in VISIBILITY[name].items()}
    return options.pop("is_causal", False), options


def visible_keys(device, module, key_start=None, key_end=None, attn_mask=None):
    """(B, heads, T, T) bool."""
    key = torch.arange(LENGTH, device=device)
    visible = torch.ones(BATCH, module.heads, LENGTH, LENGTH, dtype=torch.bool, device=device)
    if module.is_causal:
        visible = visible & (key <= key[:, None])
    if key_start is not None:
        visible = visible & (key >= key_start[:, None, None, None])
    if key_end is not None:
        visible = visible & (key < key_end[:, None, None, None])
    return visible if attn_mask is None else visible & attn_mask


def matrices(module, x, scale, gains=(1.0, 1.0, 1.0), turn=lambda x: x, **visibility):
    """A of every head, as its formula says, (B, heads, T, T)."""
    visible = visible_keys(x.device, module, **visibility)
    size, group = module.head_dim, module.heads // module.kv_heads
    found = []
    for h in range(module.heads):
        a, b, c = (gain[h] if isinstance(gain, torch.Tensor) else gain for gain in gains)
        g = h // group
        q = turn(x @ module.query.weight[h * size : (h + 1) * size].T)
        k = turn(x @ module.key.weight[g * size : (g + 1) * size].T)
        logits = (scale * (q @ k.mT)).masked_fill(~visible[:, h], -torch.inf)
        softmax = logits.softmax(-1).nan_to_num(0.0)
        prior = visible[:, h].to(x.dtype) / visible[:, h].sum(-1, keepdim=True).clamp(min=1)
        found.append(
            a * torch.eye(LENGTH, dtype=x.dtype, device=x.device) + b * softmax - c * prior
        )
    return torch.stack(found, dim=1)


def formula(module, x, residual, skip, branch, **options):
    size, group = WIDTH // module.heads, module.heads // module.kv_heads
    found = matrices(module, x, **options)
    heads = []
    for h in range(module.heads):
        g = h // group
        heads.append(found[:, h] @ (x @ module.value.weight[g * size : (g + 1) * size].T))
    out = torch.cat(heads, dim=-1)
    if module.out_proj is not None:
        out = out @ module.out_proj.weight.T
    return skip * residual + branch * out


def assert_equal(actual, expected, *, passes=1):
    """In that many passes through q or k, v, W_O and the sum over keys."""
    modules.assert_equal(actual, expected, sums=passes * (3 * WIDTH + LENGTH))


def build(device, heads=2, dtype=torch.float64, impl="torch", **options):
    return ShapedAttention(WIDTH, heads, dtype=dtype, impl=impl, **options).to(device)


def stream(device, dtype=torch.float64):
    return torch.randn(2, BATCH, LENGTH, WIDTH, dtype=dtype).to(device)


def width_scale(module, tau0=1.0):
    return 1 / (tau0 * math.sqrt(WIDTH * module.head_dim))


# The formula


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("visibility", VISIBILITY)
@pytest.mark.parametrize("out_proj", ["none", "gaussian", "orthogonal"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_the_formula(heads, out_proj, visibility, impl, device):
    is_causal, options = visibility_of(visibility, device)
    module = build(device, heads, out_proj=out_proj, is_causal=is_causal, tau0=0.25, impl=impl)
    x, residual = stream(device)
    out = module(x, residual, skip_gain=SKIP, branch_gain=BRANCH, **options)
    scale = width_scale(module, tau0=0.25)
    assert_equal(out, formula(module, x, residual, SKIP, BRANCH, scale=scale, **options))


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("head_dim", [1, 5, 16])
def test_grouped_heads_and_any_head_dim(head_dim, kv_heads, out_proj, device):
    module = build(
        device, 4, kv_heads=kv_heads, head_dim=head_dim, out_proj=out_proj, is_causal=True
    )
    assert module.query.weight.shape == (4 * head_dim, WIDTH)
    assert module.key.weight.shape == (kv_heads * head_dim, WIDTH)
    assert module.value.weight.shape == (kv_heads * 6, WIDTH)
    x, residual = stream(device)
    out = module(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    assert_equal(out, formula(module, x, residual, SKIP, BRANCH, scale=width_scale(module)))


@pytest.mark.parametrize(
    "scale, tau0, expected",
    [
        ("width", 1.0, 1 / math.sqrt(WIDTH * 12)),
        ("width", 0.5, 2 / math.sqrt(WIDTH * 12)),
        ("standard", 1.0, 1 / math.sqrt(12)),
        ("standard", 2.0, 0.5 / math.sqrt(12)),
        (0.3, 1.0, 0.3),
    ],
)
def test_scale(scale, tau0, expected, device):
    module = build(device, scale=scale, tau0=tau0)
    x, residual = stream(device)
    assert_equal(module(x, residual), formula(module, x, residual, 1.0, 1.0, scale=expected))


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_gains_per_head(out_proj, device):
    gains = {"identity_gain": (0.5, 1.5), "softmax_gain": [2.0, 0.3], "center_gain": (0.7, 0.0)}
    module = build(device, out_proj=out_proj, **gains)
    x, residual = stream(device)
    tensors = [torch.tensor(gain, dtype=torch.float64, device=device) for gain in gains.values()]
    expected = formula(module, x, residual, SKIP, BRANCH, scale=width_scale(module), gains=tensors)
    assert_equal(module(x, residual, skip_gain=SKIP, branch_gain=BRANCH), expected)


def test_center_gain_is_the_softmax_gain_unless_given(device):
    assert build(device, softmax_gain=0.3).gains()["center_gain"] == 0.3
    assert build(device, softmax_gain=(0.3, 0.2)).gains()["center_gain"].tolist() == [0.3, 0.2]
    assert build(device, softmax_gain=0.3, center_gain=0.0).gains()["center_gain"] == 0.0


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_without_residual(out_proj, device):
    module = build(device, out_proj=out_proj)
    x, residual = stream(device)
    expected = formula(module, x, 0 * residual, 1.0, BRANCH, scale=width_scale(module))
    assert_equal(module(x, branch_gain=BRANCH), expected)


def test_rotary_turns_queries_and_keys(device):
    """Against multiplication by exp(i angle), with pairs as complex numbers."""
    module = build(device, is_causal=True, scale="standard")
    x, residual = stream(device)

    def turn(x):
        position = torch.arange(LENGTH, dtype=torch.float64, device=device)[:, None]
        angle = position * 100.0 ** (-torch.arange(6, dtype=torch.float64, device=device) / 6)
        turned = torch.complex(x[..., :6], x[..., 6:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    rotary = rotary_table(LENGTH, 12, 100.0, dtype=torch.float64, device=device)
    out = module(x, residual, rotary=rotary)
    expected = formula(module, x, residual, 1.0, 1.0, scale=1 / math.sqrt(12), turn=turn)
    assert_equal(out, expected)
    assert relative_error(module(x, residual), expected) > 1e-3  # the positions are seen


@pytest.mark.parametrize("out_proj", ["none", "gaussian", "orthogonal"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradients_equal_those_of_the_formula(heads, out_proj, device):
    names = ("identity_gain", "softmax_gain", "center_gain")
    module = build(
        device,
        heads,
        kv_heads=max(1, heads // 2),
        is_causal=True,
        out_proj=out_proj,
        tau0=0.25,
        identity_gain=0.9,
        softmax_gain=1.2,
        center_gain=0.7,
        gain_scheme="learn",
        learned_gains=names,
    )
    x, residual = (x.requires_grad_() for x in stream(device))
    out = module(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    gains = [getattr(module.gains, name) for name in names]
    scale = width_scale(module, tau0=0.25)
    expected = formula(module, x, residual, SKIP, BRANCH, scale=scale, gains=gains)
    leaves = {"x": x, "residual": residual, **dict(module.named_parameters())}
    assert len(leaves) == 2 + 3 + (out_proj != "none") + 3
    # With this loss the sums behind the gradients of gains have no large terms that cancel.
    actual = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    wanted = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    for name, found, gradient in zip(leaves, actual, wanted, strict=True):
        assert gradient.norm() > 0, name
        assert_equal(found, gradient, passes=3)


# Other weights and priors than those of shaped attention


@pytest.mark.parametrize("out_proj", ["none", "gpt2"])
@pytest.mark.parametrize("value_proj", ["none", "identity", "gpt2"])
def test_values(value_proj, out_proj, device):
    """A module whose own W_V is the matrix by which ``value_proj`` multiplies x."""
    options = {"heads": 4, "out_proj": out_proj, "is_causal": True, "scale": "standard"}
    module = build(device, value_proj=value_proj, **options)
    written_out = build(device, **options)
    state = module.state_dict()
    eye = torch.eye(WIDTH, dtype=torch.float64, device=device)
    if value_proj == "none":
        assert module.value is None
        state["value.weight"] = eye
    elif value_proj == "identity":
        assert not module.value.weight.any()
        assert module.value_identity_gain == module.value_weight_gain == 1.0
        module.value.weight.data.copy_(torch.randn(WIDTH, WIDTH))
        module.value_identity_gain.data.fill_(0.5)
        module.value_weight_gain.data.fill_(0.3)
        weight = 0.5 * eye + 0.3 * module.value.weight
        state = {name: x for name, x in state.items() if "gain" not in name}
        state["value.weight"] = weight.detach()
    written_out.load_state_dict(state)
    x, residual = stream(device)
    gains = {"skip_gain": SKIP, "branch_gain": BRANCH}
    assert_equal(module(x, residual, **gains), written_out(x, residual, **gains))
    assert_equal(module.attention_matrix(x), written_out.attention_matrix(x))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("prior", [ESPA(0.7, 0.1), USPA(0.2, 0.6)], ids=["e_spa", "u_spa"])
def test_prior_of_an_attention(prior, is_causal, impl, device):
    gains = {"identity_gain": 0.9, "softmax_gain": 1.2, "center_gain": 0.7}
    module = build(device, prior=prior, is_causal=is_causal, impl=impl, scale="standard", **gains)
    matrix = prior_matrix(prior, LENGTH, is_causal=is_causal)[0].to(device)
    x, residual = stream(device)
    heads = []
    for rows in torch.arange(WIDTH, device=device).split(12):
        q, k, v = (x @ w.weight[rows].T for w in (module.query, module.key, module.value))
        weights = (q @ k.mT / math.sqrt(12) + matrix.log()).softmax(-1)
        mixed = 1.2 * matrix.sum(-1, keepdim=True) * weights - 0.7 * matrix
        heads.append(0.9 * v + mixed @ v)
    assert_equal(module(x, residual), residual + torch.cat(heads, dim=-1))
    assert f"prior={prior}, impl=" in repr(module)


# Where the residual is mixed in


@pytest.mark.parametrize("out_proj", ["gaussian", "orthogonal"])
def test_output_projection_takes_the_residual_in_its_epilogue(out_proj, device):
    module = build(device, out_proj=out_proj)
    x, residual = stream(device)
    plain = count(lambda: module(x))
    mixed = count(lambda: module(x, residual, skip_gain=SKIP, branch_gain=BRANCH))
    assert plain["mm"] == 4
    assert mixed == plain - Counter(mm=1) + Counter(addmm=1)


@pytest.mark.parametrize("branch_gain", [BRANCH, torch.tensor([0.6, 0.5], dtype=torch.float64)])
def test_operator_takes_the_residual_without_output_projection(branch_gain, monkeypatch, device):
    if isinstance(branch_gain, torch.Tensor):
        branch_gain = branch_gain.to(device)
    module = build(device, impl="reference")
    x, residual = stream(device)
    calls = []

    def record(*args, **options):
        calls.append((args, options))
        return args[3]

    monkeypatch.setattr(attention, "shaped_attention", record)
    out = module(x, residual, skip_gain=SKIP, branch_gain=branch_gain)
    ((_, _, _, taken), options) = calls[0]
    assert taken.data_ptr() == residual.data_ptr()
    assert torch.equal(out, residual)  # what the operator returns is the result
    assert options["skip_gain"] == SKIP and options["branch_gain"] is branch_gain
    assert options["impl"] == "reference"


def test_a_tensor_branch_gain_goes_into_the_operator(monkeypatch, device):
    module = build(device, out_proj="gaussian")
    x, residual = stream(device)
    expected = module(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    seen = []
    operator = attention.shaped_attention

    def record(*args, **options):
        seen.append(options.get("branch_gain", 1.0))
        return operator(*args, **options)

    monkeypatch.setattr(attention, "shaped_attention", record)
    gain = torch.full((2,), BRANCH, dtype=torch.float64, device=device, requires_grad=True)
    mixed = count(lambda: module(x, residual, skip_gain=SKIP, branch_gain=gain))
    assert mixed["addmm"] == 1 and seen == [gain]
    out = module(x, residual, skip_gain=SKIP, branch_gain=gain)
    assert_equal(out, expected)
    out.sum().backward()
    assert gain.grad.abs().min() > 0
    assert_equal(module(x, residual, skip_gain=SKIP, branch_gain=BRANCH), expected)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_tensor_skip_gain(out_proj, device):
    module = build(device, out_proj=out_proj)
    x, residual = stream(device)
    gain = torch.tensor(SKIP, dtype=torch.float64, device=device, requires_grad=True)
    out = module(x, residual, skip_gain=gain, branch_gain=BRANCH)
    assert_equal(out, module(x, residual, skip_gain=SKIP, branch_gain=BRANCH))
    (gradient,) = torch.autograd.grad((out * residual).sum(), gain)
    assert_equal(gradient, residual.square().sum())


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_a_wider_residual_stays_wide(out_proj, device):
    module = build(device, out_proj=out_proj, dtype=torch.bfloat16)
    x, residual = stream(device, torch.float32)
    x = x.bfloat16()
    out = module(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    assert out.dtype == torch.float32
    # Nothing else is rounded to bfloat16 than the branch.
    assert torch.equal(module(0 * x, residual, skip_gain=SKIP, branch_gain=BRANCH), SKIP * residual)
    branch = module(x)
    assert branch.dtype == torch.bfloat16
    error = relative_error(out - SKIP * residual, BRANCH * branch.float())
    assert error <= 2 * rounding_error(torch.bfloat16)


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_autocast_keeps_the_residual_wide(out_proj, device):
    module = build(device, out_proj=out_proj, dtype=torch.float32, gain_scheme="learn")
    x, residual = stream(device, torch.float32)
    residual.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        out = module(x, residual, skip_gain=SKIP, branch_gain=BRANCH)
        skip = module(0 * x, residual, skip_gain=SKIP, branch_gain=BRANCH)
    assert out.dtype == torch.float32
    assert torch.equal(skip, SKIP * residual)
    out.sum().backward()
    assert torch.equal(residual.grad, torch.full_like(residual, SKIP))
    assert all(p.grad.dtype == torch.float32 and p.grad.norm() > 0 for p in module.parameters())


# Gain schemes


def test_fixed_gains_are_numbers(device):
    module = build(device)
    assert module.gains() == {"identity_gain": 1.0, "softmax_gain": 1.0, "center_gain": 1.0}
    assert set(module.state_dict()) == {"query.weight", "key.weight", "value.weight"}


@pytest.mark.parametrize(
    "learned", [("identity_gain", "center_gain"), ("softmax_gain",), ["center_gain"]]
)
def test_learned_gains_are_parameters_per_head(learned, device):
    module = build(device, 4, gain_scheme="learn", learned_gains=learned, softmax_gain=(1, 2, 3, 4))
    parameters = dict(module.gains.named_parameters())
    assert set(parameters) == set(learned)
    starts = {"identity_gain": [1.0] * 4, "softmax_gain": [1.0, 2.0, 3.0, 4.0]}
    starts["center_gain"] = starts["softmax_gain"]
    for name, parameter in parameters.items():
        assert parameter.tolist() == starts[name]
    assert ("softmax_gain" in dict(module.gains.named_buffers())) == ("softmax_gain" not in learned)


def test_training_moves_the_learned_gains_alone(device):
    module = build(device, gain_scheme="learn")
    assert set(dict(module.gains.named_parameters())) == {"identity_gain", "center_gain"}
    x, residual = stream(device)
    optimizer = torch.optim.SGD(module.gains.parameters(), lr=0.1)
    module(x, residual).square().sum().backward()
    optimizer.step()
    gains = module.gains()
    assert all((gains[name] != 1.0).all() for name in ("identity_gain", "center_gain"))
    assert gains["softmax_gain"] == 1.0


@pytest.mark.parametrize("identity_gain", [1.0, (0.5, 2.0)])
def test_recover_goes_from_shaped_to_plain(identity_gain, device):
    options = {"is_causal": True, "scale": "standard", "identity_gain": identity_gain}
    module = build(device, gain_scheme="recover", **options)
    x, residual = stream(device)
    shaped = build(device, **options)
    shaped.load_state_dict(module.state_dict(), strict=False)
    assert_equal(module(x, residual), shaped(x, residual))

    anneal_gains(module, 0.25)
    start = torch.tensor(identity_gain, dtype=torch.float64, device=device).expand(2)
    gains = [0.75 * start, 1.0, 0.75]
    expected = formula(module, x, residual, 1.0, 1.0, scale=12**-0.5, gains=gains)
    assert_equal(module(x, residual), expected)

    anneal_gains(module, 1.0)
    gains = module.gains()
    assert (gains["identity_gain"] == 0).all() and (gains["center_gain"] == 0).all()
    q, k, v = (
        projection(x).view(BATCH, LENGTH, 2, 12).transpose(1, 2)
        for projection in (module.query, module.key, module.value)
    )
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_equal(module(x, residual), residual + plain.transpose(1, 2).flatten(2))

    anneal_gains(module, 0)
    assert_equal(module(x, residual), shaped(x, residual))


def test_a_gain_that_recover_starts_at_zero_saves_its_work(device):
    gains = build(device, gain_scheme="recover", identity_gain=0.0, center_gain=0.5).gains()
    assert gains["identity_gain"] == 0.0 and isinstance(gains["identity_gain"], float)
    assert gains["center_gain"].item() == 0.5


def test_annealing_is_part_of_the_state(device):
    module, other = (build(device, gain_scheme="recover") for _ in range(2))
    anneal_gains(module, 0.5)
    other.load_state_dict(module.state_dict())
    assert other.gains()["center_gain"].item() == 0.5
    other.reset_parameters()
    assert other.gains()["center_gain"].item() == 1.0


def test_annealing_reaches_all_attentions_of_a_tree(device):
    tree = torch.nn.ModuleList(
        [build(device, gain_scheme="recover"), build(device), build(device, gain_scheme="recover")]
    )
    anneal_gains(tree, 0.5)
    assert [float(part.gains()["identity_gain"]) for part in tree] == [0.5, 1.0, 0.5]


def test_annealing_does_not_recompile(device):
    torch._dynamo.reset()
    module = build(device, gain_scheme="recover", is_causal=True)
    x, residual = stream(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x, residual)
    with torch.compiler.set_stance("fail_on_recompile"):
        for fraction in (0.0, 0.3, 1.0):
            anneal_gains(module, fraction)
            assert_equal(compiled(x, residual), module(x, residual))
    torch._dynamo.reset()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf])
def test_fraction_outside_of_its_range(fraction, device):
    with pytest.raises(ValueError, match=r"fraction must be (from 0 to 1|finite), got"):
        anneal_gains(build(device, gain_scheme="recover"), fraction)


def test_nothing_to_anneal(device):
    with pytest.raises(ValueError, match='module must contain an attention with gain_scheme="rec'):
        anneal_gains(build(device, gain_scheme="learn"), 0.5)
    with pytest.raises(TypeError, match="fraction must be a number"):
        anneal_gains(build(device, gain_scheme="recover"), "half")


# The combined matrix


@pytest.mark.parametrize("visibility", VISIBILITY)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_matrix_equals_the_formula(kv_heads, visibility, device):
    is_causal, options = visibility_of(visibility, device)
    gains = (0.9, 1.2, 0.7)
    names = ("identity_gain", "softmax_gain", "center_gain")
    module = build(
        device,
        4,
        kv_heads=kv_heads,
        is_causal=is_causal,
        scale="standard",
        **dict(zip(names, gains, strict=True)),
    )
    x, _ = stream(device)
    found = module.attention_matrix(x, **options)
    assert found.shape == (BATCH, 4, LENGTH, LENGTH)
    assert_equal(found, matrices(module, x, scale=6**-0.5, gains=gains, **options))


def test_attention_matrix_of_many_tokens_is_what_multiplies_the_values(device):
    length = 2 * attention.MATRIX_COLUMNS + 3
    module = build(device, 1, is_causal=True, scale="standard")
    x = torch.randn(2, length, WIDTH, dtype=torch.float64).to(device)
    rotary = rotary_table(length, WIDTH, dtype=torch.float64, device=device)
    found = module.attention_matrix(x, rotary=rotary)
    assert found.shape == (2, 1, length, length)
    out = module(x, rotary=rotary)
    sums = 2 * WIDTH + 2 * length
    error = relative_error(found[:, 0] @ module.value(x), out)
    assert error <= sums * rounding_error(torch.float64)


# The fused kernels


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_triton_equals_the_reference(out_proj, device):
    kernel, reference = (
        ShapedAttention(
            32,
            2,
            out_proj=out_proj,
            is_causal=True,
            gain_scheme="learn",
            learned_gains=("identity_gain", "softmax_gain", "center_gain"),
            scale="standard",
            impl=impl,
            dtype=dtype,
            device=device,
        )
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    reference.load_state_dict(kernel.state_dict())
    x, residual = torch.randn(2, 1, 5, 32).to(device)

    def run(module, dtype):
        leaves = {"x": x, "residual": residual}
        leaves = {n: t.to(dtype, copy=True).requires_grad_() for n, t in leaves.items()}
        out = module(*leaves.values(), skip_gain=SKIP, branch_gain=BRANCH)
        leaves |= dict(module.named_parameters())
        gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    golden, spread = rounding_spread(lambda: run(reference, torch.float64), torch.float32)
    for name, found in run(kernel, torch.float32).items():
        assert_within_spread(found, golden[name], spread[name], name=name)
    # More columns than tokens: the kernels take 64 at once.
    sums = 32 + 16 + 5
    maps = kernel.attention_matrix(x).double(), reference.attention_matrix(x.double())
    assert relative_error(*maps) <= sums * rounding_error(torch.float32)


# Arguments


@pytest.mark.parametrize(
    "error, options, message",
    [
        (ValueError, {"width": 0}, "width must be at least 1, got 0"),
        (TypeError, {"width": 8.0}, "width must be an int, got 8.0"),
        (TypeError, {"heads": True}, "heads must be an int, got True"),
        (ValueError, {"heads": 3}, "heads must divide width, 8, got 3"),
        (ValueError, {"heads": 4, "kv_heads": 3}, "kv_heads must divide heads, 4, got 3"),
        (ValueError, {"head_dim": 0}, "head_dim must be at least 1"),
        (TypeError, {"is_causal": 1}, "is_causal must be True or False"),
        (ValueError, {"out_proj": "normal"}, "out_proj must be one of 'none', 'gaussian', 'orth"),
        (ValueError, {"query_proj": "orthogonal"}, "query_proj must be one of 'gaussian', 'gpt2'"),
        (ValueError, {"key_proj": "zero"}, "key_proj must be one of 'gaussian', 'gpt2'"),
        (ValueError, {"value_proj": "zero"}, "value_proj must be one of 'gaussian', 'orthogonal'"),
        (ValueError, {"value_proj": "none", "kv_heads": 1}, "kv_heads must be heads, 2, for value"),
        (TypeError, {"prior": "e_spa"}, "prior must be an ESPA, a USPA or None, got str"),
        (ValueError, {"impl": "cuda"}, "impl must be one of 'auto', 'triton'"),
        (ValueError, {"scale": "depth"}, "scale must be one of 'width', 'standard', got 'depth'"),
        (TypeError, {"scale": None}, "scale must be a number, got None"),
        (ValueError, {"scale": math.nan}, "scale must be finite, got nan"),
        (ValueError, {"scale": 0.1, "tau0": 2.0}, "tau0 must keep its default 1.0 unless scale"),
        (ValueError, {"tau0": 0.0}, "tau0 must be greater than 0"),
        (ValueError, {"tau0": -1.0}, "tau0 must be greater than 0, got -1.0"),
        (TypeError, {"identity_gain": "1"}, "identity_gain must be a number, got '1'"),
        (ValueError, {"softmax_gain": math.inf}, "softmax_gain must be finite, got inf"),
        (ValueError, {"center_gain": (1.0,)}, "center_gain must be a number or 2 numbers"),
        (ValueError, {"gain_scheme": "anneal"}, "gain_scheme must be one of 'fixed', 'learn', 're"),
        (
            ValueError,
            {"gain_scheme": "learn", "learned_gains": ()},
            "learned_gains must be a sequence of at least one of",
        ),
        (
            ValueError,
            {"gain_scheme": "learn", "learned_gains": "identity_gain"},
            "learned_gains must be a sequence of at least one of",
        ),
        (
            ValueError,
            {"gain_scheme": "learn", "learned_gains": ("skip_gain",)},
            "learned_gains must be one of 'identity_gain', 'softmax_gain'",
        ),
    ],
)
def test_argument_errors(error, options, message):
    with pytest.raises(error, match=message):
        ShapedAttention(**({"width": 8, "heads": 2} | options))


@pytest.mark.parametrize("out_proj", ["none", "gaussian"])
def test_call_errors(out_proj, device):
    module = build(device, out_proj=out_proj)
    x, residual = stream(device)
    with pytest.raises(ValueError, match=rf"x must have shape \(B, T, {WIDTH}\), got shape"):
        module(x[0])
    with pytest.raises(ValueError, match=rf"x must have shape \(B, T, {WIDTH}\), got shape"):
        module.attention_matrix(x[..., 1:])
    with pytest.raises(ValueError, match="residual must have (the )?shape"):
        module(x, residual[:1])
    with pytest.raises(ValueError, match="skip_gain acts on residual, which is None"):
        module(x, skip_gain=0.5)
    with pytest.raises(ValueError, match="rotary must have half as many angles as the head dim"):
        module(x, residual, rotary=rotary_table(LENGTH, 6, device=device))


def test_extra_repr(device):
    text = repr(
        build(device, 2, kv_heads=1, out_proj="orthogonal", gain_scheme="learn", is_causal=True)
    )
    assert "width=24, heads=2, kv_heads=1, head_dim=12, is_causal=True, scale=0.05893" in text
    assert "(out_proj): Projection(in_features=24, out_features=24, law=orthogonal)" in text
    assert "gain_scheme='learn', identity_gain=1.0 (learned), softmax_gain=1.0, center_" in text


def test_gains_stand_alone():
    gains = ShapingGains(2, identity_gain=torch.tensor([1.0, 2.0]), gain_scheme="recover")
    assert gains.start["identity_gain"] == (1.0, 2.0)
    assert gains()["identity_gain"].tolist() == [1.0, 2.0]


def test_import_of_the_package_leaves_the_modules_alone():
    code = (
        "import sys, shaped_attn; print(any(n.startswith('shaped_attn.nn') for n in sys.modules))"
    )
    root = str(Path(attention.__file__).resolve().parents[2])
    assert python("-c", code, path=[root]) == "False"
