"""The operator beside its peers: forward, backward, and both, each checked against float64 first.

An entry's time is that of the operator in times of its fastest plain peer in the same round; what
both took, and more, is in `extra_info`: which family of kernels ran, and where those for Hopper can
run, times and ratios of each family.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import peers
import pytest
import timing
import torch
from cases import CPU_CASES, GPU_CASES, GRAPH_LENGTH, PASSES, AttentionCase
from timing import Step

from shaped_attn.testing import Case, record_families

CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES
FLOPS = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
SETS = {"gates": (pytest.mark.gates,), "extended": (pytest.mark.extended,)}


class Entry:
    """One case made ready: candidates by name, run once and checked, and why others are left out.

    Passes share it, so that nothing is compiled or checked twice.
    """

    def __init__(self, case: AttentionCase, device: torch.device, is_checked: bool) -> None:
        torch.compiler.reset()  # Dynamo counts the shapes of all cases together
        self.case = case
        self.problem = peers.draw(case, device)
        self.is_checked = is_checked
        self._expected: dict[bool, peers.Expected] = {}
        self.left_out: dict[str, str] = {}
        ours = peers.ours(self.problem)
        self.family = self._run_once(ours)
        self.candidates = {"ours": ours, **self._families()}
        for name in case.peers:
            try:
                candidate = peers.PEERS[name](case, self.problem)
                self._run_once(candidate)
            except peers.NotHere as reason:
                self.left_out[name] = str(reason)
            except Exception as error:  # wrong, or refused by its own checks
                self.left_out[name] = f"{type(error).__name__}: {error}"[:500]
            else:
                self.candidates[name] = candidate
        self.plain = [name for name, x in self.candidates.items() if not x.is_whole]
        assert self.plain, f"no plain peer runs here: {self.left_out}"
        self.bases = [name for name in self.plain if name != "flex"]
        self.is_composable = case.form in ("fixed", "learnable")
        self._compositions: dict[str, peers.Candidate] = {}

    def _families(self) -> dict[str, peers.Candidate]:
        """The operator with each family of kernels, if the Hopper kernels take the case."""
        found = {}
        for name, (family, _) in peers.FAMILIES.items():
            try:
                candidate = peers.ours_of(self.problem, name)
                ran = self._run_once(candidate)
            except peers.NotHere:
                return {}
            if ran != family:  # it is "ours" already
                return {}
            found[name] = candidate
        return found

    def _run_once(self, candidate: peers.Candidate) -> str | None:
        """Run and check a candidate; return the family of our kernels that ran, if any."""
        with record_families() as families:
            self.step(candidate, "forward").run(None)
            if not self.is_checked:
                self.step(candidate, "forward+backward").run(None)
            else:
                is_whole = candidate.is_whole
                if is_whole not in self._expected:
                    self._expected[is_whole] = peers.expected(self.case, self.problem, is_whole)
                with candidate.chosen():
                    right = self._expected[is_whole]
                    peers.check(self.case, self.problem, candidate, right)
        return " and ".join(sorted(families)) or None

    def composition(self, base: str) -> peers.Candidate:
        """The composition with this peer, compiled: one graph with autograd and one without."""
        if base not in self._compositions:
            found = peers.composition(self.case, self.problem, self.candidates[base])
            before = peers.compiled_graphs()
            self._run_once(found)
            graphs = peers.compiled_graphs() - before
            assert graphs == 2, f"the epilogue was compiled to {graphs} graphs instead of 2"
            self._compositions[base] = found
        return self._compositions[base]

    def step(self, candidate: peers.Candidate, which: str) -> Step:
        """One pass of a candidate. A forward alone is that of inference, without autograd."""
        names = candidate.names(self.problem)
        inputs = {name: self.problem.tensors[name] for name in names}
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}

        def infer(_):
            with candidate.chosen(), torch.no_grad():
                return candidate.function(inputs)

        def run(_=None):
            with candidate.chosen():
                return candidate.function(leaves)

        def differentiate(out):
            with candidate.chosen():
                return torch.autograd.grad(out, list(leaves.values()), self.problem.d_out.to(out))

        if which == "forward":
            return Step(infer)
        if which == "backward":
            return Step(differentiate, run)
        return Step(lambda _: differentiate(run()))


@pytest.fixture(scope="module")
def entry_of(device, is_compile_only):
    """Entries by case. One at a time is kept: the passes of a case come one after another."""
    kept: dict[str, Entry] = {}

    def get(case: AttentionCase) -> Entry:
        if case.id not in kept:
            kept.clear()
            kept[case.id] = Entry(case, device, is_checked=not is_compile_only)
        return kept[case.id]

    yield get
    kept.clear()


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=SETS.get(case.set, ())) for name, case in CASES.items()],
)
@pytest.mark.benchmark(timer=timing.clock)
def test_attention(case, which, benchmark, entry_of, stopwatch, ceilings, is_compile_only):
    entry = entry_of(case)
    if is_compile_only:
        for base in entry.bases if entry.is_composable else ():
            entry.composition(base)
        pytest.skip("compiled")
    steps = {name: entry.step(x, which) for name, x in entry.candidates.items()}
    if which == "forward":
        steps.pop("ours-hopper-any-order", None)  # has the same forward
    composition = None
    if entry.is_composable:
        base = stopwatch.fastest({name: steps[name] for name in entry.bases})
        composition = f"{base}+epilogue"
        steps[composition] = entry.step(entry.composition(base), which)
    ours = steps.pop("ours")
    with torch.compiler.set_stance("fail_on_recompile"):
        seconds = timing.race(benchmark, "attention", stopwatch, ours, steps, entry.plain)
        if benchmark.disabled:
            return
        steps = {"ours": ours, **steps}
        graphs = {}
        # A graph of the backward alone would hold the forward before it too.
        if ceilings and which != "backward" and case.sizes.queries <= GRAPH_LENGTH:
            graphs = {name: timing.graph_ms(stopwatch, step) for name, step in steps.items()}
    benchmark.extra_info |= {
        "case": case.id,
        "set": case.set,
        "form": case.form,
        "pass": which,
        **sizes_of(case),
        "family": entry.family,
        "left_out": entry.left_out,
        "times": describe(case, which, seconds),
        **ratios(seconds, entry.plain, composition),
    }
    if ceilings:
        benchmark.extra_info |= of_ceilings(benchmark.extra_info["times"]["ours"], ceilings)
        benchmark.extra_info["host_ms"] = {
            name: timing.host_ms(step) for name, step in steps.items()
        }
        peaks = {name: timing.peak_bytes(step) for name, step in steps.items()}
        benchmark.extra_info |= memory(peaks)
    if graphs:
        benchmark.extra_info["graph_ms"] = graphs


def sizes_of(case: AttentionCase) -> dict[str, Any]:
    """What a report sorts cases by."""
    sizes = case.sizes
    return {
        "batch": sizes.batch,
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "length": sizes.queries,
        "head_dim": sizes.head_dim,
        "is_causal": sizes.is_causal,
        "dtype": str(sizes.dtype).removeprefix("torch."),
    }


def visible_pairs(sizes: Case) -> int:
    """Number of query and key pairs of a head, T = S."""
    length = sizes.queries
    return length * (length + 1) // 2 if sizes.is_causal else length**2


def moved_bytes(case: AttentionCase, which: str) -> int:
    """Bytes of the arguments and results of a pass of the operator, each once."""
    sizes = case.sizes
    q = sizes.batch * sizes.heads * sizes.queries * sizes.head_dim
    k = q * sizes.kv_heads // sizes.heads
    residual = q if sizes.residual_dtype is not None else 0
    inputs, out = q + 2 * k + residual, q
    elements = {
        "forward": inputs + out,
        "backward": inputs + out + inputs,  # d_out, and a gradient for each input
        "forward+backward": inputs + out + out + inputs,
    }[which]
    return elements * sizes.dtype.itemsize


def describe(case: AttentionCase, which: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Times and speed of every candidate: 4 B H D times the visible pairs, forward."""
    sizes = case.sizes
    pairs = sizes.batch * sizes.heads * visible_pairs(sizes)
    flops = FLOPS[which] * 4 * pairs * sizes.head_dim
    found = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        found[name] = timing.summary(times) | {
            "tflops": float(f"{flops / median / 1e12:.4g}"),
            "gbps": float(f"{moved_bytes(case, which) / median / 1e9:.4g}"),
        }
    return found


def ratios(
    seconds: Mapping[str, list[float]], plain: list[str], composition: str | None
) -> dict[str, Any]:
    """Speed of the operator relative to the fastest plain peer and to the composition."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(plain, key=medians.__getitem__)
    found: dict[str, Any] = {
        "best_plain": best,
        "speed_vs_plain": round(medians[best] / medians["ours"], 4),
    }
    if composition is not None:
        found["composition"] = composition
        found["speed_vs_composition"] = round(medians[composition] / medians["ours"], 4)
    if "ours-hopper" in medians:
        hopper = medians["ours-hopper"]
        found["hopper_vs_portable"] = round(medians["ours-portable"] / hopper, 4)
        if "ours-hopper-any-order" in medians:
            found["any_order_vs_fixed"] = round(hopper / medians["ours-hopper-any-order"], 4)
    return found


def of_ceilings(ours: Mapping[str, float], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Speed as a fraction of that of a large product, and of a copy, on this GPU."""
    return {
        "of_matmul": round(ours["tflops"] / ceilings["matmul_tflops"], 4),
        "of_copy": round(ours["gbps"] / ceilings["copy_gbps"], 4),
    }


def memory(peaks: Mapping[str, int]) -> dict[str, Any]:
    """Most memory beside the inputs, in MiB, and that of the operator relative to cuDNN's."""
    found: dict[str, Any] = {
        "peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()}
    }
    if "cudnn" in peaks:
        found["memory_vs_cudnn"] = round(peaks["ours"] / peaks["cudnn"], 4)
    return found
