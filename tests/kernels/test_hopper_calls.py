"""Calls of `shaped_attention` that the Hopper kernels run from end to end."""

from unittest import mock

import pytest
import torch
from attention_calls import GAINS, assert_right

from shaped_attn import shaped_attention
from shaped_attn.kernels import launch
from shaped_attn.testing import (
    Case,
    eager_attention,
    forward_backward,
    make_inputs,
    rounding_spread,
)

pytestmark = pytest.mark.usefixtures("poison")

BF16 = torch.bfloat16
CASES = {
    "learned": Case(1, 2, 2, 150, 150, 128, is_causal=True, dtype=BF16, residual_dtype=BF16),
    "grouped": Case(1, 4, 2, 70, 90, 64, is_causal=True, dtype=BF16, residual_dtype=torch.float32),
}


def gradients(case: Case, function, convert, **options) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, scale=case.head_dim**-0.5)._asdict()
    generator = torch.Generator().manual_seed(1)
    for name, size in zip(GAINS, (0.7, 1.1, -0.9, 0.8, 0.6, case.head_dim**-0.5), strict=True):
        inputs[name] = size * (1 + 0.2 * torch.randn(case.heads, generator=generator))
    rows = (case.batch, case.heads, case.queries)
    return forward_backward(
        function,
        {name: convert(x) for name, x in inputs.items()},
        convert(torch.randn(*rows, case.value_dim, generator=generator).to(BF16)),
        convert(torch.randn(rows, generator=generator)),
        is_causal=True,
        return_lse=True,
        **options,
    )


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, hopper, device):
    case = CASES[name]
    with hopper():
        actual = gradients(case, shaped_attention, lambda x: x.to(device), impl="triton")

    def exact():
        return gradients(case, shaped_attention, lambda x: x.double(), impl="reference")

    golden, spread = rounding_spread(exact, case.dtype)
    eager = gradients(case, eager_attention, lambda x: x)
    assert_right(actual, golden, eager, spread)


def kernels_of(hopper, device, **options) -> list[str]:
    """Names of the kernels that forward and backward launch."""
    names = []
    run = launch.Launch.__call__

    def record(self, *varying):
        names.append(self.kernel.fn.__name__)
        run(self, *varying)

    with mock.patch.object(launch.Launch, "__call__", record), hopper():
        q, k, v = (torch.randn(1, 1, 70, 128, device=device).to(BF16) for _ in range(3))
        q.requires_grad_()
        shaped_attention(q, k, v, is_causal=True, impl="triton", **options).float().sum().backward()
    return names


def test_order_of_the_sums_is_fixed_unless_asked_otherwise(hopper, device):
    pair = kernels_of(hopper, device)
    assert pair[-2:] == ["attention_bwd_dkdv_kernel", "attention_bwd_dq_kernel"]
    fused = kernels_of(hopper, device, deterministic=False)
    assert fused[-2:] == ["attention_bwd_dkdv_kernel", "convert_dq_kernel"]
    torch.use_deterministic_algorithms(True)
    try:
        assert kernels_of(hopper, device, deterministic=False) == pair
    finally:
        torch.use_deterministic_algorithms(False)
