"""The covariance that a simulation starts from, and what is asked of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, check_positive, check_size, fail
from .paths import check_range, locate

_PSD_TOLERANCE = 64.0  # of V, in units of m eps times its largest eigenvalue


def equicorrelated(
    tokens: int,
    correlation: float,
    variance: float = 1.0,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the (m, m) covariance of tokens of one variance and one correlation, rho_0.

    Args:
        tokens: m.
        correlation: from -1 / (m - 1), where it is singular, to 1.
        variance: V_ii. Default 1.0.
        dtype, device: of the result. Default float64, on the CPU.

    Raises:
        ValueError: no such covariance exists.
    """
    check_size("tokens", tokens)
    check_positive("variance", variance)
    check_number("correlation", correlation)
    least = -1 / (tokens - 1) if tokens > 1 else -1.0
    if not least - 1e-12 <= correlation <= 1:
        rule = f"must be from {least:g} to 1 for {tokens} tokens"
        fail(ValueError, "correlation", rule, correlation, "No covariance matrix has it.")
    identity = torch.eye(tokens, dtype=dtype, device=device)
    return variance * ((1 - correlation) * identity + correlation)


def check_covariance(name: str, v: Tensor, *, is_one: bool = False) -> None:
    """Check that ``v`` (..., m, m), or (m, m), is symmetric, finite and positive semidefinite."""
    if not isinstance(v, Tensor):
        fail(TypeError, name, "must be a torch.Tensor", type(v).__name__, "Pass a tensor.")
    if v.dtype not in (torch.float32, torch.float64):
        fail(TypeError, name, "must be float64 or float32", v.dtype, f"Use {name}.double().")
    if v.ndim < 2 or v.shape[-1] != v.shape[-2] or v.shape[-1] == 0:
        rule, got = "must be (..., m, m) for at least one token", f"shape {tuple(v.shape)}"
        fail(ValueError, name, rule, got, "Give a square matrix.")
    if is_one and v.ndim != 2:
        rule, got = "must be one (m, m) matrix", f"shape {tuple(v.shape)}"
        fail(ValueError, name, rule, got, "Pass one after the other.")
    if v.numel() == 0:
        return
    if not v.isfinite().all():
        fail(ValueError, name, "must be finite", "NaN or infinity in it", "Correct it.")
    rounding = _PSD_TOLERANCE * v.shape[-1] * torch.finfo(v.dtype).eps
    size = v.abs().amax((-2, -1))
    skew = (v - v.mT).abs().amax((-2, -1))
    if (skew > rounding * size).any():
        got = f"entries that differ from their mirror image by up to {float(skew.max()):.3g}"
        remedy = f"Use ({name} + {name}.mT) / 2 if that is rounding."
        fail(ValueError, name, "must be symmetric", got, remedy)
    values = torch.linalg.eigvalsh(v)
    lowest, highest = values[..., 0], values[..., -1]
    if (lowest < -rounding * highest.clamp(min=0)).any() or (highest < 0).any():
        got = f"an eigenvalue of {float(lowest.min()):.3g}"
        remedy = "A covariance X X^T / n has none below 0."
        fail(ValueError, name, "must be positive semidefinite", got, remedy)


def check_start(
    v0: Tensor, eigenvalue_range: tuple[float, float], generator: torch.Generator | None = None
) -> None:
    """Check that V0 is one covariance inside the admissible eigenvalues, and on what draws."""
    check_covariance("v0", v0, is_one=True)
    low, high = check_range(eigenvalue_range)
    if not locate(v0[None], low, high)[0].all():
        values = torch.linalg.eigvalsh(v0.double())
        fail(
            ValueError,
            "v0",
            f"must have eigenvalues from {low:g} to {high:g}",
            f"eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}",
            "Scale it, or set eigenvalue_range; (0, 1e4) admits dependent tokens.",
        )
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        rule, got = "must be a torch.Generator or None", type(generator).__name__
        remedy = "From a seed: torch.Generator(v0.device).manual_seed(seed)."
        fail(TypeError, "generator", rule, got, remedy)
    if generator.device.type != v0.device.type:
        rule = f"must be on the device of v0, {v0.device}"
        remedy = "Make it with torch.Generator(v0.device)."
        fail(ValueError, "generator", rule, generator.device, remedy)
