"""The Hopper kernels on a Hopper GPU at real sizes: accuracy, repetitions, graphs."""

import itertools

import pytest
import torch
from attention_calls import GAINS, assert_right
from test_hopper_forward import gains_of, shared_by

from shaped_attn import shaped_attention
from shaped_attn.kernels import families, launch
from shaped_attn.testing import (
    Case,
    eager_attention,
    forward_backward,
    make_inputs,
    make_options,
    record_families,
    rounding_spread,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

BF16, FP16 = torch.bfloat16, torch.float16
LENGTH = 4059
CASES = {
    f"{head_dim}-{name}-{'causal' if is_causal else 'full'}": Case(
        1, 2, queries=LENGTH, head_dim=head_dim, dtype=dtype, is_causal=is_causal, **sizes
    )
    for head_dim, (dtype, name), (is_causal, sizes) in itertools.product(
        (64, 128),
        ((BF16, "bf16"), (FP16, "fp16")),
        (
            (True, {"residual_dtype": torch.float32}),
            (False, {"kv_heads": 1, "residual_dtype": BF16}),
        ),
    )
    if dtype == BF16 or sizes["residual_dtype"] == torch.float32
}
CASES["64-padded"] = Case(3, 2, 1, LENGTH, head_dim=64, dtype=BF16, is_causal=True, padding="both")
CASES["256-bf16-causal"] = Case(
    1, 2, 1, LENGTH, head_dim=256, dtype=BF16, is_causal=True, residual_dtype=BF16
)
CASES["128-padded"] = Case(3, 1, queries=LENGTH, head_dim=128, dtype=FP16, padding="both")


def call_of(case: Case, device, kind="learned", **draw) -> tuple[dict, dict, torch.Tensor]:
    """Tensors to differentiate, options, and a gradient of the output."""
    scale = case.head_dim**-0.5
    tensors = make_inputs(case, scale=scale, device=device, **draw)._asdict()
    options = make_options(case, device=device) | {"return_lse": True}
    for name, gain in gains_of(case, kind, device).items():
        where = tensors if isinstance(gain, torch.Tensor) else options
        where[name] = gain
    if "scale" in tensors:  # of the size that the inputs are drawn for
        tensors["scale"] = scale * (1 + 0.2 * torch.rand(case.heads, device=device))
    rows = (case.batch, case.heads, case.queries, case.value_dim)
    return tensors, options, torch.randn(rows, device=device).to(case.dtype)


def differentiate(call, function=shaped_attention, **others) -> dict[str, torch.Tensor]:
    tensors, options, d_out = call
    d_lse = d_out[..., 0].float()
    return forward_backward(function, tensors, d_out, d_lse, **options, **others)


@pytest.mark.parametrize("logit_std", [0.03, 1.0, 8.0])
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, logit_std, hopper, device):
    case = CASES[name]
    call = call_of(case, device, logit_std=logit_std)
    with hopper(), record_families() as ran:
        actual = differentiate(call, impl="triton")
    assert ran == {"hopper"}
    tensors, options, d_out = call
    exact = {key: None if x is None else x.double() for key, x in tensors.items()}
    golden, spread = rounding_spread(
        lambda: differentiate((exact, options, d_out), impl="reference"), case.dtype, draws=4
    )
    eager = differentiate(call, eager_attention)
    assert_right(actual, golden, eager, spread)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_a_thousand_repeats_are_equal(is_causal, head_dim, hopper, device):
    case = Case(1, 4, 2, 1061, head_dim=head_dim, dtype=BF16, is_causal=is_causal)
    call = call_of(case, device)
    with hopper():
        first = differentiate(call, impl="triton")
        different = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(1000):
            for key, value in differentiate(call, impl="triton").items():
                different += (value != first[key]).sum()
    # NaN differs from itself.
    assert different.item() == 0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_repeats_in_any_order_stay_close(is_causal, head_dim, hopper, device):
    """Without a fixed order the gradients of q and of the scale alone may have other bits."""
    case = Case(1, 4, queries=1061, head_dim=head_dim, dtype=BF16, is_causal=is_causal)
    call = call_of(case, device, "fixed")
    with hopper():
        pair = differentiate(call, impl="triton")
        first = differentiate(call, impl="triton", deterministic=False)
        for _ in range(100):
            again = differentiate(call, impl="triton", deterministic=False)
            for key, value in again.items():
                if key != "grad q":
                    assert torch.equal(value, first[key])
            # Each sum is that of one set of products, rounded once.
            error = (again["grad q"].float() - pair["grad q"].float()).norm()
            assert error <= torch.finfo(BF16).eps * pair["grad q"].float().norm()


@pytest.mark.parametrize("kind", ["learned", "plain"])
@pytest.mark.parametrize("name", ["64-bf16-causal", "128-bf16-full", "64-padded"])
def test_bits_do_not_depend_on_who_takes_a_tile(name, kind, hopper, device):
    tensors, options, _ = call_of(CASES[name], device, kind)
    with hopper():
        found = [shaped_attention(**tensors, **options, impl="triton")]
    for programs in (1, 3, 50):
        with shared_by(programs), hopper():
            found += [shaped_attention(**tensors, **options, impl="triton") for _ in range(3)]
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


@pytest.mark.parametrize("name", ["64-bf16-causal", "128-bf16-full", "128-padded"])
def test_the_families_agree(name, hopper, device):
    call = call_of(CASES[name], device)
    with hopper():
        ours = differentiate(call, impl="triton")
    with families.use_family("portable"), record_families() as ran:
        portable = differentiate(call, impl="triton")
    assert ran == {"portable"}
    eps = torch.finfo(CASES[name].dtype).eps
    for key, value in ours.items():
        if key.removeprefix("grad ") in GAINS:
            continue  # sums that cancel
        finite = value.isfinite()
        assert torch.equal(finite, portable[key].isfinite())
        a, b = value[finite].double(), portable[key][finite].double()
        # Weights, one factor of each product and the result are rounded in both.
        assert (a - b).norm() <= 4 * eps * b.norm(), key


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["64-bf16-causal", "128-bf16-full"])
def test_capture_in_a_cuda_graph(name, deterministic, hopper, device):
    tensors, options, d_out = call_of(CASES[name], device, "fixed")
    leaves = {key: x.requires_grad_() for key, x in tensors.items()}

    def step():
        out, lse = shaped_attention(**leaves, **options, impl="triton", deterministic=deterministic)
        return out, lse, *torch.autograd.grad(out, list(leaves.values()), d_out)

    with hopper():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for x in leaves.values():
                x.mul_(-0.5)
        graph.replay()
        expected = step()
    names = ("out", "lse", *leaves)
    for key, a, b in zip(names, captured, expected, strict=True):
        if key == "q" and not deterministic:
            error = (a.float() - b.float()).norm()
            assert error <= torch.finfo(BF16).eps * b.float().norm()
        else:
            assert torch.equal(a, b), key


def test_plans_are_used_again(hopper, device):
    """The second call of a signature goes straight to the compiled kernels."""
    call = call_of(Case(1, 2, queries=700, head_dim=64, dtype=BF16, is_causal=True), device)
    with hopper():
        first = differentiate(call, impl="triton")
        plans = dict(launch._plans)
        again = differentiate(call, impl="triton")
        assert launch._plans == plans and len(plans) == 2
    assert all(torch.equal(x, again[key]) for key, x in first.items())
