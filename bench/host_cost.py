"""What a call of the operator costs the host, in microseconds, without a GPU.

The calls are real: public function, dispatcher, autograd, allocation, Triton's launcher. Only the
last step, which hands a kernel to a GPU, is left out. `depth` says how far calls go before they are
cut off: "launch" all the way; "prepare" up to the first line about Triton; "dispatch" up to the
family of kernels. B = 1, H = 8, T = 128, D = 64, bfloat16, causal. Times are process times, medians
of interleaved rounds, on tensors in main memory.

    python bench/host_cost.py [--rounds N] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.runtime.driver import driver

from shaped_attn import shaped_attention, validation
from shaped_attn.kernels import attention, launch
from shaped_attn.kernels.stand_in import StandInDriver

CALLS_PER_ROUND = 100
DEPTHS = ("launch", "prepare", "dispatch")
SIZES = {"B": 1, "H": 8, "T": 128, "D": 64}


def _launch_stub(self, *arguments) -> None:
    pass


def _forward_stub(call, result) -> None:
    pass


def _backward_stub(call, saved, d_out, d_lse, gradients, needs):
    return gradients


@contextlib.contextmanager
def cut_off(depth: str) -> Iterator[None]:
    """Let calls go as far as `depth` says."""
    with contextlib.ExitStack() as stack:
        if depth == "prepare":
            stack.enter_context(mock.patch.object(launch.Launch, "__call__", _launch_stub))
        elif depth == "dispatch":
            stubs = {"portable": attention.Family(_forward_stub, _backward_stub)}
            stack.enter_context(mock.patch.dict(attention.FAMILIES, stubs))
        yield


def calls() -> dict[str, Callable[[], object]]:
    """The calls to time: forward for inference and for training, and forward with backward."""
    B, H, T, D = SIZES.values()
    q, k, v, d_out = (torch.randn(B, H, T, D).bfloat16() for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward(q, k, v):
        return shaped_attention(q, k, v, is_causal=True, impl="triton")

    return {
        "forward without autograd": lambda: forward(q, k, v),
        "forward with autograd": lambda: forward(*leaves),
        "forward and backward": lambda: torch.autograd.grad(forward(*leaves), leaves, d_out),
    }


def microseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS_PER_ROUND):
        call()
    return (time.process_time() - start) / CALLS_PER_ROUND * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if launch.is_interpreted():
        parser.error("TRITON_INTERPRET must be unset, got it set. Triton's launcher is measured.")
    torch.set_num_threads(1)
    stand_in = StandInDriver(90)
    driver.set_active(stand_in)
    times: dict[tuple[str, str], list[float]] = {}
    # Tensors in main memory take the way of those on a GPU.
    gpu = mock.patch.object(validation, "is_interpreted", lambda: True)
    with gpu, launch.assume_architecture(90):
        to_time = calls()
        launches = {}
        for name, call in to_time.items():  # compiles
            stand_in.launches.clear()
            call()
            launches[name] = len(stand_in.launches)
        for _ in range(arguments.rounds):
            for depth in DEPTHS:
                with cut_off(depth):
                    for name, call in to_time.items():
                        stand_in.launches.clear()
                        times.setdefault((depth, name), []).append(microseconds(call))
    result = {
        "command": "python bench/host_cost.py",
        "unit": "microseconds of process time per call, median of rounds",
        "sizes": SIZES,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "launches": launches,
        "times": {
            depth: {name: round(statistics.median(times[depth, name]), 1) for name in to_time}
            for depth in DEPTHS
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
