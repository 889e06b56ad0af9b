"""Sampling of the covariance SDE, beside Euler-Maruyama from the explicit diffusion tensor.

The tensor is m(m+1)/2 square for m tokens; noise comes from its Cholesky factor, or from its
symmetric root, which also serves where tokens are dependent. All run with the same bookkeeping. An
entry's time is that of the chain, relative to the faster root in the same round.
"""

from __future__ import annotations

import math
import statistics

import pytest
import timing
import torch
from cases import SDE_BLOCKS, SDE_PATHS, SDE_STEPS, SDE_TOKENS
from timing import Step
from torch import Tensor

from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.integrators import ChainSimulation, EulerMaruyamaSimulation
from shaped_attn.sde.paths import EIGENVALUE_RANGE, run

STEPS_PER_TIME = 64
PART = 256  # paths whose diffusion tensor is formed at once


def cholesky(sigma: Tensor) -> Tensor:
    diagonal = sigma.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-12 * diagonal.amax(1, keepdim=True))
    return torch.linalg.cholesky(sigma)


def symmetric(sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp(min=0).sqrt()[:, None, :]


class ExplicitCholesky(EulerMaruyamaSimulation):
    """The scheme with noise from a root of the whole diffusion tensor."""

    root = staticmethod(cholesky)

    def noise(self, v: Tensor, factor: Tensor) -> Tensor:
        i, j = torch.triu_indices(*v.shape[1:], device=v.device)
        found = torch.empty_like(v)
        for part, out in zip(v.split(PART), found.split(PART), strict=True):
            normal = torch.randn(
                len(part), len(i), 1, dtype=v.dtype, device=v.device, generator=self.generator
            )
            upper = (self.root(self.sigma(part)) @ normal).squeeze(2)
            out[:, i, j] = upper
            out[:, j, i] = upper
        return found

    def sigma(self, v: Tensor) -> Tensor:
        """The upper triangle of dV with itself: `CovarianceSDE.diffusion` without its checks."""
        sigma = self.limit.diffusion(v)
        i, j = torch.triu_indices(*v.shape[1:], device=v.device)
        return sigma[:, i, j][:, :, i, j]


class ExplicitSymmetric(ExplicitCholesky):
    root = staticmethod(symmetric)


SCHEMES = {
    "chain": ChainSimulation,
    "euler_maruyama": EulerMaruyamaSimulation,
    "cholesky": ExplicitCholesky,
    "symmetric": ExplicitSymmetric,
}
EXPLICIT = ("cholesky", "symmetric")


def check(scheme: ExplicitCholesky, v0: Tensor) -> None:
    """Check that the square of the root is the diffusion tensor, to the rounding of its sums."""
    i, j = torch.triu_indices(*v0.shape, device=v0.device)
    golden = scheme.limit.diffusion(v0)[i, j][:, i, j]
    factor = scheme.root(scheme.sigma(v0[None]))[0]
    error = (factor @ factor.mT - golden).norm() / golden.norm()
    # What keeps the Cholesky factor real, and the backward error of a root of this size.
    assert error <= 1e-12 * math.sqrt(len(i)) + len(i) ** 2 * torch.finfo(v0.dtype).eps


@pytest.mark.parametrize("tokens", SDE_TOKENS)
@pytest.mark.parametrize("block", SDE_BLOCKS)
@pytest.mark.benchmark(timer=timing.clock)
def test_covariance(block, tokens, benchmark, device, stopwatch, is_compile_only):
    if is_compile_only:
        pytest.skip("only cases of attention are compiled beforehand")
    sde = CovarianceSDE(**SDE_BLOCKS[block])
    v0 = equicorrelated(tokens, 0.2).to(device)
    generator = torch.Generator(device).manual_seed(0)
    limit = sde.coefficients(tokens, v0)
    schemes = {
        name: scheme(limit, v0, 1 / STEPS_PER_TIME, generator) for name, scheme in SCHEMES.items()
    }
    for name in EXPLICIT:
        check(schemes[name], v0)

    def step(name: str) -> Step:
        return Step(
            lambda _: run(
                schemes[name],
                source="sde",
                paths=SDE_PATHS,
                steps=SDE_STEPS,
                time=SDE_STEPS / STEPS_PER_TIME,
                snapshots=2,
                eigenvalue_range=EIGENVALUE_RANGE,
                chunk=SDE_PATHS,
            )
        )

    peers = {name: step(name) for name in SCHEMES if name != "chain"}
    seconds = timing.race(benchmark, "covariance SDE", stopwatch, step("chain"), peers, EXPLICIT)
    if benchmark.enabled:
        path_steps = SDE_PATHS * SDE_STEPS
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        benchmark.extra_info |= {
            "case": f"{block}-{tokens}",
            "times": {name: timing.summary(times) for name, times in seconds.items()},
            "us_per_path_step": {
                name: float(f"{1e6 * median / path_steps:.4g}") for name, median in medians.items()
            },
            "speed_vs_explicit": {
                name: round(medians[name] / medians["ours"], 2) for name in EXPLICIT
            },
        }
