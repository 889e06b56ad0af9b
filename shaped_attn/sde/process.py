"""The stochastic differential equation of the token covariance at infinite width and depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_positive, check_size, fail
from ..settings import documented, setting
from .integrators import Integrator, integrator_of
from .moments import Coefficients
from .paths import EIGENVALUE_RANGE, OnProgress, Stop, run
from .sample import CovarianceSample
from .settings import BlockSettings, variance_correction
from .start import check_covariance, check_start


@documented
@dataclass(frozen=True, kw_only=True, eq=False)
class CovarianceSDE(BlockSettings):
    """The law of V = X X^T / n when depth and width grow at a fixed ratio.

    As depth / width = t stays fixed, V of a network of `BlockSettings` converges to:

        dV = mu(V) dt + dN,      E[dN_ij dN_pq] = Sigma_{ij,pq}(V) dt

    with drift (15), (28), (30) and diffusion (16), (29), (33), (34) of covariance-sde.md; the case
    of one head, no mask and no W_O is that of arXiv 2306.17759. One layer is a step of dt = 1/n.
    The convergence is local: the drift is cubic and paths can blow up in finite time.

    Raises:
        ValueError: the gains have no limit: skip_gain^2 + (identity_gain branch_gain)^2 is not 1,
            the centre's gain is not that of softmax, or there is an MLP beside an identity gain
            other than 1.

    Example:
        >>> sde = CovarianceSDE(branch_gain=0.5, tau0=1.0)
        >>> sample = sde.sample(equicorrelated(4, 0.2), time=1.0, paths=4096, steps=64)
        >>> sample.quantiles()["rho_12"][-1]  # 5, 50 and 95 % at depth = width
    """

    width: int | None = setting(
        None,
        "Of a target network: multiplies the drift of the MLP by its c_n, the largest effect of a "
        "finite width (section 9).",
        check_size,
        none="the limit itself",
    )

    def __post_init__(self) -> None:
        """Check the settings, and that they have a limit."""
        super().__post_init__()
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
            rule = "must be 1 where there is an MLP, whose branch has no such gain"
            remedy = "Leave it out; a difference of order 1/width is detuning.identity."
            fail(ValueError, "identity_gain", rule, self.identity_gain, remedy)
        branch = self.attention_gain if self.attention else self.branch_gain
        total = self.skip_gain**2 + branch**2
        if abs(total - 1) > 1e-6:
            rule = "must satisfy skip_gain^2 + (identity_gain * branch_gain)^2 = 1 for a limit"
            got = f"{self.skip_gain:g}, which makes that {total:g}"
            remedy = "Leave it out; a difference of order 1/width is detuning.variance."
            fail(ValueError, "skip_gain", rule, got, remedy)

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
        kappa = 0.0
        if self.attention:
            square = self.attention_gain**2
            kappa += 2 * square if self.out_proj == "gaussian" else square * (2 - square)
        if self.mlp:
            square = self.branch_gain**2
            kappa += square * (2 - square + square / self.mlp_ratio)
        return kappa

    def drift(self, v: Tensor) -> Tensor:
        """Return mu(V), (..., m, m): the mean of dV / dt, covariance-sde.md (15), (28), (30), (35).

        Args:
            v: (..., m, m) float64 or float32, symmetric and positive semidefinite, on any device.

        Raises:
            TypeError, ValueError: V is none of that.
        """
        check_covariance("v", v)
        return self.coefficients(v.shape[-1], v).drift(v)

    def diffusion(self, v: Tensor) -> Tensor:
        """Return Sigma(V), (..., m, m, m, m): the covariance of dV_ij and dV_pq over dt.

        Sigma = kappa Sigma_lin + (branch_gain^4 / (H tau0^2)) Acal, covariance-sde.md (13), (14)
        and section 3.7. `sample` never forms this tensor of m^4 entries.

        Args:
            v: as in `drift`.
        """
        check_covariance("v", v)
        return self.coefficients(v.shape[-1], v).diffusion(v)

    def coefficients(self, tokens: int, like: Tensor | None = None) -> Coefficients:
        """Return what drift, diffusion and integrators need for ``tokens`` tokens.

        Args:
            tokens: m.
            like: has the dtype and the device of V. Default None: float64, on the CPU.
        """
        if like is None:
            like = torch.zeros((), dtype=torch.float64)
        zero_logit = self.zero_logit_attention(tokens, like)
        mass = zero_logit.mass
        head_gain = self.head_gains("softmax_gain", like)
        mean_square = head_gain.square().mean()
        # With an identity gain a, gam is a gam and beta is beta / a; only gam^2 beta is left of it.
        square = self.branch_gain**2
        return Coefficients(
            block=self,
            width=self.width,
            zero_logit=zero_logit,
            squared_gain=mean_square * mass[:, None] * mass,
            gain=self.identity_gain * head_gain.mean() * mass,
            noise_gain=mean_square.sqrt() * mass,
            kappa=self.kappa,
            mlp_correction=self.mlp_correction,
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
        integrator: Integrator | str = "chain",
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
            integrator: `Chain` (66), which keeps V positive semidefinite and needs steps >= 2m;
                `EulerMaruyama` (41), the scheme of the paper, which wants smaller steps; or the
                name of one. Default "chain".
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
        check_start(v0, eigenvalue_range, generator)
        check_positive("time", time)
        check_size("paths", paths)
        check_positive("steps", steps)
        integrator = integrator_of(integrator)
        limit = self.coefficients(v0.shape[-1], v0)
        count = integrator.count(limit, time, steps)
        return run(
            integrator.simulation(limit, v0, time / count, generator),
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
