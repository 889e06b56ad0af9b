"""Cost of sampling the covariance SDE, as ratios of medians that are measured interleaved.

``python bench/covariance.py`` prints two tables:

1. All paths of `CovarianceSDE.sample`, over a scheme whose noise comes from the Cholesky factor of
   the explicit covariance tensor, m(m+1)/2 square, in the same run.
2. Time of a path-step against the number of tokens m, and the exponent between neighbours.
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


class ExplicitNoise(EulerMaruyama):
    """The Euler-Maruyama scheme with noise from a factor of the whole diffusion tensor."""

    def noise(self, v: Tensor, factor: Tensor) -> Tensor:
        tokens = v.shape[-1]
        i, j = torch.triu_indices(tokens, tokens)
        found = torch.empty_like(v)
        for part, out in zip(v.split(256), found.split(256), strict=True):
            sigma = self.sde.diffusion(part)[:, i, j][:, :, i, j]
            # It is singular where tokens are dependent.
            jitter = 1e-12 * sigma.diagonal(dim1=1, dim2=2).amax(1)
            sigma.diagonal(dim1=1, dim2=2).add_(jitter[:, None])
            root = torch.linalg.cholesky(sigma)
            normal = torch.randn(len(part), len(i), 1, dtype=v.dtype, generator=self.generator)
            upper = (root @ normal).squeeze(2)
            out[:, i, j] = upper
            out[:, j, i] = upper
        return found


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

    process.INTEGRATORS["explicit"] = ExplicitNoise
    try:
        found = {name: [] for name in ("chain", "euler_maruyama", "explicit")}
        for name in found:
            sde.sample(v0, 1.0, 64, steps, integrator=name)  # warm-up
        for _ in range(rounds):
            for name, times in found.items():
                times.append(seconds(lambda name=name: sample(name)))
    finally:
        del process.INTEGRATORS["explicit"]
    return {name: statistics.median(times) for name, times in found.items()}


def growth(settings: dict, tokens: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Seconds of a path-step by number of tokens."""
    sde = CovarianceSDE(**settings)
    found = {}
    for m in tokens:
        paths = max(64, 2**21 // m**3)
        v0 = equicorrelated(m, 0.2)
        steps = max(128, 2 * m)
        found[m] = {}
        for name in ("chain", "euler_maruyama"):
            time_passed = 16 / steps  # 16 steps

            def run(name=name, v0=v0, steps=steps, paths=paths, time_passed=time_passed):
                sde.sample(v0, time_passed, paths, steps, integrator=name, snapshots=2)

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
    print(f"{'':20}{'chain':>10}{'E.-M.':>10}{'explicit':>10}   explicit / chain, / E.-M.")
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "total": {}}
    for name, settings in BLOCKS.items():
        found = compare(
            settings, arguments.tokens, arguments.paths, arguments.steps, arguments.rounds
        )
        report["total"][name] = found
        chain, euler, explicit = (found[k] for k in ("chain", "euler_maruyama", "explicit"))
        print(
            f"{name:20}{chain:9.2f}s{euler:9.2f}s{explicit:9.2f}s   "
            f"{explicit / chain:.1f}, {explicit / euler:.1f}"
        )
    report["microseconds_per_path_step"] = {}
    for name, settings in BLOCKS.items():
        found = growth(settings, arguments.growth_tokens, arguments.rounds)
        report["microseconds_per_path_step"][name] = found
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
