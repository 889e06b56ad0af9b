"""The covariance at the start: equicorrelated tokens, and what is asked of any other."""

import itertools
import math
import re

import pytest
import torch
from covariances import check_message, generic

from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.start import check_start


class TestEquicorrelated:
    @pytest.mark.parametrize("tokens", [1, 2, 5])
    def test_entries(self, tokens):
        v = equicorrelated(tokens, 0.25, 3.0)
        assert v.dtype == torch.float64 and v.shape == (tokens, tokens)
        for i, j in itertools.product(range(tokens), repeat=2):
            assert v[i, j] == (3.0 if i == j else 0.75)

    def test_dtype(self):
        assert equicorrelated(2, 0.5, dtype=torch.float32).dtype == torch.float32

    def test_least_correlation(self):
        values = torch.linalg.eigvalsh(equicorrelated(4, -1 / 3))
        assert abs(values[0]) < 1e-15

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3, -0.51), "correlation must be from -0.5 to 1 for 3 tokens, got -0.51. No"),
            ((3, 1.01), "correlation must be from -0.5 to 1 for 3 tokens, got 1.01. No"),
            ((3, math.nan), "correlation must be finite"),
            ((0, 0.5), "tokens must be at least 1"),
            ((2, 0.5, 0.0), "variance must be greater than 0"),
        ],
    )
    def test_error(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            equicorrelated(*arguments)


EYE = torch.eye(3, dtype=torch.float64)


def changed(i, j, value):
    v = EYE.clone()
    v[i, j] = value
    return v


# V, the exception, and parts of its message in their order: argument ... rule ... value ... remedy
BAD_V = {
    "list": ([[1.0]], TypeError, "must be a torch.Tensor ... got list ... Pass"),
    "half": (EYE.half(), TypeError, "float64 or float32 ... got torch.float16 ... .double()"),
    "vector": (EYE[0], ValueError, "(..., m, m) ... got shape (3,) ... square"),
    "rectangle": (EYE[:2], ValueError, "(..., m, m) ... got shape (2, 3) ... square"),
    "empty": (EYE[:0, :0], ValueError, "at least one token ... got shape (0, 0) ... square"),
    "nan": (changed(0, 0, math.nan), ValueError, "must be finite ... got NaN ... Correct"),
    "skew": (
        changed(0, 1, 0.25),
        ValueError,
        "must be symmetric ... differ from their mirror image by up to 0.25 ... .mT) / 2",
    ),
    "negative": (
        changed(1, 1, -0.5),
        ValueError,
        "positive semidefinite ... got an eigenvalue of -0.5 ... X X^T / n",
    ),
    "indefinite": (
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        ValueError,
        "positive semidefinite ... got an eigenvalue of -1 ... X X^T / n",
    ),
    "all_negative": (-EYE, ValueError, "positive semidefinite ... eigenvalue of -1 ... X X^T / n"),
}


class TestCheckCovariance:
    @pytest.mark.parametrize("name", BAD_V)
    def test_v(self, name):
        v, error, parts = BAD_V[name]
        sde = CovarianceSDE()
        for argument, f in (("v", sde.drift), ("v", sde.diffusion), ("v0", sde.sample)):
            with pytest.raises(error) as caught:
                f(v)
            check_message(str(caught.value), f"{argument} ... {parts}")

    def test_rounding_is_no_error(self):
        v = generic(4).float() @ generic(4).float()
        v[0, 1] *= 1 + 2**-22
        CovarianceSDE().drift(v)
        singular = torch.randn(5, 2, dtype=torch.float64)
        CovarianceSDE().drift(singular @ singular.mT)

    @pytest.mark.parametrize("name", ["skew", "negative"])
    def test_each_matrix_of_a_batch(self, name):
        """Asymmetry was once measured against the largest matrix of all."""
        batch = torch.stack((1e20 * EYE, BAD_V[name][0]))
        with pytest.raises(ValueError, match="v must be"):
            CovarianceSDE().drift(batch)


def test_generator_on_another_device():
    class OnGPU(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError) as caught:
        check_start(EYE, (0, 2), OnGPU())
    check_message(
        str(caught.value), "generator ... on the device of v0, cpu ... got cuda ... v0.device"
    )
