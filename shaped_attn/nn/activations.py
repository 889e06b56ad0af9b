"""Activations that keep tokens apart in deep networks without skips and normalisation.

Two ways to choose them: Tailored Activation Transformation (TAT, arXiv 2203.08120) for the leaky
ReLU, and Deep Kernel Shaping (DKS, arXiv 2110.01765) for smooth activations. Both work on the
Gaussian expectations of an activation, which are here too, in float64 on the CPU:

    activation_kernel   E[phi(u_i) phi(u_j)]               for u ~ N(0, kernel)
    correlation_map     C(rho) = E[phi(u) phi(v)] / E[phi(u)^2]    for u, v ~ N(0, 1), E[u v] = rho

They are what a layer of infinite width does to the kernel of its tokens: of leaky ReLUs in closed
form, of smooth activations through their Hermite coefficients.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_number, check_positive, check_size

Activation = Callable[[Tensor], Tensor]
"""A function of numbers, applied to each entry of a Tensor."""

_NODES_PER_UNIT, _RANGE = 32, 13.0  # of the quadrature; N(0, 1) has no weight in float64 beyond
_TERMS = 512  # Hermite coefficients
_TAIL = 1e-12  # of the second moment, that they may leave out
_ROUNDING = 1e-12  # by which a correlation may exceed 1


class TailoredLeakyReLU(nn.Module):
    """The leaky ReLU of TAT, sqrt(2 / (1 + slope^2)) (max(x, 0) + slope min(x, 0)).

    The factor keeps the second moment: E[forward(x)^2] = q for x ~ N(0, q).

    Args:
        slope: for x < 0, from 0 (ReLU) to 1 (the identity); `tat_slope` finds it.

    Raises:
        TypeError, ValueError: ``slope`` is no number, or out of its range.

    References:
        Zhang et al., Deep Learning without Shortcuts: Shaping the Kernel with Tailored Rectifiers,
        arXiv 2203.08120.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = check_number("slope", slope, 0.0, 1.0)
        self.output_scale = math.sqrt(2 / (1 + self.slope**2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise: any shape and floating dtype, which stay."""
        return self.output_scale * F.leaky_relu(x, self.slope)

    def extra_repr(self) -> str:
        """Return the slope."""
        return f"slope={self.slope:g}"


def tat_slope(nonlinear_layers: int, eta: float = 0.9) -> float:
    """Return the slope with which the correlation map of all layers takes 0 to ``eta``.

    The slope s solves C(C(... C(0))) = eta, with as many C as there are nonlinear layers one after
    the other and no skips between them:

        C(rho) = rho + ((1 - s)^2 / (pi (1 + s^2))) (sqrt(1 - rho^2) - rho arccos(rho))

    Args:
        nonlinear_layers: how many; one for each MLP of a transformer.
        eta: correlation at the end of inputs that do not correlate, above 0 and below what ReLU
            (s = 0) reaches. Default 0.9, as in the paper's implementation; it takes 13 layers.

    Returns:
        The slope, between 0 and 1, for `TailoredLeakyReLU`.

    Raises:
        TypeError, ValueError: an argument is out of its range; no slope reaches ``eta``.

    References:
        arXiv 2203.08120; github.com/google-deepmind/dks, method "TAT" for "leaky_relu".
    """
    layers = check_size("nonlinear_layers", nonlinear_layers)
    eta = check_positive("eta", eta)

    def end(slope: Tensor) -> Tensor:
        rho = torch.zeros_like(slope)
        for _ in range(layers):
            rho = _leaky_relu_correlation(slope, rho)
        return rho

    most = float(end(torch.zeros((), dtype=torch.float64, device="cpu")))
    if eta >= most:
        raise ValueError(
            f"eta must be below {most:.4g}, which {layers} layers of ReLU reach, got {eta}. "
            "Take a smaller one, or more nonlinear layers."
        )
    low, high = 0.0, 1.0
    for _ in range(9):  # 64^9 = 2^54
        slopes = torch.linspace(low, high, 65, dtype=torch.float64, device="cpu")
        index = int((end(slopes[1:-1]) >= eta).sum())  # the end falls with the slope
        low, high = slopes[index : index + 2].tolist()
    return low


class DKSConstants(NamedTuple):
    """The four constants of `DKSActivation`."""

    input_scale: float
    input_shift: float
    output_scale: float
    output_shift: float


def dks_constants(activation: Activation, nonlinear_layers: int, zeta: float = 1.5) -> DKSConstants:
    """Return the constants of DKS for a smooth activation phi, by four conditions.

    For phi^(x) = output_scale (phi(input_scale x + input_shift) + output_shift), its maps of second
    moments and of correlations, Q(q) = E[phi^(sqrt(q) z)^2] for z ~ N(0, 1) and C, satisfy:

        Q(1) = 1        a second moment of 1 stays
        Q'(1) = E[z phi^(z) phi^'(z)] = 1        and so does, to first order, one near it
        C(0) = E[phi^(z)]^2 = 0        tokens that do not correlate stay so
        C'(1) = E[phi^'(z)^2] = zeta^(1 / nonlinear_layers)

    The last makes the slope at 1 of the map of all layers zeta, if they follow one another without
    skips; then no part of the network has a larger one. Where several sets of constants do, this
    is the first that a search finds from the starting points of the authors' implementation.

    Args:
        activation: phi: maps a Tensor (any shape, float64, CPU) elementwise, and smooth enough
            for its Hermite series (see `activation_kernel`).
        nonlinear_layers: how many; one for each MLP of a transformer.
        zeta: slope of the whole network, above 1. Default 1.5.

    Raises:
        TypeError, ValueError: an argument is out of its range; phi is not smooth; no constants are
            found, as for a linear phi.

    References:
        Martens et al., Rapid Training of Deep Neural Networks without Skip Connections or
        Normalization Layers using Deep Kernel Shaping, arXiv 2110.01765; the conditions are those
        of github.com/google-deepmind/dks, method "DKS".
    """
    from scipy.optimize import root

    _check_activation(activation)
    layers = check_size("nonlinear_layers", nonlinear_layers)
    zeta = check_number("zeta", zeta)
    if zeta <= 1:
        raise ValueError(
            f"zeta must be above 1, got {zeta}. The default is 1.5; 1 is a linear net."
        )
    excess = math.expm1(math.log(zeta) / layers)  # C'(1) - 1
    x, weights = _hermite_weights()
    k = torch.arange(_TERMS, dtype=torch.float64, device="cpu")

    def errors(point: Tensor) -> Tensor:
        """Return C'(1) - 1 over its target, minus 1, and Q'(1) - 1 over the same.

        With Hermite coefficients a_k of phi^, of which a_0 = 0 and the squares sum to 1,
        C'(1) = sum k a_k^2 and Q'(1) = C'(1) + sum sqrt(k (k - 1)) a_k a_{k-2}.
        """
        a = weights @ activation(point[0].exp() * x + point[1])  # output constants come at the end
        curved = ((k - 1) * a.square())[2:].sum()
        crossed = ((k * (k - 1)).sqrt()[3:] * a[3:] * a[1:-2]).sum()
        size = excess * a[1:].square().sum()
        return torch.stack((curved / size - 1, (curved + crossed) / size))

    def evaluate(point: list[float]) -> tuple:
        with torch.enable_grad():
            leaf = torch.tensor(point, dtype=torch.float64, device="cpu", requires_grad=True)
            found = errors(leaf)
            rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in found]
        return found.detach().numpy(), torch.stack(rows).numpy()

    for scale, shift in itertools.product((1.0, 0.1), (0.0, 1.0, -1.0)):
        found = root(evaluate, (math.log(scale), shift), jac=True, tol=1e-14)
        if abs(found.fun).max() < 1e-8:
            break
    else:
        raise ValueError(
            f"activation must be one whose correlation map can have the slope {1 + excess:.6g} at "
            f"1 while its second moment is stationary, got {activation}. "
            "Try another zeta, or a smooth nonlinear activation such as torch.tanh."
        )
    scale, shift = math.exp(found.x[0]), float(found.x[1])
    a = _hermite_coefficients(activation, scale * _one(), shift)[0]
    return DKSConstants(scale, shift, 1 / float(a[1:].norm()), -float(a[0]))


class DKSActivation(nn.Module):
    """The transformed activation of DKS.

    forward(x) = output_scale (activation(input_scale x + input_shift) + output_shift), elementwise.

    Args:
        activation: phi, as it was given to `dks_constants`.
        constants: what `dks_constants` returned.

    Raises:
        TypeError: the activation is not callable.

    Example:
        >>> phi = DKSActivation(torch.tanh, dks_constants(torch.tanh, nonlinear_layers=36))

    References:
        Martens et al., arXiv 2110.01765.
    """

    def __init__(self, activation: Activation, constants: DKSConstants) -> None:
        super().__init__()
        _check_activation(activation)
        self.activation = activation
        self.constants = DKSConstants(
            *map(check_number, DKSConstants._fields, DKSConstants(*constants))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise: any shape and floating dtype, which stay."""
        input_scale, input_shift, output_scale, output_shift = self.constants
        return output_scale * (self.activation(input_scale * x + input_shift) + output_shift)

    def extra_repr(self) -> str:
        """Return the activation, if it is a function, and the constants."""
        name = getattr(self.activation, "__name__", None)
        constants = [f"{key}={value:g}" for key, value in self.constants._asdict().items()]
        return ", ".join(([name] if name else []) + constants)


def correlation_map(activation: Activation, correlation: Tensor | float) -> Tensor:
    """Return C(rho) = E[phi(u) phi(v)] / E[phi(u)^2] for u, v ~ N(0, 1) with E[u v] = rho.

    Args:
        activation: phi, as in `activation_kernel`.
        correlation: rho, from -1 to 1, any shape.

    Returns:
        float64 on the CPU, of the shape of ``correlation``. C(1) = 1.

    Raises:
        TypeError, ValueError: the activation is not callable, is 0 or not smooth enough; a
            correlation is out of its range.

    References:
        Martens et al., arXiv 2110.01765: the local C map at q = 1.
    """
    _check_activation(activation)
    rho = torch.as_tensor(correlation, dtype=torch.float64, device="cpu")
    if not (rho.abs() <= 1 + _ROUNDING).all():
        raise ValueError(f"correlation must be from -1 to 1, got {rho}. Divide by the variances.")
    rho = rho.clamp(-1, 1)
    if (slopes := _slopes(activation)) is not None:
        return _leaky_relu_correlation(slopes[1] / slopes[0], rho)
    a = _hermite_coefficients(activation, _one())
    if not a.any():
        raise ValueError(f"activation must not be 0 everywhere, got {activation}. Choose another.")
    return (_product(a, rho.reshape(-1, 1)) / a.square().sum()).reshape(rho.shape)


def activation_kernel(activation: Activation, kernel: Tensor) -> Tensor:
    """Return E[phi(u_i) phi(u_j)] for u ~ N(0, kernel): the kernel after an infinitely wide layer.

    Of `TailoredLeakyReLU`, `torch.nn.LeakyReLU` and `torch.nn.ReLU` in closed form. Of any other
    activation as the sum over k of a_k(i) a_k(j) rho_ij^k, with rho the correlations of the kernel
    and a_k(i) the Hermite coefficients of phi(sqrt(kernel_ii) z), by quadrature. The terms left out
    are at most the E[phi^2] that the coefficients lack (Parseval), so a phi with kinks is noticed.

    Args:
        activation: phi: maps a Tensor (any shape, float64, CPU) elementwise.
        kernel: (T, T), symmetric and positive semidefinite, with any diagonal.

    Returns:
        (T, T) float64 on the CPU.

    Raises:
        TypeError: the activation is not callable.
        ValueError: it is not smooth enough: the terms left out exceed 1e-12 of E[phi^2].

    References:
        Mehler's formula. Closed form of ReLU: Cho and Saul, Kernel Methods for Deep Learning, 2009.
    """
    _check_activation(activation)
    kernel = kernel.to(device="cpu", dtype=torch.float64)
    size = kernel.diagonal().clamp(min=0).sqrt()
    rho = correlations(kernel)
    if (slopes := _slopes(activation)) is not None:
        high, low = slopes
        moment = (high**2 + low**2) / 2
        rho = _leaky_relu_correlation(low / high, rho)
        return moment * size[:, None] * rho * size
    return _product(_hermite_coefficients(activation, size), rho)


def correlations(kernel: Tensor) -> Tensor:
    """Return kernel_ij / sqrt(kernel_ii kernel_jj), (..., T, T); a token of variance 0 has none."""
    size = kernel.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = size[..., :, None] * size[..., None, :]
    return (kernel / scale.masked_fill(scale == 0, 1)).clamp(-1, 1)


def relu_excess(correlation: Tensor, c_plus: float, c_minus: float) -> Tensor:
    """Return nu(rho), the rate at which a shaped ReLU raises the covariance of two tokens.

    nu(rho) = ((c_plus - c_minus)^2 / (2 pi)) (sqrt(1 - rho^2) - rho arccos(rho)), equation (26) of
    covariance-sde.md; c_plus and c_minus are the slopes above and below 0.
    """
    rho = correlation.clamp(-1, 1)
    # Not 1 - rho^2, whose rounding is all that is left near rho = 1.
    rise = ((1 - rho) * (1 + rho)).sqrt() - rho * rho.arccos()
    return (c_plus - c_minus) ** 2 / (2 * math.pi) * rise


def _leaky_relu_correlation(slope: float | Tensor, correlation: Tensor) -> Tensor:
    return correlation + relu_excess(correlation, 1.0, slope) * (2 / (1 + slope**2))


def _slopes(activation: Activation) -> tuple[float, float] | None:
    """Return the slopes above and below 0 of an activation that is homogeneous."""
    if isinstance(activation, TailoredLeakyReLU):
        return activation.output_scale, activation.output_scale * activation.slope
    if isinstance(activation, nn.LeakyReLU):
        return 1.0, activation.negative_slope
    return (1.0, 0.0) if isinstance(activation, nn.ReLU) else None


@functools.cache
def _hermite_weights() -> tuple[Tensor, Tensor]:
    """Return nodes (N,) and weights (_TERMS, N), whose sum with f(nodes) is E[f(z) h_k(z)].

    h_k = He_k / sqrt(k!). The rule is the trapezoidal one, which for an analytic f converges
    geometrically here, where that of Gauss and Hermite does so in the root of N only.
    """
    with torch.inference_mode(False):  # the table is used with gradients too
        count = 2 * round(_RANGE * _NODES_PER_UNIT) + 1
        x = torch.linspace(-_RANGE, _RANGE, count, dtype=torch.float64, device="cpu")
        root = (x.square() / -4).exp() * (2 * math.pi) ** -0.25  # of the density
        rows = [root, x * root]
        for k in range(1, _TERMS - 1):
            rows.append((x * rows[-1] - math.sqrt(k) * rows[-2]) / math.sqrt(k + 1))
        return x, torch.stack(rows) * root / _NODES_PER_UNIT


def _hermite_coefficients(activation: Activation, scale: Tensor, shift: float = 0.0) -> Tensor:
    """Return E[phi(scale z + shift) h_k(z)], (T, fewest k that do) for scale (T,)."""
    x, weights = _hermite_weights()
    values = activation(scale[:, None] * x + shift).detach()
    a = values @ weights.T
    moment = values.square() @ weights[0]
    lacking = (moment - a.square().sum(-1)).abs()
    if not (lacking <= _TAIL * moment).all():
        raise ValueError(
            f"activation must be smooth, such that {_TERMS} Hermite coefficients leave out less "
            f"than {_TAIL:g} of its second moment, got {activation}, for which they leave out "
            f"{float((lacking / moment).max()):.2g}. "
            "Pass a (leaky) ReLU as a module; for others take a kernel with a smaller diagonal."
        )
    is_needed = (a.square() > torch.finfo(a.dtype).eps ** 2 * moment[:, None]).any(0)
    return a[:, : 1 + int(is_needed.nonzero().max())] if is_needed.any() else a[:, :1]


def _one() -> Tensor:
    return torch.ones(1, dtype=torch.float64, device="cpu")


def _product(a: Tensor, rho: Tensor) -> Tensor:
    """Return the sum over k of a_k(i) a_k(j) rho_ij^k, for a (T, K)."""
    total = torch.zeros_like(rho)
    for column in reversed(a.unbind(-1)):
        total = total * rho + column[:, None] * column
    return total


def _check_activation(activation: Activation) -> None:
    if not callable(activation):
        raise TypeError(
            f"activation must be callable, got {type(activation).__name__}. "
            "Pass a function or a module, such as torch.tanh or TailoredLeakyReLU(0.5)."
        )
