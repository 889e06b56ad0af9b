"""Attention calls of other modules, replaced and put back."""

import copy
import doctest
import importlib
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from shaped_attn import shaped_attention
from shaped_attn.integrations.torch import replace_sdpa, replacing_sdpa
from shaped_attn.nn import ShapedAttention
from shaped_attn.testing import assert_within_budget

WIDTH, HEADS, TOKENS = 16, 4, 6
NEUTRAL = {"identity_gain": 0, "center_gain": 0, "scale": "standard"}
GAINS = {"identity_gain": 0.9, "softmax_gain": 1.1, "center_gain": 0.7}

# Taken by name, as some code has it.
sdpa = F.scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention as models write it; ``fused_attn`` and grouped heads like those of others."""

    def __init__(self, kv_heads=HEADS, **options):
        super().__init__()
        self.kv_heads, self.options = kv_heads, options
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * kv_heads) * WIDTH // HEADS)

    def project(self, x):
        sizes = (HEADS, self.kv_heads, self.kv_heads)
        heads = self.qkv(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(-2, -3)
        return heads.split(sizes, dim=-3)

    def forward(self, x, attn_mask=None):
        out = sdpa(*self.project(x), attn_mask=attn_mask, **self.options)
        return out.transpose(-2, -3).flatten(-2)


class Wrapper(nn.Module):
    """Calls its inner module, or a function, in a way to test."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


def draw(*shape):
    return torch.randn(*(shape or (2, TOKENS, WIDTH)))


def encoder(**options):
    options = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **options),
        2,
        enable_nested_tensor=False,
    )


def in_double(module, function):
    return function(copy.deepcopy(module).double())


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check_neutral(module, call, *arguments):
    """The module with neutral gains is what it was; otherwise it is something else."""
    expected = call(module, *arguments)
    golden = in_double(module, lambda m: call(m, *map(double, arguments)))
    with replace_sdpa(module, **NEUTRAL):
        found = call(module, *arguments)
    assert_within_budget(found, golden, expected, factor=2, name="neutral")
    with replace_sdpa(module, softmax_gain=0.5, **NEUTRAL):
        assert not torch.allclose(call(module, *arguments), expected)
    assert torch.equal(call(module, *arguments), expected)


def random_mask(*shape):
    return (torch.rand(*shape) < 0.6) | torch.eye(TOKENS, dtype=torch.bool)


# What it computes


@pytest.mark.parametrize(
    "mask",
    [
        None,
        random_mask(TOKENS, TOKENS),
        random_mask(2, 1, TOKENS, TOKENS),
        torch.tensor([[True] * 6, [False, False, True, True, True, True]])[:, None, None],
        torch.zeros(TOKENS, dtype=torch.bool).expand(TOKENS, -1),  # no query sees a key
        torch.randn(1, HEADS, TOKENS, TOKENS),
        torch.zeros(TOKENS, TOKENS).masked_fill(~random_mask(TOKENS, TOKENS), -torch.inf),
    ],
    ids=["none", "rows", "batch", "keys", "nothing", "bias", "infinite"],
)
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_neutral_gains_are_the_original(mask, kv_heads):
    module = Attention(kv_heads, enable_gqa=kv_heads != HEADS)
    if mask is not None and mask.dtype == torch.bool and not mask.any():
        x = draw()
        with replace_sdpa(module, **NEUTRAL):
            assert torch.equal(module(x, mask), torch.zeros_like(x))
        return
    check_neutral(module, lambda m, *a: m(*a), draw(), mask)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"dropout_p": 0.25}])
def test_neutral_gains_keep_the_options(options):
    def call(module, *arguments):
        torch.manual_seed(1)  # of the dropout
        return module(*arguments)

    check_neutral(Attention(**options), call, draw())


@pytest.mark.parametrize("scale", ["width", "standard", 0.2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_gains_are_those_of_shaped_attention(scale, is_causal, kv_heads):
    module = Attention(kv_heads, is_causal=is_causal, enable_gqa=True)
    number = {"width": 1 / (4 * HEADS**0.5), "standard": 0.5, 0.2: 0.2}[scale]
    gains = {**GAINS, "softmax_gain": torch.rand(HEADS)}
    options = {**gains, "scale": number, "is_causal": is_causal}

    def direct(module, x):
        out = shaped_attention(*module.project(x), **options, impl="reference")
        return out.transpose(1, 2).flatten(2)

    x = draw()
    golden = in_double(module, lambda m: direct(m, x.double()))
    with replace_sdpa(module, **gains, scale=scale):
        found = module(x)
    assert_within_budget(found, golden, direct(module, x), factor=2, name="shaped")


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_float_masks_are_priors(kv_heads):
    module, x = Attention(kv_heads, enable_gqa=True), draw()
    bias = torch.randn(HEADS, TOKENS, TOKENS).masked_fill(~random_mask(TOKENS, TOKENS), -torch.inf)

    def direct(module, x, bias):
        q, k, v = module.project(x)
        prior = bias.log_softmax(-1)
        out = shaped_attention(q, k, v, prior=prior, scale=0.5, **GAINS, impl="reference")
        return out.transpose(1, 2).flatten(2)

    golden = in_double(module, lambda m: direct(m, x.double(), bias.double()))
    with replace_sdpa(module, scale="standard", **GAINS):
        found = module(x, bias)
    assert_within_budget(found, golden, direct(module, x, bias), factor=2, name="prior")


def test_a_float_mask_of_zeros_and_infinities_is_the_boolean_one():
    module, x, mask = Attention().double(), draw().double(), random_mask(2, 1, TOKENS, TOKENS)
    with replace_sdpa(module):
        torch.testing.assert_close(
            module(x, torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)),
            module(x, mask),
        )


def test_dropout_acts_on_the_softmax_alone():
    module, x = Attention(dropout_p=0.5).double(), draw().double()
    q, k, v = module.project(x)
    torch.manual_seed(3)
    dropped = sdpa(q, k, v, dropout_p=0.5, scale=0.2)
    expected = 1.1 * dropped + 0.9 * v - 0.7 * v.mean(2, keepdim=True)
    with replace_sdpa(module, scale=0.2, **GAINS):
        torch.manual_seed(3)
        torch.testing.assert_close(module(x), expected.transpose(1, 2).flatten(2))


def test_zero_logits_give_the_values():
    module, x = Attention(), draw()
    with torch.no_grad():
        module.qkv.weight[: 2 * WIDTH] = 0
        module.qkv.bias[: 2 * WIDTH] = 0
    values = module.project(x)[2].transpose(1, 2).flatten(2)
    with replace_sdpa(module):
        torch.testing.assert_close(module(x), values)


def test_other_numbers_of_dimensions():
    module, x = Attention().double(), draw(3, 2, TOKENS, WIDTH).double()
    mask = random_mask(2, HEADS, TOKENS, TOKENS)
    with replace_sdpa(module, **GAINS):
        found = module(x, mask)  # (3, 2, heads, T, D)
        torch.testing.assert_close(found[1], module(x[1], mask))
        with pytest.raises(
            ValueError, match=r'query must have shape \(..., H, T, D\) for scale="w'
        ):
            module(x[0, 0])
    check_neutral(module, lambda m, *a: m(*a), x, mask)
    with replace_sdpa(module, scale="standard", **GAINS):
        torch.testing.assert_close(module(x[0, 0]), module(x[0, :1])[0])


def test_learned_gains_get_gradients():
    module = encoder()
    gains = {
        "identity_gain": nn.Parameter(torch.ones(HEADS)),
        "softmax_gain": nn.Parameter(torch.ones(())),
        "center_gain": nn.Parameter(torch.ones(HEADS)),
    }
    mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    for arguments in ({}, {"src_key_padding_mask": mask}):
        with replace_sdpa(module, **gains):
            loss = module(draw(), **arguments).square().sum()
        gradients = torch.autograd.grad(loss, list(gains.values()))
        for gain, gradient in zip(gains.values(), gradients, strict=True):
            assert gradient.shape == gain.shape and gradient.abs().min() > 0


def test_autocast_keeps_the_dtype():
    module, x = Attention(), draw()
    for mask in (None, torch.zeros(TOKENS, TOKENS)):
        with torch.autocast("cpu", torch.bfloat16), replace_sdpa(module):
            assert module(x, mask).dtype == torch.bfloat16


# nn.MultiheadAttention and nn.Transformer


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("mask", [None, "padding", "causal", "both"])
def test_encoders_take_the_replacement_in_training_and_in_their_fast_path(is_fast, mask):
    module, x = encoder().train(not is_fast), draw()
    padding = torch.tensor([[False] * TOKENS, [False] * 4 + [True] * 2])
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    arguments = {
        "mask": causal if mask in ("causal", "both") else None,
        "src_key_padding_mask": padding if mask in ("padding", "both") else None,
    }
    real = ~padding if mask in ("padding", "both") else torch.ones_like(padding)

    def call(module, x):
        return module(x, **arguments)[real]

    with torch.set_grad_enabled(not is_fast):
        check_neutral(module, call, x)
        with replace_sdpa(module):
            shaped = call(module, x)
    with replace_sdpa(module):  # by the way that is taken with gradients
        torch.testing.assert_close(call(module.train(), x), shaped)


def test_multihead_attention_is_shaped_attention_between_projections():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().eval()
    x = draw().double()
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    )
    expected = module.out_proj(shaped_attention(q, k, v, **GAINS).transpose(1, 2).flatten(2))
    with torch.no_grad(), replace_sdpa(module, **GAINS):
        found, weights = module(x, x, x, need_weights=False)
        assert weights is None
        torch.testing.assert_close(found, expected)
        first = x[0]
        alone = module(first, first, first, need_weights=False)[0]  # without a batch
        torch.testing.assert_close(alone, expected[0])


def test_multihead_attention_whose_values_lack_the_positions():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    x, positions = draw().double(), draw().double()
    both = x + positions
    weights = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(part, *parameters).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part, *parameters in zip((both, both, x), *weights, strict=True)
    )
    expected = module.out_proj(shaped_attention(q, k, v).transpose(1, 2).flatten(2))
    with replace_sdpa(module):
        torch.testing.assert_close(module(both, both, x, need_weights=False)[0], expected)


@pytest.mark.parametrize(
    "options", [{"kdim": 8, "vdim": 5}, {"add_bias_kv": True}, {"bias": False}]
)
def test_other_kinds_of_multihead_attention(options):
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    key, value = draw(9, 2, options.get("kdim", WIDTH)), draw(9, 2, options.get("vdim", WIDTH))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 4:] = True

    def call(module, query, key, value):
        return module(query, key, value, key_padding_mask=padding, need_weights=False)[0]

    check_neutral(module, call, draw(TOKENS, 2, WIDTH), key, value)


def test_the_whole_transformer_of_torch():
    module = nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, 0.0, batch_first=True)
    check_neutral(module, lambda m, *a: m(*a), draw(), draw(2, 9, WIDTH))
    with replace_sdpa(module.encoder):
        module(draw(), draw(2, 9, WIDTH))
    with (
        replace_sdpa(module),
        pytest.raises(ValueError, match=r"identity_gain must be 0 for cross-attention"),
    ):
        module(draw(), draw())


# Which calls are replaced, and for how long


def everything(module):
    return [
        (name, type(part), part.forward.__func__, dict(vars(part)))
        for name, part in module.named_modules()
    ]


def test_nothing_is_left_behind():
    module, x = encoder(), draw()
    before, state = everything(module), module.state_dict(keep_vars=True)
    functions = (sdpa, F.multi_head_attention_forward, nn.MultiheadAttention.forward)
    replaced = replace_sdpa(module)
    assert isinstance(module.layers[0], nn.TransformerEncoderLayer)
    assert type(module).__name__ == "TransformerEncoder"
    after = module.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[name] is state[name] for name in state)
    module(x)
    replaced.undo()
    assert str(everything(module)) == str(before)
    replaced.undo()
    with pytest.raises(ZeroDivisionError), replace_sdpa(module):
        1 / 0  # noqa: B018
    assert str(everything(module)) == str(before)
    assert functions == (
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        nn.MultiheadAttention.forward,
    )
    assert torch.overrides._len_torch_function_stack() == 0


def test_other_modules_and_threads_are_untouched():
    module, other, x = Attention(), Attention(), draw()
    other.load_state_dict(module.state_dict())
    expected = other(x)
    entered, leave, found = threading.Event(), threading.Event(), []

    def wait(inner, x):
        entered.set()
        assert leave.wait(60)
        return inner(x)

    outer = Wrapper(module, wait)
    with replace_sdpa(outer):
        thread = threading.Thread(target=lambda: found.append(outer(x)))
        thread.start()
        assert entered.wait(60)
        here = other(x)  # while the other thread is inside of the forward
        leave.set()
        thread.join()
        shaped = module(x)  # a submodule by itself
        assert torch.equal(other(x), expected)
    assert torch.equal(here, expected)
    assert torch.equal(found[0], shaped) and not torch.allclose(shaped, expected)


def test_submodules_and_their_other_callers_are_replaced_once():
    inner, x = Attention(), draw()
    with replace_sdpa(inner):
        expected = inner(x)
    outer = Wrapper(Wrapper(inner, lambda m, x: m(x)), lambda m, x: m(x))
    with replace_sdpa(outer):
        assert torch.equal(outer(x), expected) and torch.equal(inner(x), expected)


def test_attention_that_is_shaped_already_stays_as_it_is():
    module, x = ShapedAttention(WIDTH, HEADS, is_causal=True, impl="torch"), draw()
    outer = Wrapper(module, lambda m, x: m(x))
    expected = module(x)
    with replace_sdpa(outer):
        assert torch.equal(outer(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_modules_are_replaced_in_the_backward_too(use_reentrant):
    inner, x = Attention(), draw().requires_grad_()
    plain = Wrapper(inner, lambda m, x: m(x))
    outer = Wrapper(inner, lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant))
    gradients = []
    for module in (plain, outer):
        with replace_sdpa(module):
            loss = module(x).square().sum()
            loss.backward()
        gradients.append([x.grad, inner.qkv.weight.grad])
        x.grad = inner.qkv.weight.grad = None
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(found, expected)

    def attend(q, k, v):
        return sdpa(q, k, v)

    function = Wrapper(
        inner, lambda m, x: checkpoint(attend, *m.project(x), use_reentrant=use_reentrant)
    )
    with (
        replace_sdpa(function),
        pytest.raises(ValueError, match=r"torch.utils.checkpoint must be given a module"),
    ):
        function(x)


def test_copies_stay_replaced_and_cannot_be_pickled():
    module, x = Attention(), draw()
    with replace_sdpa(module):
        expected = module(x)
        other = copy.deepcopy(module)
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(module)
    with torch.no_grad():
        module.qkv.weight.zero_()
    assert torch.equal(other(x), expected)
    pickle.dumps(module)


def test_a_class_with_replaced_attention():
    kind = replacing_sdpa(Attention, **GAINS)
    assert issubclass(kind, Attention) and kind.__name__ == "Attention"
    module, plain, x = kind(is_causal=True), Attention(is_causal=True), draw()
    plain.load_state_dict(module.state_dict())
    with replace_sdpa(plain, **GAINS):
        expected = plain(x)
    assert torch.equal(module(x), expected)
    outer = Wrapper(module, lambda m, x: m(x))
    with pytest.raises(ValueError, match=r"module.inner must not be inside of a replacement"):
        replace_sdpa(outer)
    with pytest.raises(ValueError, match="kind must not be replaced already"):
        replacing_sdpa(kind)
    with pytest.raises(TypeError, match="kind must be a class of nn.Module"):
        replacing_sdpa(plain)
    with pytest.raises(TypeError, match=r"replacing_sdpa\(\) got an unexpected .* 'gain'"):
        replacing_sdpa(type(plain), gain=1.0)


def test_docstring_example():
    module = importlib.import_module("shaped_attn.integrations.torch")
    result = doctest.testmod(module)
    assert result.attempted >= 5 and result.failed == 0


# Compiling


@pytest.mark.parametrize("case", ["attention", "encoder", "padded"])
def test_compiled_without_a_graph_break(case):
    torch._dynamo.reset()
    module = Attention(is_causal=True) if case == "attention" else encoder()
    module, x = module.double(), draw().double()
    padding = torch.tensor([[False] * TOKENS, [False] * 4 + [True] * 2])

    def call(module, x):
        if case == "padded":
            return module(x, src_key_padding_mask=padding)[~padding]
        return module(x)

    parameters = list(module.parameters())
    plain = call(module, x)
    with replace_sdpa(module, **GAINS):
        expected = call(module, x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found = call(compiled, x)
        gradients = torch.autograd.grad(found.square().sum(), parameters)
        others = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, others)
    assert not torch.allclose(expected, plain)


def test_compiled_before_and_after_the_replacement():
    torch._dynamo.reset()
    module, x = Attention().double(), draw().double()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    plain = module(x)
    torch.testing.assert_close(compiled(x), plain)
    for outer in (module, compiled):
        with replace_sdpa(outer):
            shaped = module(x)
            torch.testing.assert_close(compiled(x), shaped)
        torch.testing.assert_close(compiled(x), plain)
    assert not torch.allclose(shaped, plain)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"identity_gain": "1"}, TypeError, "identity_gain must be a number, got '1'"),
        ({"center_gain": float("nan")}, ValueError, "center_gain must be finite, got nan"),
        ({"scale": "wide"}, ValueError, "scale must be one of 'width', 'standard', got 'wide'"),
        ({"scale": None}, TypeError, "scale must be a number"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_errors_of_arguments(options, error, message):
    with pytest.raises(error, match=message):
        replace_sdpa(Attention(), **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_modules_that_cannot_be_replaced():
    with pytest.raises(TypeError, match="module must be an nn.Module, got function"):
        replace_sdpa(F.relu)
    with pytest.raises(ValueError, match="got a Sequential of torch's other layers alone"):
        replace_sdpa(nn.Sequential(nn.Linear(2, 2)))
    module = Wrapper(Attention(), lambda m, x: m(x))
    module.inner.fused_attn = False
    with pytest.raises(ValueError, match=r"module.inner must call F.scaled_dot.*fused_attn=False"):
        replace_sdpa(module)
    module.inner.fused_attn = True
    with replace_sdpa(module):
        module(draw())
        module.inner.fused_attn = False
        with pytest.raises(ValueError, match="a Attention with fused_attn=False"):
            module(draw())
    del module.inner.fused_attn
    module.inner.forward = module.inner.forward
    with pytest.raises(ValueError, match=r"module.inner must have the forward of its class"):
        replace_sdpa(module)
    del module.inner.forward
    first = replace_sdpa(module.inner)
    with pytest.raises(ValueError, match=r"module.inner must not be inside of a replacement"):
        replace_sdpa(module)
    assert type(module) is Wrapper  # nothing was done by half
    kind = type(module.inner)
    module.inner.__class__ = Attention
    with pytest.raises(ValueError, match="module must have its Attention as replace_sdpa left it"):
        first.undo()
    module.inner.__class__ = kind
    first.undo()
    script = torch.jit.trace(Attention(), draw(), check_trace=False)
    with pytest.raises(ValueError, match="module must not be TorchScript"):
        replace_sdpa(script)


def test_errors_of_calls():
    x = draw()
    mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with replace_sdpa(mha):
        for module in (mha.train(), mha.eval()):
            with (
                torch.no_grad(),
                pytest.raises(ValueError, match="need_weights must be False: .* got True. Call"),
            ):
                module(x, x, x)
        with pytest.raises(ValueError, match="identity_gain must be 0 for cross-attention"):
            mha(x, x.clone(), x, need_weights=False)
    with replace_sdpa(mha, identity_gain=0):
        mha(x, x.clone(), x, need_weights=False)
    module = Attention(is_causal=True)
    with (
        replace_sdpa(module),
        pytest.raises(ValueError, match="attn_mask must be None for is_causal=True"),
    ):
        module(x, random_mask(TOKENS, TOKENS))
    q, k, v = Attention().project(draw(1, 9, WIDTH))
    decode = Wrapper(Attention(), lambda m, x: sdpa(q[:, :, -1:], k, v))
    with replace_sdpa(decode), pytest.raises(ValueError, match="with 1 queries and 9 keys. Pass"):
        decode(x)
    weights = (torch.zeros(3 * WIDTH, WIDTH), torch.zeros(3 * WIDTH))
    weights += (torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH))
    fused = Wrapper(
        nn.Identity(),
        lambda m, x: torch._native_multi_head_attention(x, x, x, WIDTH, HEADS, *weights),
    )
    with (
        replace_sdpa(fused),
        pytest.raises(ValueError, match="got _native_multi_head_attention. Use nn.Multihead"),
    ):
        fused(x)


@pytest.mark.parametrize("queries", [3, 6])
def test_cross_attention_without_identity(queries):
    q, k, v = draw(2, HEADS, queries, 8), draw(2, HEADS, 5, 8), draw(2, HEADS, 5, 7)
    module = Wrapper(nn.Identity(), lambda m, x: sdpa(x, k.to(x), v.to(x), is_causal=True))
    check_neutral(module, lambda m, x: m(x), q)
    with replace_sdpa(module, identity_gain=0):
        found = module(q.double())
    expected = shaped_attention(
        q.double(), k.double(), v.double(), identity_gain=0, is_causal=True, q_offset=0
    )
    torch.testing.assert_close(found, expected)
