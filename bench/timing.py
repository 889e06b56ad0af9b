"""Times of calls that take turns, on a GPU by its events, and what the machine can do at best."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 2**28  # more than any L2 cache
# These take a GPU about a millisecond, in which the host gets ahead, as in training.
FLUSHES = 16
WARM_UP = 3
MOST_ROUNDS, FEWEST_ROUNDS = 40, 5
SECONDS = {"cuda": 0.6, "cpu": 0.4}  # for all rounds of one race
CPU_CALLS, SHORT = 5, 0.02  # calls, if one takes fewer seconds than this


class Step(NamedTuple):
    """What is timed: `run` of what `prepare` returns, which is not timed."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class RelativeClock:
    """Timer of pytest-benchmark that says how long calls took in times of their fastest peer.

    What pytest-benchmark stores and compares is then a ratio, which holds on other machines and
    other days. `advance` is called once for every timed call.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Relative times of all calls so far."""
        return self.now

    def advance(self, seconds: float, yardstick: float) -> None:
        """Add one call, and the time of its fastest peer in the same round."""
        self.now += seconds / yardstick


clock = RelativeClock()


class Stopwatch:
    """Seconds of a step on one device, with nothing of earlier steps in the cache of a GPU.

    Those of a GPU are its own: the host is ahead of it. `host_ms` has what the host takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, step: Step) -> float:
        """Time one call; on a CPU the fastest of a few short ones: other programs only add."""
        if self.device.type == "cpu":
            first = self._cpu_seconds(step)
            again = CPU_CALLS - 1 if first < SHORT else 0
            return min([first, *(self._cpu_seconds(step) for _ in range(again))])
        prepared = step.prepare()
        start, end = self.events
        for _ in range(FLUSHES):
            self.flush.zero_()
        start.record()
        result = step.run(prepared)
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def _cpu_seconds(self, step: Step) -> float:
        prepared = step.prepare()
        start = time.perf_counter()
        step.run(prepared)
        return time.perf_counter() - start

    def fastest(self, steps: Mapping[str, Step]) -> str:
        """Name of the fastest step."""
        if len(steps) == 1:
            return next(iter(steps))
        for step in steps.values():
            self.seconds(step)
        return min(steps, key=lambda name: min(self.seconds(steps[name]) for _ in range(WARM_UP)))


def race(
    benchmark,
    group: str,
    stopwatch: Stopwatch,
    ours: Step,
    peers: Mapping[str, Step],
    yardsticks: Collection[str],
) -> dict[str, list[float]]:
    """Time a step and its peers in turn, and give pytest-benchmark the ratio of each round.

    Returns the seconds of every round by name, those of the step as "ours".
    """
    benchmark.group = group
    seconds: dict[str, list[float]] = {}

    def run_peers() -> None:
        for name, step in peers.items():
            seconds.setdefault(name, []).append(stopwatch.seconds(step))

    def run_ours() -> None:
        took = stopwatch.seconds(ours)
        seconds.setdefault("ours", []).append(took)
        clock.advance(took, min(seconds[name][-1] for name in yardsticks))

    for _ in range(WARM_UP):
        run_peers()
        run_ours()
    one_round = sum(times[-1] for times in seconds.values())
    seconds.clear()
    rounds = int(SECONDS[stopwatch.device.type] / one_round)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, rounds))
    benchmark.pedantic(run_ours, setup=run_peers, rounds=rounds)
    return seconds


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    named = {"median_ms": statistics.median(times), "p20_ms": cuts[0], "p80_ms": cuts[-1]}
    return {name: float(f"{1e3 * value:.5g}") for name, value in named.items()}


def graph_ms(stopwatch: Stopwatch, step: Step, replays: int = 10) -> float | str:
    """Median time of a step replayed from a CUDA graph: its kernels, without the host.

    A step that cannot be captured gives the reason instead.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            step.run(step.prepare())
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            step.run(step.prepare())
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"[:500]
    replay = Step(lambda _: graph.replay())
    times = [stopwatch.seconds(replay) for _ in range(WARM_UP + replays)][WARM_UP:]
    return float(f"{1e3 * statistics.median(times):.5g}")


def host_ms(step: Step, calls: int = 10) -> float:
    """Median time that a call takes the host, which does not wait for its results."""
    times = []
    for _ in range(WARM_UP + calls):
        prepared = step.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step.run(prepared)
        times.append(time.perf_counter() - start)
    return float(f"{1e3 * statistics.median(times[WARM_UP:]):.5g}")


def peak_bytes(step: Step) -> int:
    """The most that one call allocates on the GPU, beside what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run(step.prepare())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(stopwatch: Stopwatch) -> dict[str, float]:
    """Measure what the GPU does at best, after warming its clocks: a large product, and a copy."""
    a, b = torch.randn(2, 8192, 8192, device=stopwatch.device, dtype=torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.int8, device=stopwatch.device)
    target = torch.empty_like(source)
    product, copy = Step(lambda _: a @ b), Step(lambda _: target.copy_(source))
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        stopwatch.seconds(product)
    fastest = {
        name: min(stopwatch.seconds(step) for _ in range(10))
        for name, step in (("product", product), ("copy", copy))
    }
    return {
        "matmul_tflops": round(2 * 8192**3 / fastest["product"] / 1e12, 1),
        "copy_gbps": round(2 * 2**30 / fastest["copy"] / 1e9, 1),
    }


def gpu_state() -> dict[str, str] | None:
    """Clocks, power limit and temperature of the GPU as nvidia-smi tells them, None without it."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, done.stdout.strip().split(", "), strict=False))
