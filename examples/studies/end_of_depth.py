"""Real networks against the covariance SDE at the end of depth, depth = width.

``python examples/studies/end_of_depth.py`` draws every weight of every network and writes one JSON
file for each case as it is done; cases that have a file are skipped, so that an interrupted run
goes on. At the default width of 256 it takes an hour or more on one core, ``--head-dim 64``
somewhat less. ``--samples`` keeps the networks' covariances too, and takes those that are there
instead of simulating them again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from shaped_attn import __version__
from shaped_attn.sde import (
    CovarianceSample,
    CovarianceSDE,
    FiniteNetwork,
    compare,
    equicorrelated,
)

CASES = {
    "attention-0.5": {"branch_gain": 0.5, "mlp": False},
    "block-0.5": {"branch_gain": 0.5},
    "attention-0.7": {"branch_gain": 0.7, "mlp": False},
    "block-0.7": {"branch_gain": 0.7},
}
TOKENS, CORRELATION, TAU0 = 4, 0.2, 1.0
NETWORK_SEED, PREDICTION_SEED = 2306_17759, 2302_10322  # fixed before the first run

# What the networks are compared with: integrator, steps per unit of time.
PREDICTIONS = {
    "chain, 256 steps": ("chain", 256),
    "chain, 64 steps": ("chain", 64),
    "Euler-Maruyama, 256 steps": ("euler_maruyama", 256),
}


def file_name(name: str, arguments: argparse.Namespace, extension: str) -> str:
    again = f"-repetition-{arguments.repetition}" if arguments.repetition else ""
    return f"{name}-{arguments.method}-{arguments.width}{again}.{extension}"


def simulate(
    name: str, network: FiniteNetwork, seed: int, arguments: argparse.Namespace
) -> CovarianceSample:
    """Return the networks' covariances, from the folder of samples where they are."""
    kept = arguments.samples and arguments.samples / file_name(name, arguments, "pt")
    if kept and kept.exists():
        return CovarianceSample(**torch.load(kept))
    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        passed = time.perf_counter() - start
        print(f"\r{name}: {done / total:6.1%} after {passed:6.0f} s", end="", flush=True)

    sample = network.sample(
        equicorrelated(TOKENS, CORRELATION),
        arguments.networks,
        torch.Generator().manual_seed(seed),
        method=arguments.method,
        on_progress=show,
    )
    print()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(sample), kept)
    return sample


def run_case(name: str, arguments: argparse.Namespace) -> dict:
    settings = {"tau0": TAU0, **CASES[name]}
    network = FiniteNetwork(
        width=arguments.width, depth=arguments.width, head_dim=arguments.head_dim, **settings
    )
    index = list(CASES).index(name)
    index += 1000 * arguments.repetition
    network_seed, prediction_seed = NETWORK_SEED + index, PREDICTION_SEED + index
    sample = simulate(name, network, network_seed, arguments)
    report = {
        "case": name,
        "settings": settings,
        "width": arguments.width,
        "depth": arguments.width,
        "head_dim": network.head_dim,
        "tokens": TOKENS,
        "correlation": CORRELATION,
        "networks": sample.paths,
        "method": arguments.method,
        "network_seed": network_seed,
        "prediction_seed": prediction_seed,
        "shaped_attn": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "comparisons": {},
    }
    for label, (integrator, steps) in PREDICTIONS.items():
        prediction = CovarianceSDE(width=arguments.width, **settings).sample(
            equicorrelated(TOKENS, CORRELATION),
            1.0,
            arguments.paths,
            steps,
            torch.Generator().manual_seed(prediction_seed),
            integrator=integrator,
        )
        comparison = compare(prediction, sample)
        report["comparisons"][label] = comparison.to_dict()
        print(f"  {label}: largest KS {comparison.largest.ks:.4f}, agrees: {comparison.agrees}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--head-dim", type=int, help="n_k, which the limit does not depend on")
    parser.add_argument("--networks", type=int, default=4096)
    parser.add_argument("--paths", type=int, default=16384)
    parser.add_argument("--method", choices=("network", "chain"), default="network")
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--repetition", type=int, default=0, help="> 0: with other seeds")
    parser.add_argument("--output", type=Path, default=Path("examples/studies/end_of_depth"))
    parser.add_argument("--samples", type=Path, help="folder for the networks' covariances")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        path = arguments.output / file_name(name, arguments, "json")
        if path.exists():
            print(f"{name}: {path} is there")
            continue
        report = run_case(name, arguments)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
