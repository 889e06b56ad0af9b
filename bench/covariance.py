"""Cost of sampling the covariance SDE, as ratios of medians that are measured interleaved.

``python bench/covariance.py`` prints two tables:

1. All paths of `CovarianceSDE.sample`, beside Euler-Maruyama with noise from a root of the explicit
   covariance tensor, m(m+1)/2 square: its Cholesky factor, or the symmetric root, which also serves
   where tokens are dependent.
2. Time of a path-step against the number of tokens m, and the exponent between neighbours.

The matrices are small; where other programs keep the CPU busy, OMP_NUM_THREADS=1 is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time

import torch
from torch import Tensor

from shaped_attn.sde import CovarianceSDE, equicorrelated
from shaped_attn.sde.limit import EulerMaruyama

BLOCKS = {
    "attention, full": {"mlp": False},
    "attention, causal": {"mlp": False, "is_causal": True},
    "block, full": {},
}


class ExplicitCholesky(EulerMaruyama):
    """The Euler-Maruyama scheme with noise from a root of the whole diffusion tensor."""

    def noise(self, v: Tensor, factor: Tensor) -> Tensor:
        tokens = v.shape[-1]
        i, j = torch.triu_indices(tokens, tokens)
        found = torch.empty_like(v)
        for part, out in zip(v.split(256), found.split(256), strict=True):
            sigma = self.sde.diffusion(part)[:, i, j][:, :, i, j]
            normal = torch.randn(len(part), len(i), 1, dtype=v.dtype, generator=self.generator)
            upper = (self.root(sigma) @ normal).squeeze(2)
            out[:, i, j] = upper
            out[:, j, i] = upper
        return found

    @staticmethod
    def root(sigma: Tensor) -> Tensor:
        diagonal = sigma.diagonal(dim1=1, dim2=2)
        diagonal.add_(1e-12 * diagonal.amax(1, keepdim=True))
        return torch.linalg.cholesky(sigma)


class ExplicitSymmetric(ExplicitCholesky):
    @staticmethod
    def root(sigma: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(sigma)
        return vectors * values.clamp(min=0).sqrt()[:, None, :]


EXPLICIT = {"Cholesky": ExplicitCholesky, "symmetric": ExplicitSymmetric}
SAMPLERS = ("chain", "euler_maruyama")


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(settings: dict, tokens: int, paths: int, steps: int, rounds: int) -> dict[str, float]:
    """Seconds of each way to take ``steps`` steps, all with the same bookkeeping."""
    from shaped_attn.sde import process

    sde = CovarianceSDE(**settings)
    v0 = equicorrelated(tokens, 0.2)

    def sample(integrator: str):
        generator = torch.Generator().manual_seed(0)
        return sde.sample(v0, 1.0, paths, steps, generator, integrator=integrator)

    process.INTEGRATORS.update(EXPLICIT)
    try:
        found = {name: [] for name in (*SAMPLERS, *EXPLICIT)}
        for name in found:
            sde.sample(v0, 1.0, 64, steps, integrator=name)  # warm-up
        for _ in range(rounds):
            for name, times in found.items():
                times.append(seconds(lambda name=name: sample(name)))
    finally:
        for name in EXPLICIT:
            del process.INTEGRATORS[name]
    return {name: statistics.median(times) for name, times in found.items()}


def growth(settings: dict, tokens: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Seconds of a path-step by number of tokens."""
    # Weak enough for every path to stay in range at 64 tokens.
    sde = CovarianceSDE(branch_gain=0.3, tau0=4.0, **settings)
    found = {}
    for m in tokens:
        paths = max(64, 2**21 // m**3)
        v0 = equicorrelated(m, 0.2)
        steps = max(128, 2 * m)
        found[m] = {}
        for name in SAMPLERS:
            time_passed = 16 / steps  # 16 steps

            def run(name=name, v0=v0, steps=steps, paths=paths, time_passed=time_passed):
                sample = sde.sample(v0, time_passed, paths, steps, integrator=name, snapshots=2)
                assert not sample.stopped.any()

            run()
            times = [seconds(run) for _ in range(rounds)]
            found[m][name] = statistics.median(times) / (16 * paths)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--paths", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--growth-tokens", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"\n{arguments.paths} paths x {arguments.steps} steps, m = {arguments.tokens}, float64")
    columns = {"chain": "chain", "euler_maruyama": "E.-M.", **{name: name for name in EXPLICIT}}
    print(f"{'':20}" + "".join(f"{title:>11}" for title in columns.values()) + "   ratios")
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": {}}
    for name, settings in BLOCKS.items():
        found = compare(
            settings, arguments.tokens, arguments.paths, arguments.steps, arguments.rounds
        )
        report["seconds"][name] = found
        line = f"{name:20}" + "".join(f"{found[column]:10.2f}s" for column in columns)
        for explicit in EXPLICIT:
            ratios = (f"{found[explicit] / found[sampler]:.1f}" for sampler in SAMPLERS)
            line += f"   {explicit} / ours {', '.join(ratios)}"
        print(line)
    report["seconds_per_path_step"] = {}
    for name, settings in BLOCKS.items():
        found = growth(settings, arguments.growth_tokens, arguments.rounds)
        report["seconds_per_path_step"][name] = found
        print(f"\n{name}: microseconds for a step of a path (exponent of m since the line above)")
        previous = None
        for m, times in found.items():
            line = f"  m = {m:<4d}"
            for integrator, value in times.items():
                line += f"  {integrator} {1e6 * value:9.2f}"
                if previous is not None:
                    ratio = value / previous[1][integrator]
                    line += f" ({math.log(ratio) / math.log(m / previous[0]):.2f})"
            previous = (m, times)
            print(line)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
