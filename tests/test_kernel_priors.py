"""The hook through which a prior enters the kernels: a new prior is two functions and a test."""

import pytest
import torch
import triton
import triton.language as tl

from shaped_attn import reference
from shaped_attn.arguments import Gains
from shaped_attn.kernels.attention_bwd import attention_bwd
from shaped_attn.kernels.attention_fwd import attention_fwd
from shaped_attn.kernels.priors import Prior
from shaped_attn.testing import Case, make_inputs, relative_error

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
    visibility = {"is_causal": is_causal, "q_offset": 10, "key_start": None, "key_end": None}
    options = {**visibility, "attn_mask": None}
    hook = {"prior": DECAY, "prior_parameters": (rates.to(device),)}
    d_out = torch.randn(1, 2, 40, 16).to(dtype)

    tensors = [x.to(device) for x in (q, k, v)]
    saved = attention_fwd(*tensors, None, tuple(gains), **options, **hook, save_for_backward=True)
    found = attention_bwd(
        d_out.to(device),
        None,
        *tensors,
        None,
        tuple(gains),
        saved,
        **options,
        **hook,
        needs_residual=False,
        needs_gains=True,
        needs_scale=True,
    )

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    weights = [
        torch.full((2,), value, dtype=torch.float64, requires_grad=True)
        for value in (gains.identity, gains.softmax, gains.center, gains.branch, gains.scale)
    ]
    learnable = Gains(*weights[:3], 1.0, *weights[3:])
    log_prior = log_decay(rates, 40, 50, 10)
    out, lse = reference.attention(*leaves, None, learnable, **options, log_prior=log_prior)
    expected = torch.autograd.grad(out, [*leaves, *weights], d_out.double())
    assert relative_error(saved.out, out) < bound
    assert relative_error(saved.lse, lse) < bound
    for name, actual, golden in zip("qkv", found[:3], expected[:3], strict=True):
        assert relative_error(actual, golden) < bound, name
    dots = [found.gains[i] for i in (0, 1, 2, 4)] + [found.scale]
    for i, (actual, golden) in enumerate(zip(dots, expected[3:], strict=True)):
        if i != 2 or center_gain:  # a fixed gain of zero leaves the centre out altogether
            # A sum over all elements, which cancels: the roundings of its terms do not.
            assert relative_error(actual, golden) < 4 * bound, f"gain {i}"
