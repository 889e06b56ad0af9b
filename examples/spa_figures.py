"""Draw how attention without skips and normalisation treats the tokens (arXiv 2302.10322).

``python examples/spa_figures.py`` writes ``examples/figures/token_kernels.png``: the correlations
of the tokens over depth with E-SPA, U-SPA and plain softmax attention, for an input whose tokens
do not correlate, and with E-SPA for one in which half of them repeat an earlier one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from shaped_attn import plots
from shaped_attn.priors import ESPA, USPA
from shaped_attn.sde.token_kernel import input_kernel, propagate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 12, 36], help="to show")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

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
    figure = plots.plot_token_kernels(propagations, arguments.layers)
    print(plots.save(figure, arguments.output / "token_kernels.png"))
    for name, propagation in propagations.items():
        correlation = ", ".join(
            f"{propagation.mean_correlation()[layer]:.4f}" for layer in arguments.layers
        )
        print(f"{name}: mean correlation {correlation}")


if __name__ == "__main__":
    main()
