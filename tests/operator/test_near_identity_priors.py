"""Priors near the identity, as layers of a deep schedule have them, in 16 bit."""

import pytest
import torch
from attention_calls import reference_attention, triton_attention

from shaped_attn import ESPA, USPA
from shaped_attn.kernels.configs import TileConfig, override_config
from shaped_attn.testing import Case, forward_backward, make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("poison")

LAYERS = 72
LIMIT = 5e-3
"""Of every relative error: rounding the result to bfloat16 takes about 1.7e-3."""

# Few, large tiles: the interpreter's cost is per operation.
TILES = TileConfig(block_t=128, block_s=64, num_warps=4, num_stages=1)

METHOD = (0.0, 1.0, 0.0)
SHAPED = (1.0, 1.0, 1.0)
CENTERED = (0.0, 1.0, 1.0)


def assert_keeps_its_gradients(prior, gains, device, *, is_causal=True, dtype=torch.bfloat16):
    case = Case(1, 1, queries=190, head_dim=64, dtype=dtype, is_causal=is_causal)
    inputs = make_inputs(case, logit_std=1.0, scale=0.125, device=device)[:3]
    d_out = torch.randn(inputs[2].shape).to(device, dtype)
    names = ("identity_gain", "softmax_gain", "center_gain")
    options = dict(zip(names, gains, strict=True)) | {"is_causal": is_causal, "scale": 0.125}
    tensors = dict(zip("qkv", inputs, strict=True))
    wide = {name: x.double() for name, x in tensors.items()}
    with override_config(TILES):
        actual = forward_backward(triton_attention, tensors, d_out, **options, prior=prior)
    golden = forward_backward(reference_attention, wide, d_out, **options, prior=prior)
    for name, value in actual.items():
        assert relative_error(value, golden[name]) < LIMIT, name


@pytest.mark.parametrize("gains", [METHOD, SHAPED, CENTERED], ids=str)
@pytest.mark.parametrize(
    "prior", [ESPA.schedule(LAYERS)[40], ESPA(0.05, 0.049), USPA.schedule(LAYERS)[-1]], ids=str
)
def test_a_layer(prior, gains, device):
    assert_keeps_its_gradients(prior, gains, device)


@pytest.mark.parametrize("gains", [METHOD, CENTERED], ids=str)
@pytest.mark.parametrize("prior", [ESPA.schedule(LAYERS)[-1], USPA.schedule(LAYERS)[-1]], ids=str)
def test_without_a_mask(prior, gains, device):
    assert_keeps_its_gradients(prior, gains, device, is_causal=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gains", [METHOD, SHAPED, CENTERED], ids=str)
@pytest.mark.parametrize("family", [ESPA, USPA])
def test_every_layer(family, gains, dtype, device):
    layers = family.schedule(LAYERS)
    for prior in layers if dtype == torch.bfloat16 else layers[::8]:
        assert_keeps_its_gradients(prior, gains, device, dtype=dtype)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("prior", [ESPA(0.2, 0.2), USPA(0.3, 0.3)], ids=str)
def test_tiles_of_zeros_off_the_diagonal(prior, is_causal, device):
    """Where A0 is the identity, the first tile of a row far down holds nothing but -inf."""
    case = Case(1, 1, queries=100, head_dim=16, is_causal=is_causal)
    q, k, v, _ = make_inputs(case, scale=0.25, device=device)
    out = triton_attention(q, k, v, prior=prior, is_causal=is_causal, scale=0.25)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=1e-6)
