"""Which family of kernels runs a call, and what the families are given."""

import threading
import warnings

import pytest
import torch
from fresh_python import python

from shaped_attn.kernels import attention, families, launch
from shaped_attn.kernels.attention import FAMILIES, Call
from shaped_attn.kernels.priors import PRIORS
from shaped_attn.visibility import Visibility


def pick(**changes) -> str:
    """The family of a call that the Hopper kernels were measured for, or of one that differs."""
    call = {
        "arch": 90,
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "value_dim": 128,
        "weighed_by": None,
        "rows": 16 * 16384,
        "group": 1,
        "fits_tma": True,
        "release": (3, 6),
    }
    return families.pick_family(**(call | changes))


# Of calls that the Hopper kernels run, those that "auto" leaves to the portable ones.
UNMEASURED = [
    {"dtype": torch.float16},
    {"head_dim": 96, "value_dim": 96},
    {"value_dim": 64},
    {"head_dim": 8, "value_dim": 8},
    {"head_dim": 256, "value_dim": 256},
    {"head_dim": 192},
    {"rows": 4096},
    {"group": 4},
    {"release": (3, 9)},
]
# What the Hopper kernels do not run.
OTHERS = [
    {"dtype": torch.float32},
    {"head_dim": 264},
    {"value_dim": 512},
    {"weighed_by": "mask"},
    {"weighed_by": "prior"},
    {"fits_tma": False},
]


def test_hopper_kernels_take_what_they_were_measured_for():
    assert pick() == "hopper"
    assert pick(head_dim=64, value_dim=64) == "hopper"
    assert pick(choice="portable") == "portable"


@pytest.mark.parametrize("changes", UNMEASURED, ids=str)
def test_hopper_kernels_take_the_unmeasured_where_asked(changes):
    assert pick(**changes) == "portable"
    assert pick(**changes, choice="hopper") == "hopper"


@pytest.mark.parametrize("changes", OTHERS, ids=str)
@pytest.mark.parametrize("choice", families.CHOICES)
def test_portable_kernels_take_the_rest(changes, choice):
    assert pick(**changes, choice=choice) == "portable"


@pytest.mark.parametrize("arch", [80, 86, 89, 100, 120, "gfx942", "interpreter"])
def test_hopper_kernels_need_a_hopper(arch):
    assert pick(arch=arch) == "portable"
    assert pick(arch=arch, choice="portable") == "portable"
    with pytest.raises(ValueError, match=f"compute capability 9.0, this is {arch}"):
        pick(arch=arch, choice="hopper")


def test_an_unknown_release_of_triton_warns_once():
    families._warn_unknown_release.cache_clear()
    with pytest.warns(UserWarning, match="for Triton 3.6 and 3.9, this is 4.0"):
        assert pick(release=(4, 0)) == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(release=(4, 0)) == "portable"


def test_choice_of_a_family():
    assert families.chosen_family() == "auto"
    with families.use_family("portable"):
        assert families.chosen_family() == "portable"
        with families.use_family("auto"):
            assert families.chosen_family() == "auto"
        assert families.chosen_family() == "portable"
    rule = "family must be one of auto, portable, hopper, got 'h'"
    with pytest.raises(ValueError, match=rule), families.use_family("h"):
        pass


def test_a_choice_holds_in_other_threads():
    """On a GPU autograd runs backward passes in threads of its own."""
    found = []
    with families.use_family("portable"):
        thread = threading.Thread(target=lambda: found.append(families.chosen_family()))
        thread.start()
        thread.join()
    assert found == ["portable"] and families.chosen_family() == "auto"


def test_environment_variable():
    code = "from shaped_attn.kernels import families; print(families.chosen_family())"
    assert python("-c", code, SHAPED_ATTN_FAMILY="portable") == "portable"
    said = python("-c", code, SHAPED_ATTN_FAMILY="nothing", status=1)
    assert "SHAPED_ATTN_FAMILY must be one of" in said


def test_another_choice_is_another_plan(device):
    """A plan made under one choice does not serve the calls of another."""
    q = torch.randn(1, 1, 4, 16, device=device)
    arguments = (q, q, q, None, (1.0,) * 6, Visibility(q_offset=0))
    attention.attention_fwd(*arguments, save_for_backward=False)
    if launch.architecture(q) != 90:
        with families.use_family("hopper"), pytest.raises(ValueError, match="'hopper' needs"):
            attention.attention_fwd(*arguments, save_for_backward=False)


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

    def forward(call, saves):
        return lambda call, result: found.append((call, result))

    launch.forget_plans()
    monkeypatch.setitem(FAMILIES, "portable", lambda: attention.Family(forward, None))
    q = torch.randn(2, 4, 5, 12).to(device)
    k, v = torch.randn(2, 2, 7, 12).to(device), torch.randn(2, 2, 7, 3).to(device)
    visibility = Visibility(q_offset=2)
    if "visibility" in changes:
        visibility = visibility._replace(attn_mask=q.new_ones(2, 4, 5, 7, dtype=torch.bool))
    out = attention.attention_fwd(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), None, (1.0,) * 6, visibility,
        save_for_backward=saves,
    )  # fmt: skip
    launch.forget_plans()
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
