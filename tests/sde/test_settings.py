"""The description of a block: derived gains, who sees whom, zero-logit attention, every error."""

import dataclasses
import json
import math
import re
from fractions import Fraction

import pytest
import torch
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

# changes of valid arguments, the exception, and parts of its message in their order:
# argument ... rule ... value ... remedy
ERRORS = {
    "tau0_zero": ({"tau0": 0.0}, ValueError, "tau0 ... greater than 0 ... got 0.0 ... positive"),
    "tau0_negative": ({"tau0": -1}, ValueError, "tau0 ... greater than 0 ... got -1 ... positive"),
    "tau0_inf": ({"tau0": math.inf}, ValueError, "tau0 ... must be finite ... got inf ... finite"),
    "tau0_bool": ({"tau0": True}, TypeError, "tau0 ... must be a number ... got True ... float"),
    "tau0_tensor": (
        {"tau0": torch.ones(())},
        TypeError,
        "tau0 ... must be a number ... got a Tensor of shape () ... float",
    ),
    "mlp_ratio": (
        {"mlp_ratio": 0},
        ValueError,
        "mlp_ratio ... greater than 0 ... got 0 ... positive",
    ),
    "branch_gain_above": (
        {"branch_gain": 1.01},
        ValueError,
        "branch_gain ... from 0 to 1 ... got 1.01 ... skip_gain^2 + branch_gain^2",
    ),
    "branch_gain_below": (
        {"branch_gain": -0.1},
        ValueError,
        "branch_gain ... from 0 to 1 ... got -0.1 ... skip_gain^2",
    ),
    "branch_gain_nan": (
        {"branch_gain": math.nan},
        ValueError,
        "branch_gain ... must be finite ... got nan ... finite",
    ),
    "branch_gain_str": (
        {"branch_gain": "0.5"},
        TypeError,
        "branch_gain ... must be a number ... got '0.5' ... float",
    ),
    "identity_gain": (
        {"identity_gain": None},
        TypeError,
        "identity_gain ... must be a number ... got None ... float",
    ),
    "c_plus": ({"c_plus": math.inf}, ValueError, "c_plus ... must be finite ... got inf ... finite"),
    "c_minus": ({"c_minus": "0"}, TypeError, "c_minus ... must be a number ... got '0' ... float"),
    "skip_gain": (
        {"skip_gain": math.nan},
        ValueError,
        "skip_gain ... must be finite ... got nan ... finite",
    ),
    "skip_gain_missing": (
        {"branch_gain": 0.5, "identity_gain": -3.0},
        ValueError,
        "skip_gain ... where identity_gain * branch_gain is above 1 ... got None with ... -1.5 ... "
        "Give skip_gain",
    ),
    "heads_zero": ({"heads": 0}, ValueError, "heads ... at least 1 ... got 0 ... range"),
    "heads_float": ({"heads": 2.0}, TypeError, "heads ... an int ... got 2.0 ... whole number"),
    "heads_bool": ({"heads": True}, TypeError, "heads ... an int ... got True ... whole number"),
    "softmax_gain_count": (
        {"heads": 3, "softmax_gain": (1.0, 2.0)},
        ValueError,
        "softmax_gain ... one for each of the 3 heads ... got 2 numbers ... as many as heads",
    ),
    "center_gain_count": (
        {"heads": 2, "center_gain": [1.0]},
        ValueError,
        "center_gain ... one for each of the 2 heads ... got 1 numbers ... as many as heads",
    ),
    "softmax_gain_entry": (
        {"heads": 2, "softmax_gain": (1.0, math.nan)},
        ValueError,
        "softmax_gain ... must be finite ... got nan ... finite",
    ),
    "softmax_gain_matrix": (
        {"heads": 1, "softmax_gain": torch.ones(1, 1)},
        TypeError,
        "softmax_gain ... must be a number ... got [1.0] ... float",
    ),
    "softmax_gain_str": (
        {"softmax_gain": "1"},
        TypeError,
        "softmax_gain ... must be a number ... got '1' ... float",
    ),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal ... True or False ... got 1 ... bool"),
    "attention": (
        {"attention": None},
        TypeError,
        "attention ... True or False ... got None ... bool",
    ),
    "mlp": ({"mlp": "yes"}, TypeError, "mlp ... True or False ... got 'yes' ... bool"),
    "no_sub_layer": (
        {"attention": False, "mlp": False},
        ValueError,
        "attention and mlp ... must not both be False ... got no sub-layer ... Switch",
    ),
    "out_proj": (
        {"out_proj": "haar"},
        ValueError,
        "out_proj ... one of ('none', 'orthogonal', 'gaussian') ... got 'haar' ... default",
    ),
    "detuning": (
        {"detuning": (0, 0, 0)},
        TypeError,
        "detuning ... must be a Detuning ... got tuple ... shaped_attn.sde.Detuning(",
    ),
    "detuning_identity": (
        {"detuning": Detuning(identity=math.inf)},
        ValueError,
        "detuning.identity ... must be finite ... got inf ... finite",
    ),
    "detuning_variance": (
        {"detuning": Detuning(variance="1")},
        TypeError,
        "detuning.variance ... must be a number ... got '1' ... float",
    ),
    "key_start": (
        {"key_start": 1.0},
        TypeError,
        "key_start ... an int or None ... got 1.0 ... tokens",
    ),
    "key_end": (
        {"key_end": torch.tensor(2)},
        TypeError,
        "key_end ... an int or None ... got tensor(2) ... tokens",
    ),
    "mask_type": (
        {"attn_mask": [[True]]},
        TypeError,
        "attn_mask ... an (m, m) Tensor ... got list ... row per token",
    ),
    "mask_shape": (
        {"attn_mask": torch.ones(3, 2, dtype=torch.bool)},
        ValueError,
        "attn_mask ... an (m, m) Tensor ... got shape (3, 2) ... row per token",
    ),
    "mask_rank": (
        {"attn_mask": torch.ones(2, 2, 2, dtype=torch.bool)},
        ValueError,
        "attn_mask ... an (m, m) Tensor ... got shape (2, 2, 2) ... row per token",
    ),
    "mask_dtype": (
        {"attn_mask": SQUARE},
        TypeError,
        "attn_mask ... must be bool ... got torch.float32 ... True where",
    ),
    "prior_type": (
        {"prior": "alibi"},
        TypeError,
        "prior ... an (m, m) Tensor ... got str ... row per token",
    ),
    "prior_shape": (
        {"prior": torch.ones(3)},
        ValueError,
        "prior ... an (m, m) Tensor ... got shape (3,) ... row per token",
    ),
    "prior_negative": (
        {"prior": SQUARE - 1.5},
        ValueError,
        "prior ... no negative entry ... got entries from -0.5 to -0.5 ... not its logarithm",
    ),
    "prior_nan": (
        {"prior": SQUARE * math.nan},
        ValueError,
        "prior ... finite with no negative entry ... got ... nan ... not its logarithm",
    ),
    "prior_inf": (
        {"prior": torch.tensor([[0.0, 1.0], [math.inf, 1.0]])},
        ValueError,
        "prior ... finite with no negative entry ... got entries from 0 to inf ... logarithm",
    ),
}

# What has no limit, by the class that needs one.
LIMIT_ERRORS = {
    "width": ({"width": 0}, ValueError, "width ... at least 1 ... got 0 ... range"),
    "width_float": ({"width": 64.0}, TypeError, "width ... an int ... got 64.0 ... whole number"),
    "center_gain": (
        {"center_gain": 0.9},
        ValueError,
        "center_gain ... must equal softmax_gain ... got 0.9 with softmax_gain 1.0 ... "
        "detuning.softmax",
    ),
    "center_gain_heads": (
        {"heads": 2, "softmax_gain": (1.0, 2.0), "center_gain": (2.0, 1.0)},
        ValueError,
        "center_gain ... must equal softmax_gain ... got (2.0, 1.0) with softmax_gain (1.0, 2.0) "
        "... detuning.softmax",
    ),
    "identity_gain": (
        {"identity_gain": 0.9},
        ValueError,
        "identity_gain ... must be 1 where there is an MLP ... got 0.9 ... detuning.identity",
    ),
    "skip_gain": (
        {"skip_gain": 0.9},
        ValueError,
        "skip_gain ... = 1 for a limit to exist ... got 0.9, which makes it 1.06 ... "
        "detuning.variance",
    ),
    "skip_gain_identity": (
        {"skip_gain": math.sqrt(0.75), "identity_gain": 0.5, "mlp": False},
        ValueError,
        "skip_gain ... = 1 for a limit to exist ... which makes it 0.8125 ... detuning.variance",
    ),
    "skip_gain_mlp": (
        {"skip_gain": 1.0, "attention": False},
        ValueError,
        "skip_gain ... = 1 for a limit to exist ... got 1, which makes it 1.25 ... detuning",
    ),
}


def check_message(message, parts):
    pattern = ".*".join(re.escape(part) for part in parts.split(" ... "))
    assert re.match(pattern, message), message
    # One wording: argument rule, got value. Remedy.
    assert re.fullmatch(r".+, got .+\. \S.+\.", message), message


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("kind", [BlockSettings, CovarianceSDE])
def test_error(kind, name):
    changes, error, parts = ERRORS[name]
    with pytest.raises(error) as caught:
        kind(**changes)
    check_message(str(caught.value), parts)


@pytest.mark.parametrize("name", LIMIT_ERRORS)
def test_no_limit(name):
    changes, error, parts = LIMIT_ERRORS[name]
    with pytest.raises(error) as caught:
        CovarianceSDE(**changes)
    check_message(str(caught.value), parts)
    if name.startswith("width"):
        return
    BlockSettings(**changes)  # an ablation may have it


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
