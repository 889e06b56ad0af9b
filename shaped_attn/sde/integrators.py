"""Integrators of the covariance SDE, with noise that is drawn in O(m^3).

Equation numbers are those of covariance-sde.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, fail
from .chain import ShapedMatrix, normal, root_of, wishart_factor
from .moments import Coefficients, mlp_drift
from .paths import Simulation

# Steps per unit of time, and the fewest in total: of a prediction, and of medians by the chain.
_STEPS, _TOTAL_STEPS = 256, 64
_MEDIAN_STEPS, _TOTAL_MEDIAN_STEPS = 64, 16
_ROUNDING = 1e-9  # in time * steps that does not make one step more


class Integrator(ABC):
    """A scheme that moves V in steps of time; steps are counted per unit of time, depth / width.

    Attributes:
        name: on the command line and in JSON.
        title: in a sentence.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def simulation(
        self, limit: Coefficients, v0: Tensor, step: float, generator: torch.Generator | None
    ) -> Simulation:
        """Return what moves paths from V0 in steps of the size ``step``.

        Raises:
            ValueError: the scheme cannot take steps of that size for these settings.
        """

    @abstractmethod
    def least_steps(self, limit: Coefficients) -> int:
        """Return the fewest steps that the scheme takes."""

    def count(self, limit: Coefficients, time: float, steps: float) -> int:
        """Return how many steps there are up to ``time``, rounded up.

        Raises:
            ValueError: they are fewer than the scheme takes.
        """
        count = max(1, math.ceil(time * steps - _ROUNDING))
        least = self.least_steps(limit)
        if count / time < least * (1 - _ROUNDING):
            fail(
                ValueError,
                "steps",
                f"must be at least {least} per unit of depth / width for the {self.title} of "
                f"{len(limit.gain)} tokens",
                f"{count / time:g}",
                "Give more, or leave it out.",
            )
        return count

    def default_steps(self, limit: Coefficients, time: float) -> int:
        """Return the steps that a prediction up to ``time`` takes if no others are asked for."""
        return max(_STEPS, math.ceil(_TOTAL_STEPS / time), self.least_steps(limit))

    def median_steps(self, limit: Coefficients, time: float, steps: int) -> int:
        """Return how many of ``steps`` are enough if only medians are wanted."""
        return steps

    def description(self, steps: float) -> str:
        """Say how many steps the scheme takes, and what depends on it."""
        return f"{self.title}, {steps} steps per unit of depth / width"


class ChainSimulation:
    """Paths of `Chain`. A state is a factor of V."""

    def __init__(
        self, limit: Coefficients, v0: Tensor, step: float, generator: torch.Generator | None
    ) -> None:
        self.limit, self.v0, self.size, self.generator = limit, v0, step, generator
        block = limit.block
        self.logit_scale = math.sqrt(step) / block.tau0
        softmax_gain = block.head_gains("softmax_gain", v0)
        self.shaped_matrix = ShapedMatrix(
            limit.zero_logit,
            block.identity_gain + block.detuning.identity * step,
            softmax_gain,
            softmax_gain - block.detuning.softmax * step,
        )
        self.squared_skip_gain = block.skip_gain**2 + block.detuning.variance * step
        if self.squared_skip_gain < 0:
            least = -(block.skip_gain**2) / step
            rule = f"must be at least -skip_gain^2 * steps = {least:g} for the chain"
            got, remedy = f"{block.detuning.variance:g}", "Give more steps, or a smaller detuning."
            fail(ValueError, "detuning.variance", rule, got, remedy)

    def start(self, paths: int) -> Tensor:
        """Return a factor of V0 for each path, (paths, m, m)."""
        return root_of(self.v0).expand(paths, *self.v0.shape[-2:])

    def covariance(self, state: Tensor) -> Tensor:
        """Return (paths, m, m)."""
        return state @ state.mT

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return the factors after one step."""
        root = root_of(self.mean(state))
        noise = self.limit.kappa * self.size
        if noise == 0:
            return root
        return root @ wishart_factor(root.shape, 1 / noise, root, self.generator) * noise**0.5

    def mean(self, state: Tensor) -> Tensor:
        """Return K, (paths, m, m): the mean of V' given the logits, which it draws."""
        block, v = self.limit.block, self.covariance(state)
        square = block.branch_gain**2
        if block.attention:
            paths, tokens = v.shape[:2]
            # Only the first two moments of the logits reach the limit, (7): they may be normal, and
            # float32, which is three times as fast to draw.
            single = v.new_empty(()).float()
            g = normal((paths, block.heads, tokens, tokens), single, self.generator).to(v.dtype)
            logits = self.logit_scale * state[:, None] @ g @ state.mT[:, None]
            roots = self.shaped_matrix(logits) @ state[:, None]  # (paths, H, m, m)
            roots = roots.transpose(1, 2).flatten(2)  # (paths, m, H m)
            v = torch.baddbmm(
                v, roots, roots.mT, beta=self.squared_skip_gain, alpha=square / block.heads
            )
        if block.mlp:
            rise = mlp_drift(v, block.c_plus, block.c_minus)
            rise.mul_(square * self.limit.mlp_correction)
            v = v.add(rise.add_(v, alpha=block.detuning.variance), alpha=self.size)
        return v


class EulerMaruyamaSimulation:
    """Paths of `EulerMaruyama`. A state is V."""

    def __init__(
        self, limit: Coefficients, v0: Tensor, step: float, generator: torch.Generator | None
    ) -> None:
        self.limit, self.v0, self.size, self.generator = limit, v0, step, generator

    def start(self, paths: int) -> Tensor:
        """Return V0 for each path."""
        return self.v0.expand(paths, *self.v0.shape[-2:])

    def covariance(self, state: Tensor) -> Tensor:
        """Return the state, (paths, m, m), which is V."""
        return state

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return V after one step."""
        drift = self.limit.drift(state)
        noise = self.noise(state, root_of(state))
        moved = state + self.size * drift + math.sqrt(self.size) * noise
        return self._projected((moved + moved.mT) / 2)

    def noise(self, v: Tensor, factor: Tensor) -> Tensor:
        """Draw dN / sqrt(dt), whose covariance is the diffusion tensor, (39) and (40)."""
        limit = self.limit
        linear = factor @ normal(factor.shape, factor, self.generator) @ factor.mT
        noise = math.sqrt(limit.kappa / 2) * (linear + linear.mT)
        if limit.block.attention:
            logits = factor @ normal(factor.shape, factor, self.generator) @ factor.mT
            rows = limit.zero_logit.rows
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


class Chain(Integrator):
    """The chain (66), which draws the logits and one Wishart matrix W for each step.

    The equation:

        K = skip_gain^2 V + branch_gain^2 mean_h(A_h V A_h^T)
        K <- K + branch_gain^2 dt mu_mlp(K)
        V' = C W C^T,    C C^T = K,    W ~ Wishart_m(nu) / nu,    nu = 1 / (kappa dt)

    A_h is the attention matrix of a network of the width 1 / dt, (5) with normal logits. K is a
    covariance and W is one, so V stays positive semidefinite. Mean and covariance of a step agree
    with drift dt and diffusion dt up to a relative O(dt).
    """

    name = "chain"
    title = "chain"
    simulation = ChainSimulation

    def least_steps(self, limit: Coefficients) -> int:
        """Return the fewest steps per unit of time for m tokens.

        They are 2m, or more: its Wishart matrix has to have m degrees of freedom, and the mean of
        its MLP to be a covariance, c_n (c_plus - c_minus)^2 / 4 steps, covariance-sde.md section 8.
        """
        block = limit.block
        least = max(2.0, limit.kappa) * len(limit.gain)
        if block.mlp:
            least = max(least, limit.mlp_correction * (block.c_plus - block.c_minus) ** 2 / 4)
        return math.ceil(least)

    def default_steps(self, limit: Coefficients, time: float) -> int:
        """Return 256, 64 in total, or as many as it takes, but at most one for each layer."""
        steps = super().default_steps(limit, time)
        # A chain of the target width has one step for each layer, and is closest to it.
        if limit.width is not None:
            steps = max(min(steps, limit.width), self.least_steps(limit))
        return steps

    def median_steps(self, limit: Coefficients, time: float, steps: int) -> int:
        """Return 64, 16 in total, or as many as it takes, but at most ``steps``."""
        enough = max(_MEDIAN_STEPS, math.ceil(_TOTAL_MEDIAN_STEPS / time))
        return min(steps, max(enough, self.least_steps(limit)))

    def description(self, steps: float) -> str:
        """Say how many steps the chain takes, and what depends on it."""
        return f"{super().description(steps)}; with fewer steps fewer paths blow up"


class EulerMaruyama(Integrator):
    """The scheme (41) for V itself, as in the paper; for comparison, since it needs small steps.

    V + drift dt + noise, with eigenvalues raised to 1e-12 of the largest where that is not positive
    definite.
    """

    name = "euler_maruyama"
    title = "Euler-Maruyama"
    simulation = EulerMaruyamaSimulation

    def least_steps(self, limit: Coefficients) -> int:
        """Return 0: it takes steps of any size."""
        return 0

    def default_steps(self, limit: Coefficients, time: float) -> int:
        """Return 256, 64 in total, or as many as the chain, for which coarser ones are no use."""
        return max(super().default_steps(limit, time), Chain().least_steps(limit))


INTEGRATORS = {integrator.name: integrator for integrator in (Chain(), EulerMaruyama())}
"""The integrators by their name."""


def integrator_of(integrator: Integrator | str) -> Integrator:
    """Return an integrator given as itself or by its name in `INTEGRATORS`."""
    if isinstance(integrator, Integrator):
        return integrator
    return INTEGRATORS[check_choice("integrator", integrator, INTEGRATORS)]
