"""Integrators of the covariance SDE, with noise that is drawn in O(m^3).

Equation numbers are those of covariance-sde.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import fail
from .chain import ShapedMatrix, normal, root_of, wishart_factor
from .moments import mlp_drift

if TYPE_CHECKING:
    from .process import CovarianceSDE


class LimitChain:
    """The chain (66), which draws the logits and one Wishart matrix W for each step.

    The equation:

        K = skip_gain^2 V + branch_gain^2 mean_h(A_h V A_h^T)
        K <- K + branch_gain^2 dt mu_mlp(K)
        V' = C W C^T,    C C^T = K,    W ~ Wishart_m(nu) / nu,    nu = 1 / (kappa dt)

    A_h is the attention matrix of a network of the width 1 / dt, (5) with normal logits. K is a
    covariance and W is one, so V stays positive semidefinite. Mean and covariance of a step agree
    with drift dt and diffusion dt up to a relative O(dt).
    """

    def __init__(
        self, sde: CovarianceSDE, v0: Tensor, step: float, generator: torch.Generator | None
    ) -> None:
        self.sde, self.v0, self.size, self.generator = sde, v0, step, generator
        self.logit_scale = math.sqrt(step) / sde.tau0
        softmax_gain = sde.head_gains("softmax_gain", v0)
        self.shaped_matrix = ShapedMatrix(
            sde.zero_logit_attention(v0.shape[-1], v0),
            sde.identity_gain + sde.detuning.identity * step,
            softmax_gain,
            softmax_gain - sde.detuning.softmax * step,
        )
        self.squared_skip_gain = sde.skip_gain**2 + sde.detuning.variance * step
        if self.squared_skip_gain < 0:
            fail(
                ValueError,
                "detuning.variance",
                f"must be at least -skip_gain^2 * steps = {-(sde.skip_gain**2) / step:g} for the "
                "chain",
                f"{sde.detuning.variance:g}",
                "Give more steps, or a smaller detuning.",
            )

    def start(self, paths: int) -> Tensor:
        """Return a factor of V0 for each path, (paths, m, m)."""
        return root_of(self.v0).expand(paths, *self.v0.shape[-2:])

    def covariance(self, state: Tensor) -> Tensor:
        """Return (paths, m, m)."""
        return state @ state.mT

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return the factors after one step."""
        root = root_of(self.mean(state))
        noise = self.sde.kappa * self.size
        if noise == 0:
            return root
        return root @ wishart_factor(root.shape, 1 / noise, root, self.generator) * noise**0.5

    def mean(self, state: Tensor) -> Tensor:
        """Return K, (paths, m, m): the mean of V' given the logits, which it draws."""
        sde, v = self.sde, self.covariance(state)
        square = sde.branch_gain**2
        if sde.attention:
            paths, tokens = v.shape[:2]
            # Only the first two moments of the logits reach the limit, (7): they may be normal, and
            # float32, which is three times as fast to draw.
            g = normal((paths, sde.heads, tokens, tokens), v.new_empty(()).float(), self.generator)
            g = g.to(v.dtype)
            logits = self.logit_scale * state[:, None] @ g @ state.mT[:, None]
            roots = self.shaped_matrix(logits) @ state[:, None]  # (paths, H, m, m)
            roots = roots.transpose(1, 2).flatten(2)  # (paths, m, H m)
            v = torch.baddbmm(
                v, roots, roots.mT, beta=self.squared_skip_gain, alpha=square / sde.heads
            )
        if sde.mlp:
            rise = mlp_drift(v, sde.c_plus, sde.c_minus).mul_(square * sde.mlp_correction)
            v = v.add(rise.add_(v, alpha=sde.detuning.variance), alpha=self.size)
        return v


class EulerMaruyama:
    """The scheme (41) for V itself, as in the paper; for comparison, since it needs small steps."""

    def __init__(
        self, sde: CovarianceSDE, v0: Tensor, step: float, generator: torch.Generator | None
    ) -> None:
        self.sde, self.v0, self.size, self.generator = sde, v0, step, generator
        self.limit = sde.coefficients(v0.shape[-1], v0)

    def start(self, paths: int) -> Tensor:
        """Return V0 for each path."""
        return self.v0.expand(paths, *self.v0.shape[-2:])

    def covariance(self, state: Tensor) -> Tensor:
        """Return the state, (paths, m, m), which is V."""
        return state

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return V after one step."""
        drift = self.sde.drift_of(state, self.limit)
        noise = self.noise(state, root_of(state))
        moved = state + self.size * drift + math.sqrt(self.size) * noise
        return self._projected((moved + moved.mT) / 2)

    def noise(self, v: Tensor, factor: Tensor) -> Tensor:
        """Draw dN / sqrt(dt), whose covariance is the diffusion tensor, (39) and (40)."""
        sde, limit = self.sde, self.limit
        linear = factor @ normal(factor.shape, factor, self.generator) @ factor.mT
        noise = math.sqrt(limit.kappa / 2) * (linear + linear.mT)
        if sde.attention:
            logits = factor @ normal(factor.shape, factor, self.generator) @ factor.mT
            rows = limit.rows
            centred = logits - (rows * logits).sum(-1, keepdim=True)
            tilted = (limit.noise_gain[:, None] * rows * centred) @ v
            noise = noise + limit.noise_scale * (tilted + tilted.mT)
        return noise

    @staticmethod
    def _projected(v: Tensor) -> Tensor:
        """Raise eigenvalues to 1e-12 of the largest where V is not positive definite."""
        is_bad = (torch.linalg.cholesky_ex(v).info != 0) & v.isfinite().flatten(1).all(1)
        if is_bad.any():
            values, vectors = torch.linalg.eigh(v[is_bad])
            values = torch.maximum(values, 1e-12 * values[:, -1:].clamp(min=0))
            v = v.clone()
            v[is_bad] = (vectors * values[:, None, :]) @ vectors.mT
        return v
