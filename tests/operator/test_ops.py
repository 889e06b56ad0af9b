"""The registered operator: schema, fakes, autograd, compilation, and its CPU implementation."""

import shutil
import textwrap

import pytest
import torch
import torch._dynamo.testing
from fresh_python import python
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import shaped_attn  # noqa: F401 (registers the operator)
from shaped_attn import ESPA, USPA, shaped_attention
from shaped_attn.testing import Case, make_inputs, relative_error, rounding_error

OP = torch.ops.shaped_attn.attention.default


def draw(device, dtype=torch.float32, requires_grad=False, length=20, **sizes):
    case = Case(1, 2, 1, queries=length, head_dim=16, dtype=dtype, **sizes)
    inputs = [x for x in make_inputs(case, device=device) if x is not None]
    return [x.requires_grad_(requires_grad) for x in inputs]


def gain(device, value=0.9, per_head=True):
    return torch.full((2,) if per_head else (), value, device=device, requires_grad=True)


# Tensors by name, to be made on a device, and fixed options.
OPCHECK_CALLS = {
    "defaults": ({}, {}),
    "causal_residual_gains": (
        {
            "softmax_gain": gain,
            "center_gain": lambda device: gain(device, 1.1, False),
            "scale": lambda device: gain(device, 0.2),
        },
        {"is_causal": True},
    ),
    "plain": ({}, {"fixed_identity_gain": 0.0, "fixed_center_gain": 0.0, "fixed_scale": 0.25}),
    "mask": ({"attn_mask": lambda device: torch.rand(1, 1, 20, 20).to(device) < 0.7}, {}),
    "key_range": (
        {"key_start": lambda device: torch.tensor([3], device=device)},
        {"is_causal": True},
    ),
    "geometric_prior": (
        {"prior": lambda device: torch.randn(2, 5).double().to(device).requires_grad_()},
        {"is_causal": True, "prior_form": "geometric"},
    ),
    "column_prior": (
        {"prior": lambda device: USPA(0.1, 0.5).table(20, device).values},
        {"is_causal": True, "prior_form": "column"},
    ),
    "plain_prior": (
        {"prior": lambda device: USPA(0.1, 0.5).table(20, device).values},
        {"is_causal": True, "prior_form": "column", "fixed_center_gain": 0.0},
    ),
    "dense_prior": ({"prior": lambda device: torch.randn(20, 20).to(device)}, {}),
    "inference": ({}, {"save_for_backward": False}),
    "any_order": ({}, {"is_causal": True, "deterministic": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPCHECK_CALLS)
def test_opcheck(name, dtype, device):
    tensors, options = OPCHECK_CALLS[name]
    tensors = {name: make(device) for name, make in tensors.items()}
    q, k, v = draw(device, dtype, requires_grad=name != "inference")
    residual = torch.randn(q.shape).to(device).requires_grad_(name != "inference")
    names = ("softmax_gain", "center_gain", "skip_gain", "branch_gain", "scale")
    gains = [tensors.get(n) for n in ("identity_gain", *names)]
    visibility = [tensors.get(n) for n in ("attn_mask", "key_start", "key_end", "prior")]
    arguments = (q, k, v, residual, *gains, *visibility)
    if name == "inference":
        arguments = tuple(None if x is None else x.detach() for x in arguments)
    torch.library.opcheck(OP, arguments, options)


def test_opcheck_of_a_permuted_dense_input(device):
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in draw(device))
    torch.library.opcheck(OP, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), {})


@pytest.mark.parametrize("is_masked", [False, True])
def test_opcheck_of_head_dims_that_are_padded(is_masked, device):
    q = torch.randn(1, 2, 9, 5).to(device).requires_grad_()
    k = torch.randn(1, 2, 9, 5).to(device).requires_grad_()
    v = torch.randn(1, 2, 9, 11).to(device).requires_grad_()
    mask = (torch.rand(1, 1, 9, 9) < 0.7).to(device) if is_masked else None
    torch.library.opcheck(OP, (q, k, v), {"attn_mask": mask})


@pytest.mark.parametrize("name", ["defaults", "mask", "geometric_prior"])
def test_the_fake_of_the_backward_has_its_strides(name, device):
    """Compiled code relies on them: of a learned prior they once were those of a transpose."""
    tensors, options = OPCHECK_CALLS[name]
    tensors = {name: make(device).detach() for name, make in tensors.items()}
    q, k, v = draw(device)
    out, lse, *saved = OP(q, k, v, **tensors, **options)
    torch.library.opcheck(
        torch.ops.shaped_attn.attention_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), q, k, v),
        {
            **tensors,
            **options,
            **dict(zip(("excess", "center", "row_stats"), saved, strict=True)),
            "needs_gains": True,
            "needs_scale": True,
            "needs_prior": "prior" in tensors,
        },
        test_utils="test_faketensor",
    )


def attend(q, k, v, softmax_gain, scale):
    return shaped_attention(
        q, k, v, q, softmax_gain=softmax_gain, scale=scale, is_causal=True, impl="triton"
    )


def assert_same_kernels(found, expected):
    """Up to what compiled code rounds otherwise around the operator: sums of two gradients."""
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) <= 8 * rounding_error(torch.float32)


def gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler",
)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)]
)
def test_compile_fullgraph(backend, device):
    inputs = [*draw(device), gain(device), gain(device, 0.3, False)]
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    assert_same_kernels(gradients(compiled, *inputs), gradients(attend, *inputs))


def test_compile_takes_one_tensor_for_all_three(device):
    x = draw(device)[0][:, :1]
    compiled = torch.compile(
        lambda x: shaped_attention(x, x, x, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    expected = shaped_attention(x, x, x, impl="triton")
    assert torch.equal(compiled(x), expected)


def attend_with_espa(q, k, v, decay, scale):
    prior = ESPA(3.0, decay)
    return shaped_attention(q, k, v, prior=prior, scale=scale, is_causal=True, impl="triton")


def attend_with_uspa(q, k, v, softmax_gain, scale):
    options = {"softmax_gain": softmax_gain, "scale": scale, "is_causal": True, "impl": "triton"}
    return shaped_attention(q, k, v, prior=USPA(0.1, 0.5), **options)


@pytest.mark.parametrize("function", [attend, attend_with_espa, attend_with_uspa])
def test_compile_does_not_specialise_the_length(function, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for length in (17, 20, 33):
        inputs = [*draw(device, length=length), gain(device), gain(device, 0.3, False)]
        assert_same_kernels(gradients(compiled, *inputs), gradients(function, *inputs))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_export_with_a_dynamic_length(device):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return shaped_attention(q, k, v, is_causal=True, impl="triton")

    length = torch.export.Dim("length", min=2, max=512)
    sizes = {2: length}
    program = torch.export.export(
        Attend(), tuple(draw(device)), dynamic_shapes=(sizes, sizes, sizes)
    )
    assert "shaped_attn.attention.default" in program.graph_module.code
    longer = draw(device, length=41)
    expected = shaped_attention(*longer, is_causal=True, impl="triton")
    assert torch.equal(program.module()(*longer), expected)


def test_activation_checkpointing(device):
    inputs = [*draw(device), gain(device), gain(device, 0.3, False)]
    expected = gradients(attend, *inputs)
    found = gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_selective_checkpointing_sees_the_operator(monkeypatch, device):
    from shaped_attn.kernels import attention

    calls = []
    launch = attention.attention_fwd
    monkeypatch.setattr(
        attention, "attention_fwd", lambda *a, **k: calls.append(1) or launch(*a, **k)
    )

    def save_attention(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == OP else CheckpointPolicy.PREFER_RECOMPUTE

    for context_fn, expected in (
        (None, 2),
        (lambda: create_selective_checkpoint_contexts(save_attention), 1),
    ):
        calls.clear()
        options = {} if context_fn is None else {"context_fn": context_fn}
        inputs = [*draw(device), gain(device), gain(device, 0.3, False)]
        gradients(lambda *x, o=options: checkpoint(attend, *x, use_reentrant=False, **o), *inputs)
        assert len(calls) == expected


def attend_plain(q, k, v):
    return shaped_attention(q, k, v, impl="triton")


def test_double_backward_is_refused(device):
    q, k, v = draw(device, requires_grad=True)
    out = attend_plain(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert torch.equal(grad, torch.autograd.grad(attend_plain(q, k, v).sum(), q)[0])
    with pytest.raises(RuntimeError, match=r'differentiated once.*Use impl="reference"'):
        grad.sum().backward()


def test_backward_without_saved_tensors_is_refused(device):
    q, k, v = draw(device, requires_grad=True)
    out = OP(q, k, v, save_for_backward=False)[0]
    with pytest.raises(RuntimeError, match="save_for_backward must be True"):
        out.sum().backward()


def test_nothing_is_saved_for_inference(monkeypatch, device):
    from shaped_attn.kernels import attention

    saved = []
    launch = attention.attention_fwd

    def record(*args, save_for_backward, **kwargs):
        saved.append(save_for_backward)
        return launch(*args, save_for_backward=save_for_backward, **kwargs)

    monkeypatch.setattr(attention, "attention_fwd", record)
    q, k, v = draw(device, requires_grad=True)
    shaped_attention(q, k, v, impl="triton")
    shaped_attention(q.detach(), k.detach(), v.detach(), impl="triton")
    with torch.no_grad():
        shaped_attention(q, k, v, impl="triton")
    assert saved == [True, False, False]


def test_only_asked_gradients_are_returned(device):
    q, k, v = draw(device)
    softmax_gain = gain(device)
    out = shaped_attention(q, k, v, softmax_gain=softmax_gain, impl="triton")
    out.sum().backward()
    assert softmax_gain.grad.shape == (2,) and q.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_gains_have_their_dtype(dtype, device):
    q, k, v = draw(device)
    gains = {
        name: gain(device).detach().to(dtype).requires_grad_() for name in ("softmax_gain", "scale")
    }
    shaped_attention(q, k, v, **gains, impl="triton").sum().backward()
    assert all(g.grad.dtype == dtype and g.grad.abs().sum() > 0 for g in gains.values())


def test_flops(device):
    # 4 B H T S D forward and 2.5 times that backward; half of it if causal.
    q, k, v = draw(device, requires_grad=True)
    full = 4 * 1 * 2 * 20 * 20 * 16
    for is_causal, part in ((False, 1), (True, 2)):
        with FlopCounterMode(display=False) as counter:
            out = shaped_attention(q, k, v, is_causal=is_causal, impl="triton")
        assert counter.get_total_flops() == full // part
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 5 * full // 2 // part


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 3, 20, 16)}, "k must have a number of heads"),
        ({"v": torch.zeros(1, 1, 19, 16)}, "v must have the heads and keys of k"),
        ({"q": torch.zeros(1, 2, 30, 16)}, "identity_gain"),
        ({"softmax_gain": torch.ones(3)}, "softmax_gain"),
        ({"attn_mask": torch.ones(7, 20, dtype=torch.bool)}, "attn_mask"),
        ({"key_start": torch.zeros(2, dtype=torch.int32)}, "key_start"),
    ],
)
def test_direct_calls_are_checked(change, message, device):
    arguments = dict(zip("qkv", draw(device), strict=True))
    if isinstance(change.get("k"), torch.Tensor):
        change = change | {"v": change["k"]}
    arguments |= {name: x.to(device) for name, x in change.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.shaped_attn.attention(**arguments)


def test_meta_tensors_have_the_real_shapes(device):
    real = OP(*draw(device, torch.bfloat16))
    meta = OP(*(x.to("meta") for x in draw(device, torch.bfloat16)))
    for x, y in zip(real, meta, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_a_cpu_without_the_interpreter_runs_the_composite():
    """On a CPU the operator computes what impl="torch" does, with gradients and under opcheck."""
    script = """
        import torch, shaped_attn
        from shaped_attn import shaped_attention
        torch.manual_seed(0)
        q, k, v, r = (torch.randn(1, 2, 30, 16, dtype=torch.float64) for _ in range(4))
        gains = [torch.rand(2, dtype=torch.float64) for _ in range(6)]
        rates = torch.tensor([0.2, 0.3], dtype=torch.float64)
        leaves = [x.requires_grad_() for x in (q, k, v, r, *gains, rates)]
        prior = shaped_attn.ESPA(0.5, rates)
        table = prior.table(30)
        names = ("identity", "softmax", "center", "skip", "branch")
        names = [f"{name}_gain" for name in names] + ["scale"]
        options = {"is_causal": True, "prior_form": table.form}
        arguments = (*leaves[:10], None, None, None, table.values)
        out, lse, *_ = torch.ops.shaped_attn.attention(*arguments, **options)
        named = dict(zip(names, gains))
        expected, expected_lse = shaped_attention(
            q, k, v, r, **named, prior=prior, is_causal=True, return_lse=True, impl="reference")
        def loss(out, lse): return out.square().sum() + lse.sin().sum()
        found = torch.autograd.grad(loss(out, lse), leaves)
        wanted = torch.autograd.grad(loss(expected, expected_lse), leaves)
        torch.testing.assert_close(out, expected)
        for a, b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        op = torch.ops.shaped_attn.attention.default
        arguments = (*leaves[:10], None, None, None, table.values.detach().requires_grad_())
        torch.library.opcheck(op, arguments, options)
        try:
            shaped_attention(q.float(), k.float(), v.float(), impl="triton")
        except ValueError as error:
            assert "TRITON_INTERPRET" in str(error), error
        else:
            raise AssertionError("impl='triton' ran on a CPU without the interpreter")
        print("composite agrees")
    """
    said = python("-c", textwrap.dedent(script), TRITON_INTERPRET=None)
    assert said == "composite agrees"
