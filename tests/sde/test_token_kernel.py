"""The kernel of tokens over depth: its targets, real networks, and what shows a wrong prior."""

import importlib
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shaped_attn import shaped_attention
from shaped_attn.nn.activations import (
    DKSActivation,
    TailoredLeakyReLU,
    activation_kernel,
    correlation_map,
    correlations,
    dks_constants,
    tat_slope,
)
from shaped_attn.nn.initialization import orthogonal
from shaped_attn.priors import ESPA, USPA, prior_matrix
from shaped_attn.sde.token_kernel import Propagation, input_kernel, propagate

TOKENS = 64
EYE = torch.eye(TOKENS, dtype=torch.float64)


def random_kernel(tokens, *, width=None):
    x = torch.randn(tokens, width or 2 * tokens, dtype=torch.float64)
    return x @ x.mT / x.shape[1]


def orthogonal_matrix(width):
    weight = torch.empty(width, width, dtype=torch.float64)
    orthogonal(weight)
    return weight


def tokens_of(kernel, width):
    """(T, width) tokens of exactly that kernel, in a random frame."""
    root = torch.linalg.cholesky(kernel) * math.sqrt(width)
    return root @ orthogonal_matrix(width)[: len(kernel)]


def kernel_of(x):
    return x @ x.mT / x.shape[-1]


def assert_mean(samples, expected, sigmas=4.5):
    """That samples (networks, T, T) average to what is expected, in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= sigmas * error + 1e-12).all()


# Targets


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("layers", [36, 72])
@pytest.mark.parametrize("prior", [ESPA, USPA])
def test_schedules_stay_on_their_targets(prior, layers, is_causal):
    schedule = prior.schedule(layers)
    propagation = propagate(EYE, schedule, is_causal=is_causal)
    assert propagation.kernels.shape == (layers + 1, TOKENS, TOKENS)
    assert propagation.deviation(schedule).max() < 1e-12
    assert float(propagation.mean_correlation()[-1]) < 0.95
    index = torch.arange(TOKENS)
    distance = (index[:, None] - index).abs()
    last = torch.exp(-0.005 * distance.double()) if prior is ESPA else 0.8 + 0.2 * EYE
    torch.testing.assert_close(propagation.kernels[-1], last, rtol=0, atol=1e-12)


def over_columns(a):
    """A row sum applied along columns: A_ij / D_j instead of A_ij / D_i, then times D_i."""
    mass = a.sum(-1)
    return mass[:, None] * (a / mass)


def of_columns(a):
    """Normalised rows, rescaled by the sums of the columns."""
    return a.sum(0)[:, None] * (a / a.sum(-1, keepdim=True))


@pytest.mark.parametrize("wrong", [over_columns, of_columns])
@pytest.mark.parametrize(
    ("prior", "is_causal"),
    # U-SPA without a mask is symmetric and its row sums are equal: there the axes do not differ.
    [(ESPA, True), (ESPA, False), (USPA, True)],
)
@pytest.mark.parametrize("layers", [36, 72])
def test_normalisation_along_the_wrong_axis_misses_the_target(prior, is_causal, layers, wrong):
    schedule = prior.schedule(layers)
    right = [prior_matrix(entry, TOKENS, is_causal=is_causal)[0] for entry in schedule]
    assert propagate(EYE, right).deviation(schedule).max() < 1e-12
    found = propagate(EYE, [wrong(a) for a in right])
    assert found.deviation(schedule)[-1] > 1e-3


def test_input_that_a_schedule_is_not_made_for_misses_the_target():
    schedule = USPA.schedule(36)
    found = propagate(0.1 + 0.9 * EYE, schedule).deviation(schedule)
    assert (found > 1e-2).all()


# Rank collapse


def test_plain_softmax_collapses():
    propagation = propagate(EYE, [None] * 36)
    correlation = propagation.mean_correlation()
    assert (correlation.diff() > -1e-12).all()
    assert correlation[0] == 0
    assert correlation[12] > 0.9999
    assert propagation.correlations()[36].min() > 1 - 1e-9
    rank = propagation.effective_rank()
    assert rank[0] == pytest.approx(TOKENS, rel=1e-12)
    assert rank[36] == pytest.approx(1, abs=1e-6)


def test_plain_softmax_without_a_mask_collapses_in_a_layer():
    propagation = propagate(random_kernel(8), [None] * 2, is_causal=False)
    torch.testing.assert_close(propagation.mean_correlation()[1:], torch.ones(2).double())


def test_skips_slow_the_collapse_down():
    ranks = [
        propagate(EYE, [None] * 12, skip_gain=skip, branch_gain=math.sqrt(1 - skip**2))
        .effective_rank()[-1]
        .item()
        for skip in (0.0, 0.5, 0.9, 0.98)
    ]
    assert ranks == sorted(ranks)
    assert ranks[-1] > 2 * ranks[0]


# Real networks


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("prior", [ESPA, USPA])
def test_a_real_network_has_these_kernels_exactly(prior, is_causal):
    """Skipless attention with W_Q = 0 and orthogonal W_V and W_O, through the operator."""
    heads, head_dim, tokens, layers = 4, 8, 12, 12
    sigma0 = random_kernel(tokens)
    schedule = prior.schedule(layers)
    expected = propagate(sigma0, schedule, is_causal=is_causal).kernels
    x = tokens_of(sigma0, heads * head_dim)
    torch.testing.assert_close(kernel_of(x), expected[0], rtol=0, atol=1e-12)
    for layer, entry in enumerate(schedule, 1):
        v = (x @ orthogonal_matrix(32)).view(tokens, heads, head_dim).transpose(0, 1)[None]
        mixed = shaped_attention(
            torch.zeros_like(v),
            v,
            v,
            prior=entry,
            is_causal=is_causal,
            identity_gain=0.0,
            center_gain=0.0,
            impl="reference",
        )
        x = mixed[0].transpose(0, 1).reshape(tokens, -1) @ orthogonal_matrix(32)
        torch.testing.assert_close(kernel_of(x), expected[layer], rtol=0, atol=1e-12)


def test_pre_norm_of_a_real_network_is_exact():
    """RMSNorm before skipless attention gives the kernel's correlations at any width."""
    sigma0, width = random_kernel(6), 16
    schedule = [None, USPA(0.0, 0.6), ESPA(2.0, 0.3), None]
    expected = propagate(sigma0, schedule, has_normalization=True).kernels
    x = tokens_of(sigma0, width)
    for layer, entry in enumerate(schedule, 1):
        if entry is None:
            a = torch.ones(6, 6, dtype=torch.float64).tril()
            a = a / a.sum(-1, keepdim=True)
        else:
            a = prior_matrix(entry, 6)[0]
        x = a @ F.rms_norm(x, (width,), eps=0.0) @ orthogonal_matrix(width)
        torch.testing.assert_close(kernel_of(x), expected[layer], rtol=0, atol=1e-12)


def test_the_mean_over_gaussian_networks_with_skips():
    networks, tokens, width = 20_000, 4, 8
    sigma0, schedule = random_kernel(tokens), [ESPA(1.5, 0.5), None, USPA(0.1, 0.5)]
    gains = {"skip_gain": 0.8, "branch_gain": 0.6}
    expected = propagate(sigma0, schedule, **gains).kernels
    x = tokens_of(sigma0, width).expand(networks, -1, -1)
    for layer, entry in enumerate(schedule, 1):
        if entry is None:
            a = 1 / torch.arange(1, tokens + 1).double()[:, None].expand(-1, tokens)
            a = a.tril()
        else:
            a = prior_matrix(entry, tokens)[0]
        weight = torch.randn(networks, width, width, dtype=torch.float64) / math.sqrt(width)
        x = 0.8 * x + 0.6 * a @ x @ weight
        assert_mean(kernel_of(x), expected[layer])


def test_the_mean_over_heads_of_their_own_priors():
    networks, heads, tokens, width = 20_000, 2, 4, 8
    sigma0 = random_kernel(tokens)
    prior = ESPA(torch.tensor([2.0, 4.0]), torch.tensor([0.2, 1.0]))
    expected = propagate(sigma0, [prior]).kernels[1]
    weight = torch.randn(networks, width, width, dtype=torch.float64) / math.sqrt(width)
    values = (tokens_of(sigma0, width) @ weight).unflatten(-1, (heads, -1)).transpose(1, 2)
    x = (prior_matrix(prior, tokens) @ values).transpose(1, 2).flatten(2)
    assert_mean(kernel_of(x), expected)
    matrices = propagate(sigma0, [prior_matrix(prior, tokens)]).kernels[1]
    torch.testing.assert_close(matrices, expected)


@pytest.mark.parametrize("has_normalization", [False, True])
@pytest.mark.parametrize(
    "activation",
    [TailoredLeakyReLU(0.3), DKSActivation(torch.tanh, dks_constants(torch.tanh, 12)), F.gelu],
    ids=["leaky", "dks", "gelu"],
)
def test_the_mean_over_gaussian_mlps(activation, has_normalization):
    """Behind an orthogonal attention, whose kernel does not fluctuate."""
    networks, tokens, width = 4000, 4, 16
    sigma0, prior = random_kernel(tokens), USPA(0.0, 0.5)
    expected = propagate(
        sigma0,
        [prior],
        activation=activation,
        mlp_skip_gain=0.6,
        mlp_branch_gain=0.8,
        has_normalization=has_normalization,
    ).kernels[1]
    norm = (lambda x: F.rms_norm(x, (width,), eps=0.0)) if has_normalization else lambda x: x
    x = prior_matrix(prior, tokens)[0] @ norm(tokens_of(sigma0, width)) @ orthogonal_matrix(width)
    weights = torch.randn(2, networks, width, width, dtype=torch.float64) / math.sqrt(width)
    x = 0.6 * x + 0.8 * activation(norm(x) @ weights[0]) @ weights[1]
    assert_mean(kernel_of(x), expected)


# MLPs


def test_skipless_mlps_raise_correlations_by_the_map():
    """Value-SkipInit, whose attention does nothing, and leaky ReLUs tailored to the depth."""
    layers = 36
    activation = TailoredLeakyReLU(tat_slope(layers, 0.9))
    propagation = propagate(EYE[:8, :8], [EYE[:8, :8]] * layers, activation=activation)
    torch.testing.assert_close(
        propagation.kernels.diagonal(dim1=1, dim2=2), torch.ones(37, 8).double()
    )
    assert float(propagation.mean_correlation()[-1]) == pytest.approx(0.9, abs=1e-12)
    expected = torch.zeros((), dtype=torch.float64)
    for layer in range(1, layers + 1):
        expected = correlation_map(activation, expected)
        found = propagation.correlations()[layer, 1, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_layer_is_attention_and_then_the_mlp():
    sigma0, a, activation = random_kernel(5), torch.randn(5, 5).double(), nn.ReLU()
    gains = {"skip_gain": 0.3, "branch_gain": 0.7, "mlp_skip_gain": 0.2, "mlp_branch_gain": 1.1}
    for has_normalization in (False, True):
        found = propagate(
            sigma0, [a, a], activation=activation, has_normalization=has_normalization, **gains
        )
        norm = correlations if has_normalization else lambda kernel: kernel
        expected = sigma0
        for layer in (1, 2):
            expected = 0.3**2 * expected + 0.7**2 * a @ norm(expected) @ a.mT
            mlp = activation_kernel(activation, norm(expected))
            expected = 0.2**2 * expected + 1.1**2 * mlp
            torch.testing.assert_close(found.kernels[layer], expected)


def test_dks_keeps_the_second_moment_near_one():
    """Q(1) = 1 and Q'(1) = 1: a deviation d comes back as d + O(d^2), not amplified by depth."""
    layers, deviation = 36, 1e-3
    activation = DKSActivation(torch.tanh, dks_constants(torch.tanh, layers))
    sigma0 = (1 + deviation) * torch.eye(2, dtype=torch.float64)
    found = propagate(sigma0, [torch.eye(2)] * layers, activation=activation).kernels[-1]
    # Each layer adds Q'' d^2 / 2, with Q'' = 0.0077 here.
    assert float(found[0, 0]) - 1 == pytest.approx(deviation, abs=0.01 * layers * deviation**2)
    assert float(found[0, 1]) == pytest.approx(0, abs=0.01 * layers * deviation**2)


# Inputs


def test_equal_tokens_have_equal_embeddings():
    kernel = input_kernel(torch.tensor([3, 1, 3, 7, 1, 3]))
    expected = [
        [1, 0, 1, 0, 0, 1],
        [0, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
        [0, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]
    assert torch.equal(kernel, torch.tensor(expected, dtype=torch.float64))


def test_repeated_tokens_stay_closer_but_not_equal():
    ids = torch.arange(32) % 16
    schedule = ESPA.schedule(36)
    correlation = propagate(input_kernel(ids), schedule).correlations()
    distinct = propagate(torch.eye(32), schedule).correlations()
    assert correlation[0, 16, 0] == 1
    assert (correlation[1:, 16, 0] < 1 - 1e-3).all()
    assert (correlation[1:, 16, 0] > distinct[1:, 16, 0] + 1e-3).all()


def test_sinusoidal_positions_are_those_of_the_paper():
    """PE(pos, 2d) = sin(pos / 10000^(2d/width)), PE(pos, 2d + 1) = cos of the same."""
    tokens, width = 9, 10
    table = torch.empty(tokens, width, dtype=torch.float64)
    for position in range(tokens):
        for d in range(width // 2):
            angle = position / 10000 ** (2 * d / width)
            table[position, 2 * d], table[position, 2 * d + 1] = math.sin(angle), math.cos(angle)
    ids = torch.zeros(tokens, dtype=torch.long)
    found = input_kernel(ids, positions="sinusoidal", position_weight=1.0, width=width)
    torch.testing.assert_close(found, 2 / width * table @ table.mT, rtol=0, atol=1e-14)
    mixed = input_kernel(ids, positions="sinusoidal", position_weight=0.25, width=width)
    torch.testing.assert_close(mixed, 0.75 + 0.25 * found, rtol=0, atol=1e-14)


def test_the_mean_over_random_embeddings():
    draws, width, weight = 20_000, 4, 0.3
    ids = torch.tensor([0, 2, 0, 1])
    token = torch.randn(draws, 3, width, dtype=torch.float64)
    position = torch.randn(draws, 4, width, dtype=torch.float64)
    x = math.sqrt(1 - weight) * token[:, ids] + math.sqrt(weight) * position
    expected = input_kernel(ids, positions="learned", position_weight=weight)
    assert_mean(kernel_of(x), expected)
    assert torch.equal(expected.diagonal(), torch.ones(4, dtype=torch.float64))


# Statistics


def test_statistics_of_known_kernels():
    kernels = torch.stack(
        (
            4 * torch.eye(4),
            torch.ones(4, 4),
            input_kernel(torch.tensor([0, 0, 1, 1])).float(),
            torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])) + 0.5 * (1 - torch.eye(4)),
        )
    ).double()
    propagation = Propagation(kernels)
    assert (propagation.layers, propagation.tokens) == (3, 4)
    mean = propagation.mean_correlation()
    off = [0.5 / math.sqrt(i * j) for i in range(1, 5) for j in range(1, 5) if i != j]
    assert mean.tolist() == pytest.approx([0, 1, 1 / 3, sum(off) / 12], abs=1e-15)
    rank = propagation.effective_rank()
    assert rank[:3].tolist() == pytest.approx([4, 1, 2], rel=1e-12)
    assert 3 < rank[3] < 4
    missed = propagation.deviation([torch.ones(4, 4), torch.eye(4), USPA(0.0, 0.5)])
    assert missed.tolist() == pytest.approx([0, 1, 3])


def test_a_token_of_variance_zero_correlates_with_none():
    kernel = torch.diag(torch.tensor([1.0, 0.0])).double()
    assert propagate(kernel, []).correlations()[0].tolist() == [[1, 0], [0, 0]]


def test_input_and_state_of_torch_are_left_alone():
    sigma0 = random_kernel(5).float().requires_grad_()
    before = sigma0.detach().clone()
    rate = torch.tensor(0.1, requires_grad=True)
    schedule = [ESPA(1.0, rate)]
    found = propagate(sigma0, schedule)
    assert found.kernels.dtype == torch.float64 and not found.kernels.requires_grad
    assert not found.deviation(schedule).requires_grad
    assert torch.equal(sigma0.detach(), before)
    with torch.device("meta"):
        again = propagate(sigma0, [None]).mean_correlation()
        assert (
            input_kernel(torch.arange(3, device="cpu"), positions="sinusoidal").device.type == "cpu"
        )
    assert torch.equal(again, propagate(sigma0, [None]).mean_correlation())


# Errors


def test_arguments_of_propagate():
    eye = torch.eye(3)
    for sigma0, error, message in (
        (eye.tolist(), TypeError, "sigma0 must be a torch.Tensor"),
        (eye.int(), TypeError, "sigma0 must be float64 or float32"),
        (eye[None], ValueError, r"sigma0 must be one \(m, m\) matrix"),
        (eye[:2], ValueError, "sigma0 must be"),
        (-eye, ValueError, "sigma0 must be positive semidefinite"),
        (eye + torch.ones(3, 3).triu(1), ValueError, "sigma0 must be symmetric"),
    ):
        with pytest.raises(error, match=message):
            propagate(sigma0, [None])
    for prior, error, message in (
        ("espa", TypeError, r"priors\[1\] must be ESPA, USPA or a floating Tensor, got str"),
        (eye.long(), TypeError, r"priors\[1\] must be ESPA, USPA or a floating Tensor"),
        (torch.eye(4), ValueError, r"priors\[1\] must be \(T, T\) or \(H, T, T\) for T = 3"),
        (eye.log(), ValueError, r"priors\[1\] must be finite.*Pass A0, not its log"),
    ):
        with pytest.raises(error, match=message):
            propagate(eye, [None, prior])
    for change, error, message in (
        ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
        ({"has_normalization": None}, TypeError, "has_normalization must be True or False"),
        ({"skip_gain": "1"}, TypeError, "skip_gain must be a number"),
        ({"mlp_branch_gain": math.nan}, ValueError, "mlp_branch_gain must be finite"),
        ({"activation": "tanh"}, TypeError, "activation must be callable"),
        ({"activation": F.relu}, ValueError, "activation must be smooth"),
    ):
        with pytest.raises(error, match=message):
            propagate(eye, [None], **change)


def test_arguments_of_the_statistics():
    propagation = propagate(torch.eye(3), [None, None])
    with pytest.raises(ValueError, match="targets must have one for each of the 2 layers, got 1"):
        propagation.deviation([torch.eye(3)])
    with pytest.raises(TypeError, match=r"targets\[1\] must be ESPA, USPA or a floating Tensor"):
        propagation.deviation([torch.eye(3), None])
    with pytest.raises(ValueError, match="kernels must have at least two tokens"):
        propagate(torch.eye(1), [None]).mean_correlation()


def test_arguments_of_input_kernel():
    ids = torch.arange(4)
    for value, error, message in (
        ([0, 1], TypeError, "ids must be an integer Tensor, got list"),
        (ids.float(), TypeError, "ids must be an integer Tensor, got torch.float32"),
        (ids[None], ValueError, r"ids must be \(T,\)"),
        (ids[:0], ValueError, r"ids must be \(T,\)"),
    ):
        with pytest.raises(error, match=message):
            input_kernel(value)
    for change, error, message in (
        ({"positions": "rotary"}, ValueError, "positions must be one of None, 'learned'"),
        ({"position_weight": 1.5}, ValueError, "position_weight must be from 0 to 1"),
        ({"width": 7}, ValueError, "width must be even"),
    ):
        with pytest.raises(error, match=message):
            input_kernel(ids, **change)


def test_the_former_name_says_the_new_one():
    sys.modules.pop("shaped_attn.spa", None)
    with pytest.warns(DeprecationWarning, match=r"shaped_attn\.sde\.token_kernel"):
        former = importlib.import_module("shaped_attn.spa")
    assert former.propagate is propagate
