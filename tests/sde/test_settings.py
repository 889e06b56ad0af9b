"""The description of a block: derived gains, who sees whom, zero-logit attention, every error."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch
from covariances import check_message
from hypothesis import given
from hypothesis import strategies as st

from shaped_attn.sde import CovarianceSDE, Detuning
from shaped_attn.sde.settings import (
    BlockSettings,
    variance_correction,
)


def test_defaults_are_the_paper():
    """One head, no mask, no W_O, no prior, gains of the shaped regime, ReLU below zero only."""
    settings = BlockSettings()
    assert (settings.tau0, settings.branch_gain, settings.heads) == (1.0, 0.5, 1)
    assert settings.skip_gain == math.sqrt(0.75)
    assert settings.identity_gain == settings.softmax_gain == settings.center_gain == 1.0
    assert (settings.c_plus, settings.c_minus, settings.mlp_ratio) == (0.0, -1.0, 1.0)
    assert settings.out_proj == "none" and settings.detuning == Detuning(0.0, 0.0, 0.0)
    assert settings.attention and settings.mlp and not settings.is_causal
    assert settings.attn_mask is settings.prior is settings.key_start is settings.key_end is None


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockSettings().tau0 = 2.0


@given(
    branch_gain=st.floats(0, 1),
    identity_gain=st.floats(-1, 1),
    attention=st.booleans(),
)
def test_skip_gain_keeps_the_size(branch_gain, identity_gain, attention):
    """skip_gain^2 + (identity_gain branch_gain)^2 = 1; the MLP's branch has no identity gain."""
    settings = BlockSettings(
        branch_gain=branch_gain, identity_gain=identity_gain, attention=attention
    )
    branch = branch_gain * (identity_gain if attention else 1.0)
    assert settings.skip_gain >= 0
    # Half an ulp in each of the squares, their sum, the root and its square.
    assert abs(settings.skip_gain**2 + branch**2 - 1) <= 4 * 2**-52


def test_skip_gain_given_is_kept():
    assert BlockSettings(branch_gain=1.0, skip_gain=0.9, identity_gain=3.0).skip_gain == 0.9


def test_identity_gain_does_not_bound_the_branch_without_attention():
    settings = BlockSettings(branch_gain=0.5, identity_gain=4.0, attention=False)
    assert settings.skip_gain == math.sqrt(0.75)


class TestHeadGains:
    def test_center_follows_softmax(self):
        assert BlockSettings(softmax_gain=1.7).center_gain == 1.7
        assert BlockSettings(softmax_gain=(1, 2.5), heads=2).center_gain == (1.0, 2.5)
        assert BlockSettings(softmax_gain=1.7, center_gain=0).center_gain == 0.0

    def test_one_number_stands_for_all_heads(self):
        settings = BlockSettings(softmax_gain=1.5, center_gain=[0.5, 1.0, 2.0], heads=3)
        like = torch.zeros((), dtype=torch.float32)
        found = settings.head_gains("softmax_gain", like)
        assert found.dtype == torch.float32 and found.tolist() == [1.5, 1.5, 1.5]
        assert settings.head_gains("center_gain", like).tolist() == [0.5, 1.0, 2.0]

    def test_tensors(self):
        gains = torch.tensor([0.5, 2.0])
        settings = BlockSettings(heads=2, softmax_gain=gains, center_gain=torch.tensor(0.25))
        assert settings.softmax_gain == (0.5, 2.0)
        assert settings.center_gain == 0.25

    def test_equal_gains_in_another_form_have_a_limit(self):
        """A tuple of equal numbers was once not the number."""
        for gains in ((1.5, (1.5, 1.5)), ((1.5, 1.5), 1.5), (None, 1.0), ((1.0, 2.0), None)):
            center, softmax = gains[1], gains[0]
            if softmax is None:
                softmax = 1.0
            CovarianceSDE(heads=2, softmax_gain=softmax, center_gain=center)


visibilities = st.fixed_dictionaries(
    {},
    optional={
        "is_causal": st.booleans(),
        "key_start": st.integers(-1, 6),
        "key_end": st.integers(-1, 6),
    },
)


@given(
    tokens=st.integers(1, 5),
    visibility=visibilities,
    has_mask=st.booleans(),
    has_prior=st.booleans(),
    seed=st.integers(0, 99),
)
def test_zero_logit_attention_is_its_definition(tokens, visibility, has_mask, has_prior, seed):
    """Who sees whom, P0 and the row sums of A0, by loops over tokens in exact fractions."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, tokens, generator=generator) < 0.7
    # Whole eighths, whose sums are exact; a third of them 0.
    prior = torch.randint(0, 3, (tokens, tokens), generator=generator) / 8.0
    settings = BlockSettings(
        **visibility,
        attn_mask=mask if has_mask else None,
        prior=prior if has_prior else None,
    )
    visible = settings.visible_keys(tokens)
    rows, mass = settings.zero_logit_attention(tokens, torch.zeros((), dtype=torch.float64))
    for i in range(tokens):
        seen = [
            j
            for j in range(tokens)
            if (not visibility.get("is_causal") or j <= i)
            and j >= visibility.get("key_start", 0)
            and j < visibility.get("key_end", tokens)
            and (not has_mask or mask[i, j])
            and (not has_prior or prior[i, j] > 0)
        ]
        assert visible[i].nonzero().flatten().tolist() == seen
        weights = {j: Fraction(float(prior[i, j])) if has_prior else Fraction(1) for j in seen}
        total = sum(weights.values())
        expected = [float(weights[j] / total) if j in weights else 0.0 for j in range(tokens)]
        assert rows[i].tolist() == expected
        assert mass[i] == (float(total) if has_prior else float(bool(seen)))


def test_zero_logit_attention_has_the_dtype_asked_for():
    rows, mass = BlockSettings().zero_logit_attention(3, torch.zeros((), dtype=torch.float32))
    assert rows.dtype == mass.dtype == torch.float32
    # Rounded once, from float64.
    assert torch.equal(rows, torch.full((3, 3), 1 / 3))


def test_integer_prior():
    prior = torch.tensor([[1, 0], [1, 3]])
    rows, mass = BlockSettings(prior=prior).zero_logit_attention(
        2, torch.zeros((), dtype=torch.float64)
    )
    assert rows.tolist() == [[1.0, 0.0], [0.25, 0.75]] and mass.tolist() == [1.0, 4.0]


def test_to_dict_is_json():
    settings = BlockSettings(
        heads=2,
        softmax_gain=(1.0, 2.0),
        attn_mask=torch.ones(2, 2, dtype=torch.bool),
        prior=torch.eye(2) / 2,
        detuning=Detuning(softmax=0.5),
    )
    found = json.loads(json.dumps(settings.to_dict()))
    assert found["softmax_gain"] == found["center_gain"] == [1.0, 2.0]
    assert found["attn_mask"] == [[True, True], [True, True]]
    assert found["prior"] == [[0.5, 0.0], [0.0, 0.5]]
    assert found["detuning"] == {"identity": 0.0, "softmax": 0.5, "variance": 0.0}
    assert found["skip_gain"] == math.sqrt(0.75)
    assert set(found) == {f.name for f in dataclasses.fields(BlockSettings)}


@given(
    c_plus=st.floats(-2, 2),
    c_minus=st.floats(-2, 2),
    width=st.integers(9, 10**6),
)
def test_variance_correction(c_plus, c_minus, width):
    """The second form of covariance-sde.md (4)."""
    root = math.sqrt(width)
    expected = 1 / (1 + (c_plus + c_minus) / root + (c_plus**2 + c_minus**2) / (2 * width))
    found = variance_correction(c_plus, c_minus, width)
    # The denominator, a mean of squares of slopes, cancels no further than from 3 to 1/9.
    assert abs(found - expected) <= 64 * 2**-52 * expected


def test_variance_correction_of_a_dead_activation():
    with pytest.raises(ValueError, match=r"c_plus and c_minus .* -sqrt\(width\), got -2 and -2\."):
        variance_correction(-2.0, -2.0, 4)


SQUARE = torch.ones(3, 3)

# Changes of valid arguments, and parts of the error in their order: argument, rule, value, remedy.
ERRORS = [
    ({"tau0": 0.0}, "tau0 ... greater than 0 ... got 0.0"),
    ({"tau0": math.inf}, "tau0 ... must be finite"),
    ({"tau0": torch.ones(())}, "tau0 ... must be a number"),
    ({"mlp_ratio": 0}, "mlp_ratio ... greater than 0"),
    ({"branch_gain": 1.01}, "branch_gain ... from 0 to 1 ... got 1.01"),
    ({"branch_gain": -0.1}, "branch_gain ... from 0 to 1 ... got -0.1"),
    ({"branch_gain": "0.5"}, "branch_gain ... must be a number"),
    ({"identity_gain": None}, "identity_gain ... must be a number"),
    ({"c_plus": math.inf}, "c_plus ... must be finite"),
    ({"c_minus": "0"}, "c_minus ... must be a number"),
    ({"skip_gain": math.nan}, "skip_gain ... must be finite"),
    (
        {"branch_gain": 0.5, "identity_gain": -3.0},
        "skip_gain ... where identity_gain * branch_gain is above 1 ... got None with ... -1.5 ... "
        "Give skip_gain",
    ),
    ({"heads": 0}, "heads ... at least 1"),
    ({"heads": 2.0}, "heads ... an int"),
    (
        {"heads": 3, "softmax_gain": (1.0, 2.0)},
        "softmax_gain ... a number or 3 numbers, one per head ... got 2 of them ... for each",
    ),
    ({"heads": 2, "center_gain": [1.0]}, "center_gain ... a number or 2 numbers"),
    ({"heads": 2, "softmax_gain": (1.0, math.nan)}, "softmax_gain ... must be finite"),
    ({"heads": 1, "softmax_gain": torch.ones(1, 1)}, "softmax_gain ... must be a number"),
    ({"softmax_gain": "1"}, "softmax_gain ... must be a number"),
    ({"is_causal": 1}, "is_causal ... True or False ... got 1"),
    ({"attention": None}, "attention ... True or False"),
    ({"mlp": "yes"}, "mlp ... True or False"),
    (
        {"attention": False, "mlp": False},
        "attention and mlp ... must not both be False ... got no sub-layer ... Switch",
    ),
    ({"out_proj": "haar"}, "out_proj ... one of 'none', 'orthogonal', 'gaussian' ... got 'haar'"),
    (
        {"detuning": (0, 0, 0)},
        "detuning ... must be a Detuning ... got tuple ... shaped_attn.sde.Detuning(",
    ),
    ({"detuning": Detuning(identity=math.inf)}, "detuning.identity ... must be finite"),
    ({"detuning": Detuning(variance="1")}, "detuning.variance ... must be a number"),
    ({"key_start": 1.0}, "key_start ... an int ... got 1.0"),
    ({"key_end": torch.tensor(2)}, "key_end ... an int"),
    ({"attn_mask": [[True]]}, "attn_mask ... an (m, m) Tensor ... got list ... row per token"),
    (
        {"attn_mask": torch.ones(3, 2, dtype=torch.bool)},
        "attn_mask ... an (m, m) Tensor ... got shape (3, 2) ... row per token",
    ),
    ({"attn_mask": torch.ones(2, 2, 2, dtype=torch.bool)}, "attn_mask ... got shape (2, 2, 2)"),
    ({"attn_mask": SQUARE}, "attn_mask ... must be bool ... got torch.float32 ... True where"),
    ({"prior": "alibi"}, "prior ... an (m, m) Tensor ... got str ... row per token"),
    ({"prior": torch.ones(3)}, "prior ... an (m, m) Tensor ... got shape (3,)"),
    (
        {"prior": SQUARE - 1.5},
        "prior ... no negative entry ... got entries from -0.5 to -0.5 ... not its logarithm",
    ),
    ({"prior": SQUARE * math.nan}, "prior ... finite ... got ... nan ... not its logarithm"),
    (
        {"prior": torch.tensor([[0.0, 1.0], [math.inf, 1.0]])},
        "prior ... finite with no negative entry ... got entries from 0 to inf ... logarithm",
    ),
]

# What has no limit; `BlockSettings` takes it, as an ablation may have it.
LIMIT_ERRORS = [
    (
        {"center_gain": 0.9},
        "center_gain ... must equal softmax_gain ... got 0.9 with softmax_gain 1.0 ... "
        "detuning.softmax",
    ),
    (
        {"heads": 2, "softmax_gain": (1.0, 2.0), "center_gain": (2.0, 1.0)},
        "center_gain ... must equal softmax_gain ... got (2.0, 1.0) with softmax_gain (1.0, 2.0)",
    ),
    (
        {"identity_gain": 0.9},
        "identity_gain ... must be 1 where there is an MLP ... got 0.9 ... detuning.identity",
    ),
    (
        {"skip_gain": 0.9},
        "skip_gain ... = 1 for a limit ... got 0.9, which makes that 1.06 ... detuning.variance",
    ),
    (
        {"skip_gain": math.sqrt(0.75), "identity_gain": 0.5, "mlp": False},
        "skip_gain ... = 1 for a limit ... which makes that 0.8125",
    ),
    (
        {"skip_gain": 1.0, "attention": False},
        "skip_gain ... = 1 for a limit ... got 1, which makes that 1.25",
    ),
]


def expect(parts, kind, changes):
    with pytest.raises((TypeError, ValueError)) as caught:
        kind(**changes)
    check_message(str(caught.value), parts)


@pytest.mark.parametrize(("changes", "parts"), ERRORS)
@pytest.mark.parametrize("kind", [BlockSettings, CovarianceSDE])
def test_error(kind, changes, parts):
    expect(parts, kind, changes)


@pytest.mark.parametrize(("changes", "parts"), LIMIT_ERRORS)
def test_no_limit(changes, parts):
    expect(parts, CovarianceSDE, changes)
    BlockSettings(**changes)


@pytest.mark.parametrize("width", [0, 64.0])
def test_a_target_width_is_a_size(width):
    expect("width ... must be", CovarianceSDE, {"width": width})


@pytest.mark.parametrize("name", ["attn_mask", "prior"])
def test_mask_of_another_number_of_tokens(name):
    matrix = torch.ones(3, 3)
    settings = BlockSettings(**{name: matrix.bool() if name == "attn_mask" else matrix})
    with pytest.raises(ValueError) as caught:
        settings.visible_keys(4)
    check_message(
        str(caught.value),
        f"{name} ... a row for each of the 4 tokens of V ... got shape (3, 3) ... same number",
    )


def test_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        BlockSettings(1.0)
