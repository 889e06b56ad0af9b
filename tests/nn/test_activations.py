"""TAT and DKS, and the Gaussian expectations behind them, against closed forms and Monte Carlo."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shaped_attn.nn import activations
from shaped_attn.nn.activations import (
    DKSActivation,
    DKSConstants,
    TailoredLeakyReLU,
    activation_kernel,
    correlation_map,
    dks_constants,
    tat_slope,
)

EPS = torch.finfo(torch.float64).eps
RHO = torch.tensor([-1.0, -0.7, -0.2, 0.0, 0.3, 0.8, 0.999, 1.0], dtype=torch.float64)
EYE = torch.eye(2)
UNIT, BAD = DKSConstants(1.0, 0.0, 1.0, 0.0), DKSConstants(1.0, 0.0, math.nan, 0.0)
SMOOTH = {
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "silu": F.silu,
    "erf": torch.erf,
}


def leaky_relu_map(rho, slope):
    """As Cho and Saul write it: (1-s)^2 (sqrt(1-r^2) + (pi - arccos r) r) / pi + 2 s r."""
    arc = np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho
    return ((1 - slope) ** 2 * arc / np.pi + 2 * slope * rho) / (1 + slope**2)


def gaussian_mean(f, nodes=400):
    """E[f(z)], by the rule of Gauss and Legendre on [-12, 12]."""
    x, weights = np.polynomial.legendre.leggauss(nodes)
    z = torch.tensor(12 * x)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float((12 * torch.tensor(weights) * density * f(z)).sum())


def with_slope(phi):
    """The derivative of phi, by autograd."""

    def derivative(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(phi(z).sum(), z)[0]

    return derivative


def gaussian_pairs(kernel, count, generator):
    """(T, count) draws of N(0, kernel)."""
    root = torch.linalg.cholesky(kernel)
    return root @ torch.randn(len(kernel), count, dtype=torch.float64, generator=generator)


def assert_mean(samples, expected, sigmas=4.5):
    """That samples (..., count) average to what is expected, in standard errors."""
    error = samples.std(-1) / math.sqrt(samples.shape[-1])
    assert ((samples.mean(-1) - expected).abs() <= sigmas * error + 1e-12).all()


# Leaky ReLU


@pytest.mark.parametrize("slope", [0.0, 0.35, 1.0])
def test_tailored_leaky_relu_equals_its_formula(slope):
    module = TailoredLeakyReLU(slope)
    x = torch.randn(3, 50, dtype=torch.float64)
    expected = math.sqrt(2 / (1 + slope**2)) * (x.clamp(min=0) + slope * x.clamp(max=0))
    torch.testing.assert_close(module(x), expected, rtol=2 * EPS, atol=0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert module(x.to(dtype)).dtype == dtype
    # The two halves of the line have second moments 1/2 and slope^2/2.
    assert gaussian_mean(lambda z: module(z).square()) == pytest.approx(1, rel=1e-12)
    assert repr(module) == f"TailoredLeakyReLU(slope={slope:g})"
    assert not list(module.parameters())


@pytest.mark.parametrize("slope", [0.0, 0.2, 0.9, 1.0])
def test_map_of_leaky_relu_is_the_closed_form(slope):
    found = correlation_map(TailoredLeakyReLU(slope), RHO)
    np.testing.assert_allclose(found.numpy(), leaky_relu_map(RHO.numpy(), slope), atol=4 * EPS)
    np.testing.assert_array_equal(found, correlation_map(nn.LeakyReLU(slope), RHO))
    if slope == 0:
        np.testing.assert_array_equal(found, correlation_map(nn.ReLU(), RHO))


@pytest.mark.parametrize("module", [TailoredLeakyReLU(0.4), nn.LeakyReLU(0.2), nn.ReLU()])
def test_kernel_of_leaky_relu_against_monte_carlo(module):
    kernel = torch.tensor([[1.7, 0.5, -0.9], [0.5, 0.4, 0.1], [-0.9, 0.1, 1.2]]).double()
    u = module(gaussian_pairs(kernel, 400_000, torch.Generator().manual_seed(1)))
    assert_mean(u[:, None] * u[None], activation_kernel(module, kernel))


# Smooth activations


def test_map_of_smooth_activations_is_the_closed_form():
    for phi, expected in (
        (torch.erf, torch.asin(2 * RHO / 3) / math.asin(2 / 3)),
        (torch.sin, torch.sinh(RHO) / math.sinh(1)),
        (torch.cos, torch.cosh(RHO) / math.cosh(1)),
        (lambda x: x.square(), (1 + 2 * RHO.square()) / 3),
        (lambda x: x, RHO),
    ):
        found = correlation_map(phi, RHO)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * EPS)


def test_kernel_with_any_diagonal_is_the_closed_form():
    """E[erf(u) erf(v)] = (2/pi) arcsin(2 K_uv / sqrt((1 + 2 K_uu)(1 + 2 K_vv))), Williams 1997."""
    factor = torch.randn(6, 6, dtype=torch.float64)
    kernel = factor @ factor.mT / 3
    kernel[0] = kernel[:, 0] = 0  # a token of variance 0
    size = 1 + 2 * kernel.diagonal()
    expected = 2 / math.pi * torch.asin(2 * kernel / (size[:, None] * size).sqrt())
    found = activation_kernel(torch.erf, kernel)
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * EPS)
    assert found[0, 0] == 0


@pytest.mark.parametrize("name", SMOOTH)
def test_map_of_smooth_activations_against_quadrature_in_two_dimensions(name):
    phi = SMOOTH[name]
    x, weights = np.polynomial.legendre.leggauss(160)
    z = torch.tensor(9 * x)
    mass = 9 * torch.tensor(weights) * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    square = mass @ phi(z).square()
    for rho in (-0.9, 0.2, 0.7):
        v = rho * z[:, None] + math.sqrt(1 - rho**2) * z
        expected = (mass * phi(z)) @ phi(v) @ mass / square
        assert float(correlation_map(phi, rho)) == pytest.approx(float(expected), abs=1e-13)


@pytest.mark.parametrize("name", SMOOTH)
def test_kernel_of_smooth_activations_against_monte_carlo(name):
    kernel = torch.tensor([[1.7, 0.5, -0.9], [0.5, 0.4, 0.1], [-0.9, 0.1, 1.2]]).double()
    u = SMOOTH[name](gaussian_pairs(kernel, 400_000, torch.Generator().manual_seed(2)))
    assert_mean(u[:, None] * u[None], activation_kernel(SMOOTH[name], kernel))


def test_map_is_the_kernel_of_two_normalised_tokens():
    for phi in (torch.tanh, F.gelu, nn.ReLU()):
        kernel = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
        after = activation_kernel(phi, kernel)
        torch.testing.assert_close(after[0, 1] / after[0, 0], correlation_map(phi, 0.6))


@pytest.mark.parametrize("phi", [F.relu, torch.abs, F.selu, torch.sign])
def test_kinks_and_steps_are_noticed(phi):
    with pytest.raises(ValueError, match="activation must be smooth"):
        correlation_map(phi, 0.5)


def test_activations_too_narrow_for_the_kernel_are_noticed():
    assert activation_kernel(torch.tanh, 4 * torch.eye(2)).shape == (2, 2)
    with pytest.raises(ValueError, match="activation must be smooth.*smaller diagonal"):
        activation_kernel(torch.tanh, 400 * torch.eye(2))


# TAT


@pytest.mark.parametrize("layers", [1, 2, 36, 400])
@pytest.mark.parametrize("eta", [0.05, 0.25])
def test_slope_takes_the_map_of_all_layers_to_eta(layers, eta):
    slope = tat_slope(layers, eta)
    rho = 0.0
    for _ in range(layers):
        rho = leaky_relu_map(rho, slope)
    # Each layer rounds once, and d rho / d slope is at most 2 layers.
    assert rho == pytest.approx(eta, abs=8 * layers * EPS)


def test_slope_is_closer_to_one_in_deeper_networks():
    slopes = [tat_slope(layers) for layers in (13, 36, 72, 1000)]
    assert slopes == sorted(slopes)
    assert slopes[0] > 0 and slopes[-1] < 1


# DKS


@pytest.mark.parametrize("layers", [12, 36, 1000])
@pytest.mark.parametrize("name", SMOOTH)
def test_constants_satisfy_the_four_conditions(name, layers):
    phi = DKSActivation(SMOOTH[name], dks_constants(SMOOTH[name], layers, zeta=1.5))
    derivative = with_slope(phi)
    assert gaussian_mean(phi) == pytest.approx(0, abs=1e-11)
    assert gaussian_mean(lambda z: phi(z).square()) == pytest.approx(1, rel=1e-11)
    # The deviation from a linear network is what the conditions are about.
    excess = 1.5 ** (1 / layers) - 1
    q_slope = gaussian_mean(lambda z: z * phi(z) * derivative(z))
    assert (q_slope - 1) / excess == pytest.approx(0, abs=1e-7)
    c_slope = gaussian_mean(lambda z: derivative(z).square())
    assert (c_slope - 1) / excess == pytest.approx(1, abs=1e-7)


def test_slope_of_the_map_of_all_layers_is_zeta():
    layers, zeta, step = 36, 1.5, 1e-6
    phi = DKSActivation(torch.tanh, dks_constants(torch.tanh, layers, zeta))
    rho = torch.tensor([0.0, 1 - 2 * step, 1 - step, 1.0], dtype=torch.float64)
    for _ in range(layers):
        rho = correlation_map(phi, rho)
    assert float(rho[0]) == pytest.approx(0, abs=1e-12)
    # Differences of second order: an error of step^2, and rounding of layers EPS / step.
    slope = float(3 * rho[3] - 4 * rho[2] + rho[1]) / (2 * step)
    assert slope == pytest.approx(zeta, abs=36 * 8 * EPS / step)


def modified_resnet(value, layer):
    """Extreme of a property over subnetworks of the ResNet in the tests of google-deepmind/dks."""
    branch = layer(layer(layer(value)))
    for blocks in (3, 4, 23, 3):
        for block in range(blocks):
            skip = layer(value) if block == 0 else value
            value = 0.36 * skip + 0.64 * layer(layer(layer(value)))
    return max(layer(value), branch)


@pytest.mark.parametrize(
    ("phi", "expected"),
    [
        (
            F.softplus,
            DKSConstants(
                0.18761008168267976, 0.40688063442262007, 8.878672543665223, -0.9213466151411376
            ),
        ),
        (
            torch.tanh,
            DKSConstants(
                0.07461073057540868, 0.5566915199964182, 18.002635964442558, -0.5034378768692127
            ),
        ),
        (
            F.gelu,
            DKSConstants(
                0.07043253126531114, 0.259489297927707, 20.21158902315857, -0.15815378963603598
            ),
        ),
    ],
    ids=["softplus", "tanh", "gelu"],
)
def test_constants_are_those_of_the_implementation_of_the_paper(phi, expected):
    """Of its tests/test_activation_transform.py, for a slope of 1.2 of the whole ResNet."""
    low, high = 1.0, 1.1
    for _ in range(60):
        middle = (low + high) / 2
        too_steep = modified_resnet(1.0, lambda x, slope=middle: slope * x) > 1.2
        low, high = (low, middle) if too_steep else (middle, high)
    # One layer of that slope. There it was found to 1e-8 of the whole, and input_scale^2 is
    # proportional to its excess over 1, 0.0028: 1e-7 relative covers it.
    found = dks_constants(phi, 1, zeta=low)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_slope_of_the_implementation_of_the_paper():
    """Of the same tests, for C_f(0) = 0.75; found there to 1e-8."""
    module = TailoredLeakyReLU(0.6291800290346146)
    end = modified_resnet(0.0, lambda rho: float(correlation_map(module, rho)))
    assert end == pytest.approx(0.75, abs=1e-8)


def test_dks_activation_equals_its_formula():
    constants = DKSConstants(0.5, -0.25, 3.0, 0.1)
    x = torch.randn(4, 7, dtype=torch.float64)
    for phi in (torch.tanh, nn.Tanh()):
        module = DKSActivation(phi, constants)
        torch.testing.assert_close(module(x), 3.0 * (torch.tanh(0.5 * x - 0.25) + 0.1))
        assert module(x.bfloat16()).dtype == torch.bfloat16
        assert not module.state_dict()
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    numbers = "input_scale=0.5, input_shift=-0.25, output_scale=3, output_shift=0.1"
    assert repr(DKSActivation(torch.tanh, constants)) == f"DKSActivation(tanh, {numbers})"
    assert numbers in repr(DKSActivation(nn.Tanh(), constants))


@pytest.mark.parametrize("phi", [F.relu, torch.abs, lambda x: 2 * x, lambda x: 0 * x])
def test_activations_without_constants(phi):
    with pytest.raises(ValueError, match="activation must be"):
        dks_constants(phi, 36)


def test_constants_do_not_depend_on_the_state_of_torch():
    """A model may be built on a device without storage, or first used for inference."""
    expected = dks_constants(torch.tanh, 36), tat_slope(36)
    activations._hermite_weights.cache_clear()
    with torch.inference_mode():
        correlation_map(torch.tanh, 0.5)
    with torch.device("meta"), torch.no_grad():
        assert (dks_constants(torch.tanh, 36), tat_slope(36)) == expected
        assert float(correlation_map(nn.ReLU(), 0.0)) == pytest.approx(1 / math.pi)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: correlation_map("tanh", 0.5), TypeError, "activation must be callable, got str"),
        (lambda: activation_kernel(0.5, EYE), TypeError, "activation must be callable, got float"),
        (lambda: correlation_map(torch.tanh, 1.1), ValueError, "correlation must be from -1 to 1"),
        (lambda: correlation_map(torch.tanh, math.nan), ValueError, "correlation must be from -1"),
        (lambda: correlation_map(torch.zeros_like, 0.5), ValueError, "activation must not be 0 ev"),
        (lambda: tat_slope(1), ValueError, "eta must be below 0.3183, which 1 layers of"),  # 1 / pi
        (lambda: tat_slope(36, 1.0), ValueError, "eta must be below 0.9"),
        (lambda: tat_slope(36, 0.0), ValueError, "eta must be greater than 0"),
        (lambda: tat_slope(0), ValueError, "nonlinear_layers must be at least 1"),
        (lambda: tat_slope(2.0), TypeError, "nonlinear_layers must be an int"),
        (lambda: TailoredLeakyReLU(1.5), ValueError, "slope must be from 0 to 1"),
        (lambda: dks_constants(torch.tanh, 36, 1.0), ValueError, "zeta must be above 1, got 1.0"),
        (lambda: dks_constants(torch.tanh, 0), ValueError, "nonlinear_layers must be at least 1"),
        (lambda: dks_constants("tanh", 36), TypeError, "activation must be callable, got str"),
        (lambda: DKSActivation("tanh", UNIT), TypeError, "activation must be callable, got str"),
        (lambda: DKSActivation(torch.tanh, BAD), ValueError, "output_scale must be finite"),
    ],
)
def test_argument_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The rate of a shaped ReLU


def test_relu_excess_at_the_ends():
    """And beyond them, by rounding."""
    rho = torch.tensor([1.0, -1.0, 1 + 4 * EPS, -1 - 4 * EPS], dtype=torch.float64)
    found = activations.relu_excess(rho, 0.4, -1.1).tolist()
    assert found == pytest.approx([0, 1.5**2 / 2, 0, 1.5**2 / 2], rel=4 * EPS, abs=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relu_excess_of_close_tokens(dtype):
    """nu ~ (2 d)^{3/2} / (6 pi) for rho = 1 - d; the rounding of 1 - rho^2 once hid it.

    The two terms of nu are about sqrt(2 d) and good to a few ulps, which is a relative eps / d
    of their difference (2 d)^{3/2} / 3; the next order of that is a relative d.
    """
    d = 2.0 ** -torch.arange(6, 40 if dtype == torch.float64 else 16, dtype=torch.float64)
    found = activations.relu_excess((1 - d).to(dtype), 0.0, -1.0).double()
    expected = (2 * d) ** 1.5 / 3 / (2 * math.pi)
    allowed = d + 8 * torch.finfo(dtype).eps / d
    keep = allowed < 0.1
    assert keep.sum() >= 5
    assert ((found - expected).abs() <= allowed * expected)[keep].all()
    assert (found >= 0).all()
