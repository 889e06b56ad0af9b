"""Real networks, run through shaped_attn.nn, against the formulas, the exact chain and the SDE."""

import math

import pytest
import torch
from covariances import generic, seeded, stop_at

from shaped_attn.nn import Projection
from shaped_attn.sde import CovarianceSDE, Detuning, FiniteNetwork, compare, equicorrelated, moments
from shaped_attn.testing import relative_error, rounding_error

DTYPE = torch.float64


# One step, from real weights: what the remaining weights add is averaged exactly

BRANCH_GAIN, TAU0 = 0.7, 0.5
SETTINGS = {"branch_gain": BRANCH_GAIN, "tau0": TAU0}


def stacked_block(network, networks, seed, dtype=torch.float32):
    """A block with a stack of those weights that are not averaged: W_Q, W_K and W_pre."""
    block = network.build_block(dtype=dtype)
    for name, module in block.named_modules():
        if isinstance(module, Projection) and name.split(".")[-1] in ("query", "key", "pre"):
            shape = (networks, *module.weight.shape)
            stack = torch.empty(shape, dtype=dtype)
            module.weight = torch.nn.Parameter(stack, requires_grad=False)
    block.reset_parameters(seeded(seed))
    return block


def inputs(network, v0, networks, dtype=torch.float32):
    """X (networks, m, n) of covariance V0; the law of what follows is the same for every such X."""
    x = math.sqrt(network.width) * torch.linalg.cholesky(v0)
    x = torch.nn.functional.pad(x, (0, network.width - v0.shape[0])).to(dtype)
    return x.expand(networks, *x.shape)


def attention_kernels(network, v0, networks, seed=0):
    """n gam^2 (mean_h A V A^T - V): its mean is the drift (W_V averages to this), by network.

    Each network is averaged with its mirror image, in which W_Q has the other sign: that removes
    the odd terms, which average to zero.
    """
    n, chunk = network.width, max(1, 2**22 // (network.width * network.head_dim * network.heads))
    found, plain = [], []
    for begin in range(0, networks, chunk):
        count = min(chunk, networks - begin)
        attention = stacked_block(network, count, seed + begin).attention
        x = inputs(network, v0, count)
        pair = []
        for _ in range(2):
            matrix = attention.attention_matrix(x, **network.visibility(count)).double()
            kernel = (matrix @ v0 @ matrix.mT).mean(1)
            pair.append(n * network.branch_gain**2 * (kernel - v0))
            attention.query.weight.neg_()
        found.append((pair[0] + pair[1]) / 2)
        plain.append(pair[0] / math.sqrt(n))
    return torch.cat(found), torch.cat(plain)


def mean_and_error(samples):
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


ATTENTION = {
    "m2": (2, {}),
    "m3": (3, {}),
    "m4": (4, {}),
    "m3 causal": (3, {"is_causal": True}),
    "m4 causal": (4, {"is_causal": True}),
    "m4 heads": (4, {"heads": 4}),
    "m4 gain": (4, {"softmax_gain": 1.5}),
    "m4 gain causal": (4, {"softmax_gain": 1.5, "is_causal": True}),
    "m4 gains of heads": (4, {"softmax_gain": (0.5, 2.0), "heads": 2}),
    "m4 padding": (4, {"key_start": 1, "key_end": 3}),
    "m4 window": (4, {"attn_mask": torch.ones(4, 4).tril().triu(-1).bool()}),
    "m4 detuned": (4, {"detuning": Detuning(0.8, -1.1, 0.0), "is_causal": True}),
}


@pytest.mark.parametrize("width", [256, 1024])
@pytest.mark.parametrize("name", ATTENTION)
def test_drift_of_attention(name, width):
    tokens, changes = ATTENTION[name]
    v0 = generic(tokens)
    settings = {**SETTINGS, "mlp": False, **changes}
    network = FiniteNetwork(width=width, depth=1, head_dim=4, **settings)
    samples, _ = attention_kernels(network, v0, 6000)
    mean, error = mean_and_error(samples)
    drift = CovarianceSDE(**settings).drift(v0)
    # The bias O(1/n) of section 9, which grows with the drift and with the gain.
    bias = 11.0 / width * drift.abs().max()
    assert ((mean - drift).abs() < 4.5 * error + bias).all()


def test_drift_of_attention_is_reached_as_one_over_width():
    """Causal, where the bias is large: -9.5 / n on a drift of about 1 (section 9)."""
    v0 = generic(4)
    settings = {**SETTINGS, "mlp": False, "is_causal": True}
    drift = CovarianceSDE(**settings).drift(v0)
    where = drift.abs() == drift.abs().max()
    found = {}
    for width in (32, 128, 1024):
        network = FiniteNetwork(width=width, depth=1, head_dim=4, **settings)
        mean, error = mean_and_error(attention_kernels(network, v0, 12000)[0])
        found[width] = ((drift - mean)[where][0].item(), error[where][0].item())
    assert found[32][0] - found[128][0] > 3 * math.hypot(found[32][1], found[128][1])
    assert abs(found[1024][0]) < 3 * found[1024][1] + 0.012 * drift.abs().max()


@pytest.mark.parametrize("missing", ["trace terms (S1)", "s terms (S2)", "mask", "squared gain"])
def test_drift_of_attention_needs_every_term(missing):
    changes = {
        "trace terms (S1)": {},
        "s terms (S2)": {},
        "mask": {"is_causal": True},
        "squared gain": {"softmax_gain": 1.5},
    }[missing]
    v0 = generic(4)
    settings = {**SETTINGS, "mlp": False, **changes}
    network = FiniteNetwork(width=1024, depth=1, head_dim=4, **settings)
    mean, error = mean_and_error(attention_kernels(network, v0, 6000)[0])
    rows, _ = FiniteNetwork(width=8, depth=1, **settings).zero_logit_attention(4, v0)
    squared, gain = torch.ones(4, 4, dtype=DTYPE), torch.ones(4, dtype=DTYPE)
    if missing == "trace terms (S1)":
        squared = squared * 0
    elif missing == "s terms (S2)":
        gain = gain * 0
    elif missing == "mask":
        rows = torch.full((4, 4), 0.25, dtype=DTYPE)
    else:
        squared, gain = 1.5 * squared, 1.5 * gain  # of beta / tau0^2 in both
    wrong = BRANCH_GAIN**2 / TAU0**2 * moments.attention_drift(v0, rows, squared, gain)
    right = CovarianceSDE(**settings).drift(v0)
    allowed = 5 * error + 11 / 1024 * right.abs().max()
    assert ((mean - wrong).abs() > allowed).any()
    assert ((mean - right).abs() < allowed).all()


@pytest.mark.parametrize("width", [256, 1024])
@pytest.mark.parametrize(
    "name", ["m2", "m3", "m4", "m4 causal", "m4 heads", "m4 gain causal", "m4 gains of heads"]
)
def test_diffusion_of_the_attention_matrix(name, width):
    """The covariance of sqrt(n) gam^2 (mean_h A V A^T - V) is the term of Acal."""
    tokens, changes = ATTENTION[name]
    v0 = generic(tokens)
    settings = {**SETTINGS, "mlp": False, **changes}
    sde = CovarianceSDE(**settings)
    network = FiniteNetwork(width=width, depth=1, head_dim=8, **settings)
    count = 6000
    _, samples = attention_kernels(network, v0, count)
    expected = sde.diffusion(v0) - sde.kappa * moments.linear_diffusion(v0)
    found, error = covariance_and_error(samples)
    scale = diagonal_scale(expected)
    bias = 6.0 / width * scale  # "two to five times larger" at 256, section 11.3
    assert ((found - expected).abs() < 4.5 * error + bias).all()
    if name == "m4 heads":  # and 1 / H matters
        assert ((found - 4 * expected).abs() > 4.5 * error + bias).any()
    if name == "m4 causal":  # and so does which row's Jacobian goes with which logit
        transposed = expected.transpose(0, 1).transpose(1, 2)
        assert ((found - transposed).abs() > 4.5 * error + bias).any()


def covariance_and_error(samples):
    """Covariance tensor (m, m, m, m) of (N, m, m), and the standard error of each entry."""
    centred = (samples - samples.mean(0)).flatten(1)
    tokens = samples.shape[-1]
    mean = centred.mT @ centred / len(samples)
    square = (centred**2).mT @ (centred**2) / len(samples)
    error = (square - mean**2).clamp(min=0).sqrt() / math.sqrt(len(samples))
    shape = (tokens,) * 4
    return mean.view(shape), error.view(shape)


def diagonal_scale(sigma):
    """sqrt(Sigma_ij,ij Sigma_pq,pq), floored where a token sees only itself."""
    tokens = sigma.shape[0]
    size = sigma.reshape(tokens**2, tokens**2).diagonal().clamp(min=0).sqrt()
    return (size[:, None] * size).view(sigma.shape) + 1e-3 * size.max() ** 2


@pytest.mark.parametrize("width", [16, 256, 1024])
@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("mlp_ratio", [1.0, 0.25])
def test_drift_of_the_mlp(tokens, width, mlp_ratio):
    """n gam^2 (K - V), less its odd and linear parts, which average to zero; with c_n."""
    v0 = generic(tokens)
    settings = {**SETTINGS, "attention": False, "c_plus": 0.5, "mlp_ratio": mlp_ratio}
    network = FiniteNetwork(width=width, depth=1, **settings)
    hidden = round(mlp_ratio * width)
    count = 2**24 // (width * hidden)
    # float64: n magnifies the rounding of the slopes.
    mlp = stacked_block(network, count, 1, DTYPE).mlp
    x = inputs(network, v0, count, DTYPE)
    slopes = [1 + c / math.sqrt(width) for c in (0.5, -1.0)]
    correction = 2 / (slopes[0] ** 2 + slopes[1] ** 2)
    linear = mlp.pre(x)
    linear = linear @ linear.mT / hidden - v0
    found = 0
    for sign in (1, -1):
        sigma = mlp.hidden(sign * x)
        found = found + (correction * sigma @ sigma.mT / hidden - v0 - linear) / 2
    mean, error = mean_and_error(width * BRANCH_GAIN**2 * found)
    finite = CovarianceSDE(**settings, width=width).drift(v0)
    assert ((mean - finite).abs() < 4.5 * error + 1e-9).all()
    off = ~torch.eye(tokens, dtype=torch.bool)
    limit = CovarianceSDE(**settings).drift(v0)
    if width == 16:  # where c_n is far from 1
        assert ((mean - limit).abs() > 10 * error)[off].any()
    assert (limit - finite).abs().max() < 2 / math.sqrt(width) * finite.abs().max()


RAW = {
    "attention": ({"mlp": False}, 3),
    "attention causal heads": ({"mlp": False, "heads": 4, "is_causal": True}, 4),
    "Gaussian W_O": ({"mlp": False, "heads": 2, "out_proj": "gaussian"}, 3),
    "orthogonal W_O": ({"mlp": False, "heads": 2, "out_proj": "orthogonal"}, 3),
    "MLP": ({"attention": False}, 3),
    "wide MLP": ({"attention": False, "mlp_ratio": 4.0}, 2),
    "block": ({}, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RAW)
def test_diffusion_of_one_layer(name):
    """The covariance of sqrt(n) (V' - V) with every weight drawn, and the coefficient kappa."""
    changes, tokens = RAW[name]
    v0 = generic(tokens)
    settings = {**SETTINGS, **changes}
    width = 64 if name == "orthogonal W_O" else 256
    count = 2000 if "MLP" in name or name == "block" else 3000
    network = FiniteNetwork(width=width, depth=1, head_dim=8, **settings)
    sample = network.sample(v0, count, seeded(3), snapshots=2, eigenvalue_range=(0, math.inf))
    steps = math.sqrt(width) * (sample.final - v0)
    found, error = covariance_and_error(steps)
    sde = CovarianceSDE(**settings)
    sigma = sde.diffusion(v0)
    bias = 4.0 / width * diagonal_scale(sigma)
    assert ((found - sigma).abs() < 4.5 * error + bias).all()
    linear = moments.linear_diffusion(v0)
    attention = sigma - sde.kappa * linear
    fitted = ((found - attention) * linear).sum() / linear.square().sum()
    for other in RAW:  # one of whose coefficients it would otherwise be
        kappa = CovarianceSDE(**{**SETTINGS, **RAW[other][0]}).kappa
        if abs(kappa - sde.kappa) > 0.15:
            assert abs(fitted - sde.kappa) < abs(fitted - kappa)
    assert abs(fitted - sde.kappa) < 0.06 * sde.kappa + 8.0 / width


# Many layers


LAWS = {
    "one head": {"mlp": False},
    "causal heads": {"mlp": False, "heads": 2, "is_causal": True},
    "Gaussian W_O": {"heads": 2, "out_proj": "gaussian", "mlp_ratio": 2.0},
    "orthogonal W_O": {"mlp": False, "heads": 4, "out_proj": "orthogonal"},
    "gains": {"mlp": False, "heads": 2, "softmax_gain": (1.5, 0.5), "center_gain": (1.0, 0.8)},
    "one gain for all": {"mlp": False, "identity_gain": 0.9, "center_gain": 0.8, "skip_gain": 0.7},
    "padding and mask": {
        "mlp": False,
        "key_start": 1,
        "attn_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool(),
    },
    "key end": {"mlp": False, "key_end": 2},
    "detuning": {"detuning": Detuning(1.0, -2.0, 1.5), "c_plus": 0.5},
    "no width in the temperature": {"mlp": False, "scale": "standard"},
    "a number as scale": {"mlp": False, "scale": 0.3},
}


@pytest.mark.parametrize("name", LAWS)
def test_networks_have_the_law_of_the_chain(name):
    """Two descriptions of the same thing; test_chain.py has a third, written out."""
    network = FiniteNetwork(width=16, depth=3, tau0=0.3, branch_gain=0.7, **LAWS[name])
    v0 = generic(3)
    samples = [
        network.sample(
            v0, 5000, seeded(5), method=method, eigenvalue_range=(0, math.inf), snapshots=2
        )
        for method in ("network", "chain")
    ]
    comparison = compare(*samples, level=0.01 / len(LAWS))
    assert comparison.agrees, comparison.largest


@pytest.mark.parametrize("method", ["network", "chain"])
def test_the_input_has_exactly_the_covariance_v0(method):
    network = FiniteNetwork(width=24, depth=2, heads=2, mlp=False)
    v0 = generic(4)
    sample = network.sample(v0, 20, seeded(), method=method, dtype=DTYPE)
    start = sample.covariances[0]
    torch.testing.assert_close(start, v0.expand_as(start), rtol=1e-12, atol=1e-12)
    assert torch.equal(sample.times, torch.arange(3, dtype=DTYPE) / 24)
    assert (sample.source, sample.paths, sample.is_complete) == (method, 20, True)


@pytest.mark.parametrize("method", ["network", "chain"])
def test_networks_run_where_v0_is(method, device):
    network = FiniteNetwork(width=24, depth=2, heads=2)
    v0 = generic(4).to(device)
    sample = network.sample(v0, 20, torch.Generator(device).manual_seed(0), method=method)
    found = (sample.covariances, sample.stop_times, sample.exploded)
    assert all(x.device == device for x in found)
    assert sample.covariances.isfinite().all()
    start = sample.covariances[0]
    # Sums of 4 in X, in float32, and of 24 in V.
    assert relative_error(start, v0.expand_as(start)) <= (2 * 4 + 24) * rounding_error(
        torch.float32
    )


def test_weights_differ_between_layers_and_networks():
    network = FiniteNetwork(width=16, depth=2, mlp=False)
    sample = network.sample(equicorrelated(2, 0.0), 3, seeded())
    steps = sample.covariances.diff(dim=0)[:, :, 0, 1].flatten()
    assert len(set(steps.tolist())) == 6


@pytest.mark.slow
@pytest.mark.parametrize("branch_gain", [0.5, 0.7])
@pytest.mark.parametrize("mlp", [False, True])
def test_end_of_depth(mlp, branch_gain):
    """Depth = width = 256, m = 4: 4,096 networks, exact in law, against 4,096 paths of the SDE.

    A step a layer: at branch gain 0.7, 64 steps alone take V_11 to the critical value.
    """
    settings = {"branch_gain": branch_gain, "mlp": mlp}
    v0 = equicorrelated(4, 0.2)
    network = FiniteNetwork(width=256, depth=256, **settings)
    measured = network.sample(v0, 4096, seeded(11), method="chain", snapshots=2)
    predicted = CovarianceSDE(width=256, **settings).sample(
        v0, 1.0, 4096, 256, seeded(12), snapshots=2
    )
    comparison = compare(predicted, measured, level=0.01)
    assert comparison.agrees, comparison.largest


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"mlp": False, "branch_gain": 0.7}, {"branch_gain": 0.5}])
def test_end_of_depth_with_every_weight_drawn(settings):
    v0 = equicorrelated(4, 0.2)
    network = FiniteNetwork(width=64, depth=64, head_dim=16, **settings)
    measured = network.sample(v0, 1000, seeded(13), snapshots=2)
    predicted = CovarianceSDE(width=64, **settings).sample(
        v0, 1.0, 4096, 64, seeded(14), snapshots=2
    )
    comparison = compare(predicted, measured, level=0.01)
    assert comparison.agrees, comparison.largest
    other = CovarianceSDE(width=64, **{**settings, "branch_gain": 0.9}).sample(
        v0, 1.0, 4096, 64, seeded(14), snapshots=2
    )
    assert not compare(other, measured, level=0.01).agrees


# What shaping prevents: covariance-sde.md, section 4 and table 11.7


def unshaped(**changes):
    network = FiniteNetwork(width=256, depth=8, head_dim=16, mlp=False, branch_gain=0.5, **changes)
    sample = network.sample(
        equicorrelated(4, 0.2),
        24,
        seeded(2),
        dtype=DTYPE,
        snapshots=9,
        eigenvalue_range=(0, math.inf),
    )
    # Of the tokens' mean, and of their differences to it.
    v = sample.covariances.mean(1)
    mean_mode = v.mean((-2, -1))
    difference_mode = v.diagonal(dim1=-2, dim2=-1).mean(-1) - mean_mode
    return mean_mode, difference_mode


def per_layer(mode):
    return (mode[8] / mode[0]).item() ** (1 / 8)


def test_without_centring_the_rank_collapses_and_norms_explode():
    mean_mode, difference_mode = unshaped(center_gain=0.0)
    assert per_layer(mean_mode) == pytest.approx(1 + 3 * 0.5**2, rel=0.02)
    assert per_layer(difference_mode) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("scale", ["width", "standard"])
def test_plain_softmax_collapses(scale):
    plain = {"identity_gain": 0.0, "center_gain": 0.0, "skip_gain": 0.75**0.5}
    mean_mode, difference_mode = unshaped(scale=scale, **plain)
    assert per_layer(mean_mode) == pytest.approx(1.0, rel=0.02)
    assert per_layer(difference_mode) == pytest.approx(1 - 0.5**2, rel=0.02)


def test_without_width_in_the_temperature_norms_grow():
    """Centred at the standard temperature: n E[V' - V] is 6.1 at n = 256, and no collapse."""
    mean_mode, difference_mode = unshaped(scale="standard")
    growth = 256 * math.log(per_layer(mean_mode + difference_mode))
    assert 4 < growth < 10
    assert difference_mode[8] > difference_mode[0]
    shaped = unshaped()
    assert abs(256 * math.log(per_layer(shaped[0] + shaped[1]))) < 3


# Interface


def test_stop_keeps_finished_chunks():
    seen = []
    sample = FiniteNetwork(width=8, depth=5, mlp=False).sample(
        equicorrelated(2, 0.1),
        10,
        seeded(),
        chunk=4,
        stop=stop_at(13),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert (sample.paths, sample.requested, sample.is_complete) == (8, 10, False)
    assert seen[0] == (4, 50) and seen == sorted(seen)


def test_a_generator_makes_it_repeatable():
    network = FiniteNetwork(width=8, depth=3)
    samples = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        samples.append(network.sample(equicorrelated(2, 0.1), 6, seeded(7)).covariances)
    assert torch.equal(*samples)


def test_frozen_networks_do_not_hold_up_the_others():
    network = FiniteNetwork(width=16, depth=16, mlp=False, branch_gain=1.0, tau0=0.05)
    sample = network.sample(equicorrelated(3, 0.2), 200, seeded(), eigenvalue_range=(1e-2, 50))
    assert sample.covariances.isfinite().all()
    assert 0 < sample.stopped.sum() <= 200
    values = torch.linalg.eigvalsh(sample.final)
    assert values.min() >= 1e-2 * (1 - 1e-6) and values.max() <= 50 * (1 + 1e-6)


def test_all_networks_may_be_frozen():
    """An empty batch was once run through the block, which failed."""
    network = FiniteNetwork(width=16, depth=16, center_gain=0.0)
    seen = []
    sample = network.sample(
        equicorrelated(4, 0.2),
        8,
        seeded(),
        eigenvalue_range=(1e-4, 10.0),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert sample.exploded.all() and sample.stop_times.max() < 1
    assert torch.equal(sample.covariances[-1], sample.covariances[-2])
    assert seen[-1] == (128, 128)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 0}, "width must be at least 1"),
        ({"depth": 2.0}, "depth must be an int"),
        ({"heads": 3}, "heads must divide width, 8, got 3"),
        ({"scale": "wide"}, "scale must be one of"),
        ({"scale": -1.0}, "scale must be greater than 0"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"detuning": Detuning(variance=-7.0)}, "detuning.variance must be at least .* = -6"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FiniteNetwork(**{"width": 8, "depth": 2, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v0": -torch.eye(2, dtype=DTYPE)}, "v0 must be positive semidefinite"),
        ({"networks": 0}, "networks must be at least 1"),
        ({"method": "exact"}, "method must be one of"),
        ({"generator": 0}, "generator must be a torch.Generator"),
        ({"dtype": torch.int32}, "dtype must be a floating dtype"),
        ({"v0": torch.eye(9, dtype=DTYPE)}, "width must be at least 9 for networks of 9 tokens"),
        (
            {"v0": torch.eye(5, dtype=DTYPE), "method": "chain"},
            "width must be at least 10 for the chain of 5",
        ),
        ({"snapshots": 1}, "snapshots must be at least 2"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_arguments_of_sample_are_checked(change, message):
    arguments = {"v0": equicorrelated(2, 0.1), "networks": 3, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        FiniteNetwork(width=8, depth=2).sample(**arguments)


def test_networks_take_no_prior():
    network = FiniteNetwork(width=8, depth=2, prior=torch.ones(2, 2))
    with pytest.raises(ValueError, match='prior must be None for method="network"'):
        network.sample(equicorrelated(2, 0.1), 2)
    assert network.sample(equicorrelated(2, 0.1), 2, method="chain").paths == 2
