"""Draw the figures of the Shaped Transformer paper (arXiv 2306.17759) with this package.

``python examples/covariance_figures.py`` writes four figures into ``examples/figures``:

- ``covariance.png``: correlation and variance over depth / width, predicted and measured in real
  networks;
- ``densities.png``: their densities at depth = width;
- ``stopping_times.png``: how long the covariance stays in range, over branch gain and temperature;
- ``rank_collapse.png``: what attention without shaping does to the tokens.

Ctrl-C ends the simulation at hand; its figure is drawn from the networks that are done.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.progress import Progress

from shaped_attn import plots
from shaped_attn.interrupt import stop_on_interrupt
from shaped_attn.sde import CovarianceSDE, FiniteNetwork, equicorrelated, stopping_time_map

BRANCH_GAIN, TAU0, TOKENS, CORRELATION = 0.5, 1.0, 4, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=96, help="of the networks; the depth too")
    parser.add_argument("--networks", type=int, default=600)
    parser.add_argument("--paths", type=int, default=4096)
    parser.add_argument("--cells", type=int, default=9, help="of the map, along each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    v0 = equicorrelated(TOKENS, CORRELATION)

    with Progress() as progress, stop_on_interrupt() as request:

        def follow(description: str) -> dict:
            task = progress.add_task(description)
            return {
                "on_progress": lambda done, total: progress.update(
                    task, completed=done, total=total
                ),
                "stop": lambda: request.is_set,
            }

        def generator(offset: int) -> torch.Generator:
            return torch.Generator().manual_seed(arguments.seed + offset)

        width = arguments.width
        settings = {"branch_gain": BRANCH_GAIN, "tau0": TAU0}
        predicted = CovarianceSDE(width=width, **settings).sample(
            v0, 1.0, arguments.paths, 256, generator(0), **follow("prediction")
        )
        measured = FiniteNetwork(width=width, depth=width, **settings).sample(
            v0, arguments.networks, generator(1), **follow("networks")
        )
        samples = {
            "covariance SDE": predicted,
            f"{measured.paths} networks, width = depth = {width}": measured,
        }
        if measured.paths:
            figure = plots.plot_covariance(samples)
            print(plots.save(figure, arguments.output / "covariance.png"))
            figure = plots.plot_densities(samples)
            print(plots.save(figure, arguments.output / "densities.png"))

        found = stopping_time_map(
            v0,
            branch_gains=torch.linspace(0.1, 1.0, arguments.cells).tolist(),
            tau0s=torch.logspace(-1.5, 0.5, arguments.cells).tolist(),
            paths=256,
            generator=generator(2),
            **follow("stopping times"),
        )
        figure = plots.plot_stopping_times(found)
        print(plots.save(figure, arguments.output / "stopping_times.png"))

        kinds = {
            "shaped": {},
            "no centring": {"center_gain": 0.0},
            "plain softmax": {
                "identity_gain": 0.0,
                "center_gain": 0.0,
                "skip_gain": math.sqrt(1 - BRANCH_GAIN**2),
            },
            "no width in the temperature": {"scale": "standard"},
        }
        samples = {}
        for index, (name, changes) in enumerate(kinds.items()):
            network = FiniteNetwork(
                width=128, depth=100, head_dim=16, mlp=False, **{**settings, **changes}
            )
            sample = network.sample(
                v0,
                64,
                generator(3 + index),
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
            figure = plots.plot_rank_collapse(samples, width=128, theory=theory)
            print(plots.save(figure, arguments.output / "rank_collapse.png"))


if __name__ == "__main__":
    main()
