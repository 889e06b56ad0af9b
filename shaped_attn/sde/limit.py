"""Integrators of the covariance SDE, with noise that is drawn in O(m^3).

Equation numbers are those of covariance-sde.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..validation import fail
from .chain import ShapedMatrix, branch_step, lower_factor, normal, root_of, wishart_factor
from .moments import mlp_drift

if TYPE_CHECKING:
    from .process import CovarianceSDE


class LimitChain:
    """The chain (48): a network of the small width n' = 1 / dt, reduced to its covariance.

    V stays positive semidefinite by construction, since a factor of it is what moves. Mean and
    covariance of a step agree with drift dt and diffusion dt up to a relative O(dt).
    """

    def __init__(
        self, sde: CovarianceSDE, v0: Tensor, step: float, generator: torch.Generator | None
    ) -> None:
        self.sde, self.v0, self.generator = sde, v0, generator
        self.width = 1 / step
        self.scale = 1 / (sde.tau0 * math.sqrt(self.width))
        softmax_gain = sde.head_gains("softmax_gain", v0)
        self.shaped_matrix = ShapedMatrix(
            sde.zero_logit_attention(v0.shape[-1], v0),
            sde.identity_gain + sde.detuning.identity * step,
            softmax_gain,
            softmax_gain - sde.detuning.softmax * step,
        )
        square = sde.skip_gain**2 + sde.detuning.variance * step
        if square < 0:
            fail(
                ValueError,
                "detuning.variance",
                f"must be at least -skip_gain^2 * steps = {-(sde.skip_gain**2) / step:g} for the "
                "chain",
                f"{sde.detuning.variance:g}",
                "Give more steps, or a smaller detuning.",
            )
        self.skip_gain = math.sqrt(square)

    def start(self, paths: int) -> Tensor:
        """Return a factor of V0 for each path, (paths, m, m)."""
        return root_of(self.v0).expand(paths, *self.v0.shape[-2:])

    def covariance(self, state: Tensor) -> Tensor:
        """Return (paths, m, m)."""
        return state @ state.mT

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return the factors after one step."""
        if self.sde.attention:
            state = self._branch(state, self._attention(state))
        return self._branch(state, self._mlp(state)) if self.sde.mlp else state

    def _branch(self, state: Tensor, root: Tensor) -> Tensor:
        return branch_step(
            state, root, self.skip_gain, self.sde.branch_gain, self.width, self.generator
        )

    def _attention(self, factor: Tensor) -> Tensor:
        sde, (paths, tokens) = self.sde, factor.shape[:2]
        # Only the first two moments of the logits reach the limit, (7): they may be normal.
        g = normal((paths, sde.heads, tokens, tokens), factor, self.generator)
        logits = self.scale * factor[:, None] @ g @ factor.mT[:, None]
        root = self.shaped_matrix(logits) @ factor[:, None]
        if sde.heads == 1:
            root = root[:, 0]
        else:
            root = lower_factor(root.transpose(1, 2).flatten(2) / math.sqrt(sde.heads))
        if sde.out_proj == "gaussian":
            root = root @ self._wishart(factor, self.width)
        return root

    def _mlp(self, factor: Tensor) -> Tensor:
        sde = self.sde
        v = factor @ factor.mT
        excess = mlp_drift(v, sde.c_plus, sde.c_minus)
        root = root_of(v + sde.mlp_correction / self.width * excess)  # (27)
        return root @ self._wishart(factor, sde.mlp_ratio * self.width)

    def _wishart(self, factor: Tensor, degrees: float) -> Tensor:
        """Draw T with E[T T^T] = I and the fluctuation of ``degrees`` samples."""
        return wishart_factor(factor.shape, degrees, factor, self.generator) / math.sqrt(degrees)


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
