"""Tiles loaded by tensor descriptors, and which tensors can have one."""

import dataclasses

import pytest
import torch
from attention_calls import triton_attention

from shaped_attn import ESPA
from shaped_attn.kernels import launch
from shaped_attn.kernels.configs import TileConfig, override_config
from shaped_attn.testing import Case, forward_backward, make_inputs

pytestmark = pytest.mark.usefixtures("poison")

TILES = TileConfig(block_t=32, block_s=32, num_warps=4, num_stages=1, sum_block=32)
POINTERS = dataclasses.replace(TILES, use_descriptors=False)
CASES = {
    "ragged_causal": (Case(2, 4, 2, 75, 90, 24, 40, is_causal=True), {}),
    "padding": (Case(2, 2, queries=50, head_dim=16, padding="both"), {}),
    "offset_before_keys": (Case(1, 2, queries=40, head_dim=32, is_causal=True, q_offset=-9), {}),
    "plain": (Case(1, 2, queries=130, head_dim=16), {"identity_gain": 0.0, "center_gain": 0.0}),
    "mask": (Case(1, 2, queries=35, head_dim=16, mask="random"), {}),
    "prior": (Case(1, 2, queries=50, head_dim=16, is_causal=True), {"prior": ESPA(0.3, 0.1)}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_descriptors_load_what_pointers_do(name, dtype, device):
    case, options = CASES[name]
    case = dataclasses.replace(case, dtype=dtype)
    inputs = dict(zip("qkv", make_inputs(case, device=device)[:3], strict=True))
    d_out = torch.randn(*inputs["q"].shape[:3], case.value_dim).to(device, dtype)
    if not case.has_own_keys:
        options = {"identity_gain": 0.0, **options}
    options = {"is_causal": case.is_causal, "q_offset": case.q_offset, **options}
    if case.padding:
        options["key_start"] = torch.tensor([0, 7], device=device)
        options["key_end"] = torch.tensor([50, 41], device=device)
    if case.mask:
        options["attn_mask"] = torch.rand(1, 2, 35, 35, device=device) < 0.7

    def run(tiles):
        with override_config(tiles):
            return forward_backward(triton_attention, inputs, d_out, **options)

    by_pointer, by_descriptor = run(POINTERS), run(TILES)
    for name, expected in by_pointer.items():
        assert torch.equal(by_descriptor[name], expected), name


def blocks(tensor, arch=90, tiles=TILES):
    return launch.Descriptors(tiles, arch, (tensor, 64)).blocks


def test_which_tensors_have_a_descriptor():
    x = torch.zeros(2, 3, 100, 72, dtype=torch.bfloat16)
    block = [[1, 1, 64, 128]]
    assert blocks(x) == block
    assert blocks(x, 100) == block and blocks(x, "interpreter") == block
    assert blocks(x.transpose(1, 2)) == block
    assert blocks(x[:, :, 1:, :64]) == [[1, 1, 64, 64]]
    none = [None]
    assert blocks(x, 80) == none and blocks(x, 120) == none and blocks(x, "gfx942") == none
    assert blocks(x, tiles=POINTERS) == none
    assert blocks(x.float()) == none
    assert blocks(x[..., 1:65]) == none  # starts between multiples of 16 bytes
    assert blocks(x[..., ::2]) == none  # last stride 2
    assert blocks(x[:, :1].expand(2, 3, 100, 72)) == none  # stride 0
    assert blocks(torch.zeros(2, 3, 100, 68, dtype=torch.bfloat16)) == none  # rows of 136 bytes
