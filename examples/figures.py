"""Draw figures of two papers with this package: arXiv 2306.17759 and 2302.10322.

``python examples/figures.py`` writes them into ``examples/figures``, ``--only`` some of them:

- ``covariance``: correlation and variance over depth / width, predicted and measured in real
  networks, and ``densities``, theirs at depth = width;
- ``stopping_times``: how long the covariance stays in range, over branch gain and temperature;
- ``rank_collapse``: what attention without shaping does to the tokens;
- ``token_kernels``: correlations of the tokens over depth, without skips and normalisation, with
  E-SPA, U-SPA and plain softmax attention, for an input whose tokens do not correlate, and with
  E-SPA for one in which half of them repeat an earlier one.

Ctrl-C ends the simulation at hand; its figure is drawn from the networks that are done.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from shaped_attn import plots
from shaped_attn.interrupt import stop_on_interrupt
from shaped_attn.priors import ESPA, USPA
from shaped_attn.sde import CovarianceSDE, FiniteNetwork, equicorrelated, stopping_time_map
from shaped_attn.sde.token_kernel import input_kernel, propagate

BRANCH_GAIN = 0.5
SETTINGS = {"branch_gain": BRANCH_GAIN, "tau0": 1.0}
V0 = equicorrelated(4, 0.2)

Follow = Callable[[str], dict[str, Any]]
Drawn = Iterator[tuple[str, Figure]]


def covariance(arguments: argparse.Namespace, follow: Follow) -> Drawn:
    width = arguments.width
    predicted = CovarianceSDE(width=width, **SETTINGS).sample(
        V0, 1.0, arguments.paths, 256, generator(arguments, 0), **follow("prediction")
    )
    measured = FiniteNetwork(width=width, depth=width, **SETTINGS).sample(
        V0, arguments.networks, generator(arguments, 1), **follow("networks")
    )
    if measured.paths:
        name = f"{measured.paths} networks, width = depth = {width}"
        samples = {"covariance SDE": predicted, name: measured}
        yield "covariance", plots.plot_covariance(samples)
        yield "densities", plots.plot_densities(samples)


def stopping_times(arguments: argparse.Namespace, follow: Follow) -> Drawn:
    found = stopping_time_map(
        V0,
        branch_gains=torch.linspace(0.1, 1.0, arguments.cells).tolist(),
        tau0s=torch.logspace(-1.5, 0.5, arguments.cells).tolist(),
        paths=256,
        generator=generator(arguments, 2),
        **follow("stopping times"),
    )
    yield "stopping_times", plots.plot_stopping_times(found)


def rank_collapse(arguments: argparse.Namespace, follow: Follow) -> Drawn:
    softmax = {"identity_gain": 0.0, "center_gain": 0.0, "skip_gain": math.sqrt(1 - BRANCH_GAIN**2)}
    kinds = {
        "shaped": {},
        "no centring": {"center_gain": 0.0},
        "plain softmax": softmax,
        "no width in the temperature": {"scale": "standard"},
    }
    samples = {}
    for index, (name, changes) in enumerate(kinds.items()):
        sample = FiniteNetwork(
            width=128, depth=100, head_dim=16, mlp=False, **{**SETTINGS, **changes}
        ).sample(
            V0,
            64,
            generator(arguments, 3 + index),
            dtype=torch.float64,
            snapshots=101,
            eigenvalue_range=(0, math.inf),
            **follow(name),
        )
        if sample.paths:
            samples[name] = sample
    if samples:
        theory = {
            "$(1 + 3 \\gamma^2)^{-layer}$": plots.uncentered_factor(BRANCH_GAIN),
            "$(1 - \\gamma^2)^{layer}$": plots.softmax_factor(BRANCH_GAIN),
        }
        yield "rank_collapse", plots.plot_rank_collapse(samples, width=128, theory=theory)


def token_kernels(arguments: argparse.Namespace, follow: Follow) -> Drawn:
    tokens, depth = arguments.tokens, max(arguments.layers)
    different = input_kernel(torch.arange(tokens))
    repeated = input_kernel(torch.arange(tokens) % ((tokens + 1) // 2))
    espa, uspa = ESPA.schedule(depth), USPA.schedule(depth)
    propagations = {
        "E-SPA": propagate(different, espa),
        "U-SPA": propagate(different, uspa),
        "plain softmax": propagate(different, [None] * depth),
        "E-SPA, repeated tokens": propagate(repeated, espa),
    }
    for name, propagation in propagations.items():
        correlation = ", ".join(
            f"{propagation.mean_correlation()[layer]:.4f}" for layer in arguments.layers
        )
        print(f"{name}: mean correlation {correlation}")
    yield "token_kernels", plots.plot_token_kernels(propagations, arguments.layers)


FIGURES = (covariance, stopping_times, rank_collapse, token_kernels)


def generator(arguments: argparse.Namespace, offset: int) -> torch.Generator:
    return torch.Generator().manual_seed(arguments.seed + offset)


def main() -> None:
    names = {draw.__name__: draw for draw in FIGURES}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    parser.add_argument("--width", type=int, default=96, help="of the networks; the depth too")
    parser.add_argument("--networks", type=int, default=600)
    parser.add_argument("--paths", type=int, default=4096)
    parser.add_argument("--cells", type=int, default=9, help="of the map, along each side")
    parser.add_argument("--tokens", type=int, default=64, help="of the token kernels")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 12, 36], help="to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with Progress() as progress, stop_on_interrupt() as request:

        def follow(description: str) -> dict[str, Any]:
            task = progress.add_task(description)
            return {
                "on_progress": lambda done, total: progress.update(
                    task, completed=done, total=total
                ),
                "stop": lambda: request.is_set,
            }

        for name in arguments.only:
            for file, figure in names[name](arguments, follow):
                print(plots.save(figure, arguments.output / f"{file}.png"))


if __name__ == "__main__":
    main()
