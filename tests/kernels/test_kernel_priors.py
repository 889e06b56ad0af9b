"""The hook through which a prior enters the kernels: a new prior is two functions and a test."""

import pytest
import torch
import triton
import triton.language as tl

from shaped_attn import reference
from shaped_attn.arguments import Gains
from shaped_attn.kernels.attention import Needs, attention_bwd, attention_fwd
from shaped_attn.kernels.priors import Prior
from shaped_attn.priors import PriorTable
from shaped_attn.testing import (
    Case,
    assert_within_spread,
    make_inputs,
    relative_error,
    rounding_spread,
)
from shaped_attn.visibility import Visibility

pytestmark = pytest.mark.usefixtures("poison")


@triton.jit
def _add_log2_decay(scores, positions, keys, first_key, head, parameters):
    return scores - tl.load(parameters[0] + head) * tl.abs(positions - keys)


@triton.jit
def _times_decay(values, positions, keys, first_key, head, parameters):
    return values * tl.math.exp2(-tl.load(parameters[0] + head) * tl.abs(positions - keys))


# A0_ij = 2**(-rate_h |p(i) - j|): rows that do not sum to 1, so D matters.
DECAY = Prior(add_log2=_add_log2_decay, times=_times_decay)


def log_decay(rates: torch.Tensor, queries: int, keys: int, q_offset: int) -> torch.Tensor:
    position = q_offset + torch.arange(queries)
    distance = (position[:, None] - torch.arange(keys)).abs()
    return -(rates.double()[:, None, None] * distance) * torch.log(torch.tensor(2.0).double())


@pytest.mark.parametrize("center_gain", [0.0, 0.8])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_a_prior_enters_forward_and_backward(dtype, bound, is_causal, center_gain, device):
    case = Case(1, 2, 1, queries=40, keys=50, head_dim=16, dtype=dtype, is_causal=is_causal)
    q, k, v, _ = make_inputs(case, scale=0.2, value_mean=1.0)
    rates = torch.tensor([0.1, 0.4])
    gains = Gains(identity=0.5, softmax=1.1, center=center_gain, branch=0.9, scale=0.2)
    visibility = Visibility(is_causal, q_offset=10)
    hook = {"prior": DECAY, "prior_parameters": (rates.to(device),)}
    d_out = torch.randn(1, 2, 40, 16).to(dtype)

    tensors = [x.to(device) for x in (q, k, v)]
    arguments = (*tensors, None, tuple(gains), visibility)
    saved = attention_fwd(*arguments, **hook, save_for_backward=True)
    needs = Needs(gains=True, scale=True)
    found = attention_bwd(d_out.to(device), None, *arguments, *saved[2:], **hook, needs=needs)

    prior = PriorTable("dense", log_decay(rates, 40, 50, 10))

    def exact():
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        weights = [torch.full((2,), x, dtype=torch.float64, requires_grad=True) for x in gains]
        out, lse = reference.attention(*leaves, None, Gains(*weights), visibility, prior=prior)
        leaves += [x for name, x in zip(Gains._fields, weights, strict=True) if name != "skip"]
        found = torch.autograd.grad(out, leaves, d_out.double())
        names = ("q", "k", "v", "identity", "softmax", "center", "branch", "scale")
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}

    golden, spread = rounding_spread(exact, dtype)
    for name in ("out", "lse"):
        assert relative_error(getattr(saved, name), golden[name]) < bound
    for name in "qkv":
        assert relative_error(getattr(found, name), golden[name]) < bound, name
    dots = dict(zip(Gains._fields, found.gains, strict=False)) | {"scale": found.scale}
    del dots["skip"]
    if not center_gain:
        del dots["center"]  # a fixed gain of zero leaves the centre out altogether
    for name, actual in dots.items():
        assert_within_spread(actual.cpu(), golden[name], spread[name], name=name)
