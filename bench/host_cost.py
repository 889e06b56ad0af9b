"""What a call of the operator costs the host, in microseconds, with a GPU or without.

The calls are real: public function, dispatcher, autograd, allocation, Triton's launcher. Without a
GPU tensors are in main memory, and only the last step, which hands a kernel to a driver, is left
out. With one torch's attention is timed beside it. `depth` says how far calls go before they are
cut off: "launch" all the way; "prepare" up to the first line about Triton; "dispatch" up to the
family of kernels. B = 1, H = 8, T = 128, D = 64, bfloat16, causal; medians of interleaved rounds,
and a profile of the functions in which forward and backward spend most.

    python bench/host_cost.py [--rounds N] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
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


def _plan_stub(*signature):
    return lambda *arguments: arguments[-1]  # a backward returns the gradients it was given


@contextlib.contextmanager
def cut_off(depth: str) -> Iterator[None]:
    """Let calls go as far as `depth` says."""
    with contextlib.ExitStack() as stack:
        if depth == "prepare":
            stack.enter_context(mock.patch.object(launch.Launch, "__call__", _launch_stub))
        elif depth == "dispatch":
            stub = attention.Family(_plan_stub, _plan_stub)
            stubs = dict.fromkeys(attention.FAMILIES, lambda: stub)
            stack.enter_context(mock.patch.dict(attention.FAMILIES, stubs))
            launch.forget_plans()
            stack.callback(launch.forget_plans)
        yield


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The calls to time: forward for inference and for training, and forward with backward."""
    B, H, T, D = SIZES.values()
    q, k, v, d_out = (torch.randn(B, H, T, D).to(device, torch.bfloat16) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def three_calls(forward: Callable[..., torch.Tensor]) -> dict[str, Callable[[], object]]:
        return {
            "forward without autograd": lambda: forward(q, k, v),
            "forward with autograd": lambda: forward(*leaves),
            "forward and backward": lambda: torch.autograd.grad(forward(*leaves), leaves, d_out),
        }

    found = three_calls(lambda q, k, v: shaped_attention(q, k, v, is_causal=True, impl="triton"))
    if device.type == "cuda":
        plain = three_calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        found |= {f"torch's attention, {name}": call for name, call in plain.items()}
    return found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def microseconds(call: Callable[[], object]) -> float:
    # On a GPU the backward runs in a thread of its own, which the clock of this process counts
    # twice where the two overlap.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize()
    start = clock()
    for _ in range(CALLS_PER_ROUND):
        call()
    spent = clock() - start
    synchronize()
    return spent / CALLS_PER_ROUND * 1e6


def profile(call: Callable[[], object], functions: int = 15) -> list[dict[str, object]]:
    """Where a call spends its time in Python and what it calls, the most expensive first."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(CALLS_PER_ROUND):
        call()
    profiler.disable()
    rows = pstats.Stats(profiler).stats.items()
    return [
        {
            "function": f"{Path(file).name}:{line} {name}",
            "calls": count / CALLS_PER_ROUND,
            "microseconds": round(own / CALLS_PER_ROUND * 1e6, 1),
        }
        for (file, line, name), (_, count, own, _, _) in sorted(rows, key=lambda row: -row[1][2])
    ][:functions]


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
    times: dict[tuple[str, str], list[float]] = {}
    stand_in = StandInDriver(90)
    with contextlib.ExitStack() as stack:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            # Tensors in main memory take the way of those on a GPU.
            driver.set_active(stand_in)
            stack.enter_context(mock.patch.object(validation, "is_interpreted", lambda: True))
            stack.enter_context(launch.assume_architecture(90))
        to_time = calls(device)
        for call in to_time.values():
            call()  # compiles
        for _ in range(arguments.rounds):
            for depth in DEPTHS:
                with cut_off(depth):
                    for name, call in to_time.items():
                        stand_in.launches.clear()
                        times.setdefault((depth, name), []).append(microseconds(call))
        top = profile(to_time["forward and backward"])
    result = {
        "command": "python bench/host_cost.py",
        "unit": "microseconds per call, median of rounds",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "sizes": SIZES,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "times": {
            depth: {name: round(statistics.median(times[depth, name]), 1) for name in to_time}
            for depth in DEPTHS
        },
        "profile of forward and backward": top,
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
