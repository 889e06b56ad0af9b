"""The stochastic differential equation of the token covariance at infinite width and depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_positive, check_size, fail
from . import moments
from .limit import EulerMaruyama, LimitChain
from .paths import EIGENVALUE_RANGE, OnProgress, Stop, check_range, locate, run
from .sample import CovarianceSample
from .settings import BlockSettings, variance_correction

INTEGRATORS = {"chain": LimitChain, "euler_maruyama": EulerMaruyama}

_PSD_TOLERANCE = 64.0  # of V, in units of m eps times its largest eigenvalue
_STEP_TOLERANCE = 1e-9  # rounding in time * steps that does not make one step more


class Coefficients(NamedTuple):
    """What drift and diffusion need for a number of tokens."""

    rows: Tensor  # (m, m) P0
    mass: Tensor  # (m,) row sums of A0
    squared_gain: Tensor  # (m, m) beta_i beta_j, mean over heads
    gain: Tensor  # (m,) beta_i, mean over heads
    noise_gain: Tensor  # (m,) root of the mean of beta_i^2 over heads
    kappa: float
    drift_scale: float  # gam^2 / tau0^2
    noise_scale: float  # gam^2 / (tau0 sqrt(H))


@dataclass(frozen=True, kw_only=True, eq=False)
class CovarianceSDE(BlockSettings):
    """The law of V = X X^T / n when depth and width grow at a fixed ratio.

    As depth / width = t stays fixed, V of a network of `BlockSettings` converges to:

        dV = mu(V) dt + dN,      E[dN_ij dN_pq] = Sigma_{ij,pq}(V) dt

    with drift (15), (28), (30) and diffusion (16), (29), (33), (34) of covariance-sde.md; the case
    of one head, no mask and no W_O is that of arXiv 2306.17759. One layer is a step of dt = 1/n.
    The convergence is local: the drift is cubic and paths can blow up in finite time.

    Args:
        width: of a target network: multiplies the drift of the MLP by its c_n, the largest effect
            of a finite width (section 9). Default None: the limit itself.

    The other arguments are those of `BlockSettings`.

    Raises:
        ValueError: the gains have no limit: skip_gain^2 + (identity_gain branch_gain)^2 is not 1,
            the centre's gain is not that of softmax, or there is an MLP beside an identity gain
            other than 1.

    Example:
        >>> sde = CovarianceSDE(branch_gain=0.5, tau0=1.0)
        >>> sample = sde.sample(equicorrelated(4, 0.2), time=1.0, paths=4096, steps=64)
        >>> sample.quantiles()["rho_12"][-1]  # 5, 50 and 95 % at depth = width
    """

    width: int | None = None

    def __post_init__(self) -> None:
        """Check the settings, and that they have a limit."""
        super().__post_init__()
        if self.width is not None:
            check_size("width", self.width)
        like = torch.zeros((), dtype=torch.float64)
        gains = [self.head_gains(name, like) for name in ("center_gain", "softmax_gain")]
        if not torch.equal(*gains):
            fail(
                ValueError,
                "center_gain",
                "must equal softmax_gain for a limit to exist",
                f"{self.center_gain} with softmax_gain {self.softmax_gain}",
                "Leave it out; a difference of order 1/width is detuning.softmax; "
                "FiniteNetwork runs any gains.",
            )
        if self.attention and self.mlp and self.identity_gain != 1:
            fail(
                ValueError,
                "identity_gain",
                "must be 1 where there is an MLP, whose branch has no such gain",
                self.identity_gain,
                "Leave it out; a difference of order 1/width is detuning.identity.",
            )
        total = self.skip_gain**2 + self.attention_gain**2 * self.attention
        if not self.attention:
            total += self.branch_gain**2
        if abs(total - 1) > 1e-6:
            fail(
                ValueError,
                "skip_gain",
                "must satisfy skip_gain^2 + (identity_gain * branch_gain)^2 = 1 for a limit to "
                "exist",
                f"{self.skip_gain:g}, which makes it {total:g}",
                "Leave it out; a difference of order 1/width is detuning.variance.",
            )

    @property
    def attention_gain(self) -> float:
        """Weight of V itself in the branch of attention: branch_gain * identity_gain."""
        return self.branch_gain * self.identity_gain

    @property
    def mlp_correction(self) -> float:
        """Factor of the drift of the MLP: c_n of the target width, 1 for the limit."""
        if self.width is None:
            return 1.0
        return variance_correction(self.c_plus, self.c_minus, self.width)

    @property
    def kappa(self) -> float:
        """Coefficient of Sigma_lin in the diffusion, covariance-sde.md 3.7."""
        return moments.linear_coefficient(
            self.branch_gain,
            attention=self.attention,
            mlp=self.mlp,
            out_proj=self.out_proj,
            mlp_ratio=self.mlp_ratio,
            attention_gain=self.attention_gain,
        )

    def drift(self, v: Tensor) -> Tensor:
        """Return mu(V), (..., m, m): the mean of dV / dt, covariance-sde.md (15), (28), (30), (35).

        Args:
            v: (..., m, m) float64 or float32, symmetric and positive semidefinite, on any device.

        Raises:
            TypeError, ValueError: V is none of that.
        """
        check_covariance("v", v)
        return self.drift_of(v, self.coefficients(v.shape[-1], v))

    def drift_of(self, v: Tensor, limit: Coefficients) -> Tensor:
        """Return `drift` for V that need no check."""
        drift = torch.zeros_like(v)
        if self.attention:
            pull = moments.attention_drift(v, limit.rows, limit.squared_gain, limit.gain)
            drift = drift + limit.drift_scale * pull
            tuned = (self.detuning.identity, self.detuning.softmax)
            if any(tuned):
                tuned = (tuned[0] * self.identity_gain, tuned[1] * self.identity_gain)
                pull = moments.detuning_drift(tuned, v, limit.mass[:, None] * limit.rows)
                drift = drift + self.branch_gain**2 * pull
        if self.mlp:
            rise = moments.mlp_drift(v, self.c_plus, self.c_minus)
            drift = drift + self.branch_gain**2 * self.mlp_correction * rise
        return drift + (self.attention + self.mlp) * self.detuning.variance * v

    def diffusion(self, v: Tensor) -> Tensor:
        """Return Sigma(V), (..., m, m, m, m): the covariance of dV_ij and dV_pq over dt.

        Sigma = kappa Sigma_lin + (branch_gain^4 / (H tau0^2)) Acal, covariance-sde.md (13), (14)
        and section 3.7. `sample` never forms this tensor of m^4 entries.

        Args:
            v: as in `drift`.
        """
        check_covariance("v", v)
        limit = self.coefficients(v.shape[-1], v)
        sigma = limit.kappa * moments.linear_diffusion(v)
        if self.attention:
            sigma = sigma + limit.noise_scale**2 * moments.attention_diffusion(
                v, limit.rows, limit.squared_gain
            )
        return sigma

    def coefficients(self, tokens: int, like: Tensor) -> Coefficients:
        """Return what drift and diffusion need for ``tokens`` tokens."""
        rows, mass = self.zero_logit_attention(tokens, like)
        head_gain = self.head_gains("softmax_gain", like)
        mean_square = head_gain.square().mean()
        # With an identity gain a, gam is a gam and beta is beta / a; only gam^2 beta is left of it.
        square = self.branch_gain**2
        return Coefficients(
            rows=rows,
            mass=mass,
            squared_gain=mean_square * mass[:, None] * mass,
            gain=self.identity_gain * head_gain.mean() * mass,
            noise_gain=mean_square.sqrt() * mass,
            kappa=self.kappa,
            drift_scale=square / self.tau0**2,
            noise_scale=abs(self.identity_gain) * square / (self.tau0 * math.sqrt(self.heads)),
        )

    def sample(
        self,
        v0: Tensor,
        time: float = 1.0,
        paths: int = 4096,
        steps: int = 256,
        generator: torch.Generator | None = None,
        *,
        integrator: str = "chain",
        snapshots: int = 33,
        eigenvalue_range: tuple[float, float] = EIGENVALUE_RANGE,
        chunk: int = 4096,
        on_progress: OnProgress | None = None,
        stop: Stop | None = None,
    ) -> CovarianceSample:
        """Simulate paths of V from V0.

        Args:
            v0: (m, m) the covariance of the input, float64 or float32: the dtype and the device of
                all arithmetic.
            time: the last time, depth / width. Default 1.0.
            paths: number of paths. Default 4096.
            steps: steps per unit of time. Default 256. The number of steps is rounded up. Medians
                need few; how many paths stop depends on it, since coarse steps of the chain miss
                some blow-ups and those of Euler-Maruyama invent some.
            generator: of the draws, on the device of v0. Default None: torch's own.
            integrator: "chain" (66), which keeps V positive semidefinite and needs steps >= 2m; or
                "euler_maruyama" (41), the scheme of the paper, which wants smaller steps. Default
                "chain".
            snapshots: number of times to record, V0 and the last among them. Default 33. They hold
                snapshots * paths * m^2 numbers.
            eigenvalue_range: a path is frozen before the step that takes an eigenvalue of V out of
                it, as in the paper. Default (1e-4, 1e4). A lower end of 0 puts no bound there.
            chunk: number of paths to run at a time. Default 4096.
            on_progress: called with the steps of paths done and to be done.
            stop: asked before each step; True ends the simulation with the chunks it has.

        Returns:
            The paths; fewer than asked for if ``stop`` ended it.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of its range, V0 is not
                positive semidefinite, or has an eigenvalue out of ``eigenvalue_range``.
        """
        check_start(v0, eigenvalue_range)
        check_positive("time", time)
        check_size("paths", paths)
        check_positive("steps", steps)
        check_generator(generator, v0)
        if integrator not in INTEGRATORS:
            fail(
                ValueError,
                "integrator",
                f"must be one of {tuple(INTEGRATORS)}",
                repr(integrator),
                'The default is "chain".',
            )
        count = max(1, math.ceil(time * steps - _STEP_TOLERANCE))
        step = time / count
        if integrator == "chain":
            least = self.least_steps(v0.shape[-1])
            if 1 / step < least * (1 - 1e-9):
                fail(
                    ValueError,
                    "steps",
                    f"must be at least {least} per unit of time for the chain of {v0.shape[-1]} "
                    "tokens",
                    f"{1 / step:g}",
                    "Give more steps.",
                )
        return run(
            INTEGRATORS[integrator](self, v0, step, generator),
            source="sde",
            paths=paths,
            steps=count,
            time=float(time),
            snapshots=snapshots,
            eigenvalue_range=eigenvalue_range,
            chunk=chunk,
            on_progress=on_progress,
            stop=stop,
        )

    def least_steps(self, tokens: int) -> int:
        """Return the fewest steps per unit of time that the chain takes for m tokens.

        They are 2m, or more: its Wishart matrix has to have m degrees of freedom, and the mean of
        its MLP to be a covariance, c_n (c_plus - c_minus)^2 / 4 steps, covariance-sde.md section 8.
        """
        least = max(2.0, self.kappa) * tokens
        if self.mlp:
            least = max(least, self.mlp_correction * (self.c_plus - self.c_minus) ** 2 / 4)
        return math.ceil(least)


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
        fail(
            ValueError,
            "correlation",
            f"must be from {least:g} to 1 for {tokens} tokens",
            correlation,
            "No covariance matrix has it.",
        )
    identity = torch.eye(tokens, dtype=dtype, device=device)
    return variance * ((1 - correlation) * identity + correlation)


def check_covariance(name: str, v: Tensor) -> None:
    """Check that ``v`` (..., m, m) is symmetric, finite and positive semidefinite."""
    if not isinstance(v, Tensor):
        fail(TypeError, name, "must be a torch.Tensor", type(v).__name__, "Pass a tensor.")
    if v.dtype not in (torch.float32, torch.float64):
        fail(TypeError, name, "must be float64 or float32", v.dtype, f"Use {name}.double().")
    if v.ndim < 2 or v.shape[-1] != v.shape[-2] or v.shape[-1] == 0:
        fail(
            ValueError,
            name,
            "must be (..., m, m) for at least one token",
            f"shape {tuple(v.shape)}",
            "Give a square matrix.",
        )
    if v.numel() == 0:
        return
    if not v.isfinite().all():
        fail(ValueError, name, "must be finite", "NaN or infinity in it", "Correct it.")
    rounding = _PSD_TOLERANCE * v.shape[-1] * torch.finfo(v.dtype).eps
    size = v.abs().amax((-2, -1))
    skew = (v - v.mT).abs().amax((-2, -1))
    if (skew > rounding * size).any():
        fail(
            ValueError,
            name,
            "must be symmetric",
            f"entries that differ from their mirror image by up to {float(skew.max()):.3g}",
            f"Use ({name} + {name}.mT) / 2 if that is rounding.",
        )
    values = torch.linalg.eigvalsh(v)
    lowest, highest = values[..., 0], values[..., -1]
    if (lowest < -rounding * highest.clamp(min=0)).any() or (highest < 0).any():
        fail(
            ValueError,
            name,
            "must be positive semidefinite",
            f"an eigenvalue of {float(lowest.min()):.3g}",
            "A covariance X X^T / n has none below 0.",
        )


def check_generator(generator: torch.Generator | None, v0: Tensor) -> None:
    """Check that ``generator`` is one on the device of V0, or None."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        fail(
            TypeError,
            "generator",
            "must be a torch.Generator or None",
            type(generator).__name__,
            "From a seed: torch.Generator(v0.device).manual_seed(seed).",
        )
    if generator.device.type != v0.device.type:
        fail(
            ValueError,
            "generator",
            f"must be on the device of v0, {v0.device}",
            generator.device,
            "Make it with torch.Generator(v0.device).",
        )


def check_start(v0: Tensor, eigenvalue_range: tuple[float, float]) -> None:
    """Check that V0 is one covariance, and inside the admissible eigenvalues."""
    check_covariance("v0", v0)
    if v0.ndim != 2:
        fail(
            ValueError,
            "v0",
            "must be one (m, m) matrix",
            f"shape {tuple(v0.shape)}",
            "Call sample once for each.",
        )
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
