"""Which family of kernels runs a call, and what the families are given."""

import itertools

import pytest
import torch

from shaped_attn.kernels import attention, configs
from shaped_attn.kernels.attention import FAMILIES, Call, pick_family
from shaped_attn.kernels.priors import PRIORS
from shaped_attn.visibility import Visibility


def test_every_call_has_a_family():
    archs = (*configs.ARCHITECTURES, 89, 120, "interpreter")
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for arch, dtype, D, DV, weighed_by, T, S in itertools.product(
        archs, dtypes, (1, 64, 256), (8, 128), (None, "mask", "prior"), (1, 4096), (1, 70000)
    ):
        sizes = {"queries": T, "keys": S}
        assert pick_family(arch, dtype, D, DV, weighed_by=weighed_by, **sizes) in FAMILIES


def make_call(**changes) -> Call:
    x = torch.empty(1, 1, 2, 8, device="meta")
    fields = {"q": x, "k": x, "v": x, "residual": None, "gains": (1.0,) * 6}
    return Call(**(fields | {"visibility": Visibility()} | changes))


@pytest.mark.parametrize(
    "changes, is_centered, has_identity, weighed_by",
    [
        ({}, True, True, None),
        ({"gains": (0.0, 1.0, 0.0, 1.0, 1.0, 1.0)}, False, False, None),
        ({"gains": (torch.zeros(()), 1.0, torch.zeros(()), 1.0, 1.0, 1.0)}, True, True, None),
        ({"visibility": Visibility(attn_mask=torch.ones(1, 1, 2, 2).bool())}, True, True, "mask"),
        ({"prior": PRIORS["dense"]}, True, True, "prior"),
    ],
    ids=["defaults", "plain", "learned_from_zero", "mask", "prior"],
)
def test_terms_of_a_call(changes, is_centered, has_identity, weighed_by):
    call = make_call(**changes)
    assert call.is_centered == is_centered
    assert call.has_identity == has_identity
    assert call.weighed_by == weighed_by


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("changes", [{}, {"visibility": Visibility(attn_mask=...)}])
def test_a_family_gets_what_the_contract_says(changes, saves, monkeypatch, device):
    """Allocated by `attention`, padded, and None where there is nothing to fill."""
    found = []

    def forward(call, result):
        found.append((call, result))

    monkeypatch.setitem(FAMILIES, "portable", attention.Family(forward, None))
    q = torch.randn(2, 4, 5, 12).to(device)
    k, v = torch.randn(2, 2, 7, 12).to(device), torch.randn(2, 2, 7, 3).to(device)
    visibility = Visibility(q_offset=2)
    if "visibility" in changes:
        visibility = visibility._replace(attn_mask=q.new_ones(2, 4, 5, 7, dtype=torch.bool))
    out = attention.attention_fwd(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), None, (1.0,) * 6, visibility,
        save_for_backward=saves,
    )  # fmt: skip
    ((call, result),) = found
    assert [x.shape[3] for x in call[:3]] == [16, 16, 8]
    assert (result.out.shape, result.out.dtype) == ((2, 4, 5, 8), torch.bfloat16)
    assert (result.lse.shape, result.lse.dtype) == ((2, 4, 5), torch.float32)
    keeps_center = saves and "visibility" in changes
    wanted = (((2, 4, 5, 8), saves), ((2, 4, 5, 8), keeps_center), ((2, 2, 4, 5), saves))
    for x, (shape, is_kept) in zip(result[2:], wanted, strict=True):
        assert (x is None) if not is_kept else x.shape == shape
    assert out.out.shape == (2, 4, 5, 3) and out.out.is_contiguous()
    assert [x.numel() > 0 for x in out[2:]] == [is_kept for _, is_kept in wanted]
