"""Time of `impl="torch"` on a CPU as ratios: to SDPA alone, and of the reference to it.

Forward plus backward, float32, causal, B = 1, H = 8, D = 64. All candidates run in turn within one
process; each ratio is that of medians. The package has to be installed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from shaped_attn import shaped_attention


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def composite(q, k, v):
    return shaped_attention(q, k, v, is_causal=True, impl="torch")


def reference(q, k, v):
    return shaped_attention(q, k, v, is_causal=True, impl="reference")


def seconds(function, tensors, d_out) -> float:
    start = time.perf_counter()
    torch.autograd.grad(function(*tensors), tensors, d_out)
    return time.perf_counter() - start


def medians(functions, length: int, rounds: int) -> list[float]:
    """Median seconds of each function, interleaved, after one round to warm up."""
    tensors = [torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3)]
    d_out = torch.randn(1, 8, length, 64)
    times = [[seconds(f, tensors, d_out) for f in functions] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    for length in (1024, 4096):
        alone, ours = medians([sdpa, composite], length, arguments.rounds)
        print(f"T = {length}: {ours / alone:.2f} x the time of SDPA alone ({alone * 1e3:.0f} ms)")
    ours, slow = medians([composite, reference], 2048, max(3, arguments.rounds // 4))
    print(f"T = 2048: {slow / ours:.1f} x faster than the reference ({slow * 1e3:.0f} ms)")


if __name__ == "__main__":
    main()
