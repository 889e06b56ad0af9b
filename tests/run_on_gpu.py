"""Test the operator on this machine's GPU, then time it, and write reports as JSON: `make gpu`.

Nothing is installed or downloaded: the checkout is imported as it stands. Tests about a CPU or
about Triton's interpreter skip themselves, those marked `gpu` (real sizes, a thousand repeats) run
here alone. Then come the benchmark's cases marked `gates`, beside their peers, and what a call
costs the host. Each result is recorded as it comes, so that neither a crash nor a hang, which ends
at the limit, loses the others; run again, the benchmark goes on where it stopped.

    python tests/run_on_gpu.py [--output FOLDER] [--limit SECONDS] [--speed-limit SECONDS]
                               [--processes N]
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("torch", "triton", "numpy", "pytest", "xdist", "hypothesis", "pytest_benchmark")
COMPILE_SECONDS, CASE_SECONDS, HOST_COST_SECONDS = 50, 45, 20
TEST_FILES = (  # what matters most comes first
    "kernels/test_attention_kernels.py",
    "kernels/test_hopper_gpu.py",
    "kernels/test_hopper_forward.py",
    "kernels/test_hopper_backward.py",
    "kernels/test_hopper_calls.py",
    "kernels/test_hopper_check.py",
    "kernels/test_fixed_maximum.py",
    "operator/test_near_identity_priors.py",
    "kernels/test_descriptors.py",
    "kernels/test_dominant_keys.py",
    "kernels/test_kernel_priors.py",
    "kernels/test_families.py",
    "operator/test_priors.py",
    "operator/test_ops.py",
    "operator/test_compile.py",
    "operator/test_functional.py",
    "operator/test_composite.py",
    "operator/test_reference.py",
    "operator/test_fidelity.py",
    "operator/test_testing.py",
    "nn/test_attention.py",
    "nn/test_methods.py",
    "nn/test_mlp.py",
    "nn/test_transformer.py",
)


class Recorder:
    """Plugin of pytest: writes one line of JSON for what was collected and for each result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_collection = False

    def _write(self, **fields: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def pytest_collection_finish(self, session) -> None:
        self._collected([item.nodeid for item in session.items])

    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self._collected(list(ids))

    def _collected(self, names: list[str]) -> None:
        # Every worker of xdist has the same names, and the process above them none.
        if names and not self.has_collection:
            self.has_collection = True
            self._write(collected=names)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(
                test=report.nodeid,
                outcome=report.outcome,
                seconds=round(report.duration, 2),
                message="" if report.outcome == "passed" else report.longreprtext[-2000:],
            )


def summarize(lines: list[str]) -> dict[str, Any]:
    """Report from the lines of a `Recorder`; a test without a result is one that did not finish."""
    collected, results = [], {}
    for line in lines:
        fields = json.loads(line)
        if "collected" in fields:
            collected = fields["collected"]
        else:
            results[fields["test"]] = fields  # of a test that fails while it is torn down, the last
    files = collections.defaultdict(collections.Counter)
    for name, result in results.items():
        files[name.split("::")[0]][result["outcome"]] += 1
        files[name.split("::")[0]]["seconds"] += result["seconds"]
    outcomes = collections.Counter(result["outcome"] for result in results.values())
    return {
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "not_finished": [name for name in collected if name not in results],
        "failures": {
            name: result["message"]
            for name, result in results.items()
            if result["outcome"] == "failed"
        },
        "slowest": {
            result["test"]: result["seconds"]
            for result in sorted(results.values(), key=lambda result: -result["seconds"])[:20]
        },
        "files": {name: dict(counts) for name, counts in sorted(files.items())},
    }


def missing_requirements() -> list[str]:
    """What this machine lacks, in words."""
    missing = [
        f"the Python package {name}" for name in REQUIRED if not importlib.util.find_spec(name)
    ]
    if "the Python package torch" not in missing:
        import torch

        if not torch.cuda.is_available():
            missing.append(f"a GPU that torch sees (torch {torch.__version__} sees none)")
    return missing


def run(command: list[str], limit: float) -> tuple[int | None, str]:
    """Run Python with this checkout; return its exit status, None at the limit, and its output.

    At the limit its whole process group is ended.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of its workers can be ended with it
    )
    try:
        output, _ = child.communicate(timeout=limit)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def run_tests(
    record: Path, files: list[str], limit: float, processes: int
) -> tuple[int | None, str]:
    """Run pytest in processes of its own; return its exit status, None at the limit, and output."""
    return run([__file__, "--record", str(record), "-n", str(processes), *files], limit)


def measure_speed(record: Path, limit: float, processes: int, suite: list[str]) -> str:
    """Run `suite` of the benchmark until all of it has a result in `record`, or to the limit.

    A process that ends in a case, by a crash or a hang, is started again without it. Returns what
    is to be said about cases without a result.
    """
    deadline = time.monotonic() + limit
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *suite]
    # Processes on all cores fill the compilers' caches, which one process alone then reads.
    run(
        [*pytest, "--compile-only", "-n", str(processes), "--dist", "worksteal"],
        min(COMPILE_SECONDS, limit),
    )
    while (left := deadline - time.monotonic()) > 0:
        status, log = run(
            [*pytest, "--record", str(record), "--watchdog", str(CASE_SECONDS)], limit=left
        )
        if status is None:
            break
        if not record.exists():
            return f"the benchmark did not start: {log[-2000:]}"
        report = json.loads(record.read_text(encoding="utf-8"))
        if not report["running"] or report["to_do"] == 1:
            return ""
    return "the benchmark reached its limit; run it again to go on"


def measure_host_cost(output: Path) -> str:
    """Run `bench/host_cost.py`, which prints a profile too; what it cannot do fails no test."""
    command = [str(ROOT / "bench" / "host_cost.py"), "--output", str(output)]
    status, log = run(command, HOST_COST_SECONDS)
    return "" if status == 0 else f"bench/host_cost.py ended with {status}: {log[-2000:]}"


def summarize_speed(record: Path) -> list[str]:
    """What to print about the benchmark: gates missed, and what failed or did not finish."""
    if not record.exists():
        return []
    report = json.loads(record.read_text(encoding="utf-8"))
    met = sum(gate["met"] for gate in report["gates"])
    lines = [f"{len(report['benchmarks'])} times, {met} of {len(report['gates'])} gates: {record}"]
    lines += [
        f"missed {gate['gate']}: {gate['value']:.3g}, bound {gate['bound']:g}, {gate['case']}"
        for gate in report["gates"]
        if not gate["met"]
    ]
    for entry in (entry["extra_info"] for entry in report["benchmarks"]):
        if "hopper_vs_portable" in entry:
            any_order = entry.get("any_order_vs_fixed")
            lines.append(
                f"speed of hopper / portable {entry['hopper_vs_portable']:.2f}"
                + (f", any order / fixed {any_order:.2f}" if any_order else "")
                + f", auto picks {entry['family']}: {entry['case']}, {entry['pass']}"
            )
    lines += [f"FAILED {name}" for name in report["failures"]]
    not_finished = [*report["not_finished"], report["running"]]
    lines += [f"not finished: {name}" for name in not_finished if name]
    left_out = {}
    for entry in report["benchmarks"]:
        left_out |= entry["extra_info"].get("left_out", {})
    lines += [f"left out {name}: {reason}" for name, reason in left_out.items()]
    return lines


def main() -> int:
    """Check that there is a GPU, run, write the reports; 0 only if every test ran and passed.

    A gate of the benchmark that is missed fails nothing, an operator that is wrong there does.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/GPU")
    parser.add_argument("--limit", type=float, default=150, help="of the tests, in seconds")
    parser.add_argument("--speed-limit", type=float, default=120, help="of the benchmark")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    arguments = parser.parse_args()
    missing = missing_requirements()
    if missing:
        print(
            "make gpu runs the tests of the operator on a GPU: NVIDIA from sm_80 or AMD gfx942, "
            "with torch 2.11 and Triton 3.6 or newer.\n"
            f"This machine lacks {', '.join(missing)}.\n"
            "Without a GPU, `make test` runs the same tests in Triton's interpreter.",
            file=sys.stderr,
        )
        return 2

    sys.path.insert(0, str(ROOT))
    import torch

    from shaped_attn.environment import collect

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    folder = arguments.output or ROOT / "bench" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(ROOT / "tests" / name) for name in TEST_FILES]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "results.jsonl"
        record.touch()
        status, log = run_tests(record, files, arguments.limit, arguments.processes)
        report = summarize(record.read_text(encoding="utf-8").splitlines())
    report = {
        "command": "make gpu",
        "environment": collect(),
        "seconds": round(time.monotonic() - start, 1),
        "limit_in_seconds": arguments.limit,
        "exit_status": status,
        **report,
    }
    output = folder / "correctness.json"
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{report[name]} {name}" for name in ("passed", "failed", "skipped"))
    print(
        f"{counts}, {len(report['not_finished'])} not finished in {report['seconds']} s: {output}"
    )
    for name, message in report["failures"].items():
        print(f"FAILED {name}: {message.strip().splitlines()[-1] if message.strip() else ''}")
    print(log[-2000:] if status else "", end="", file=sys.stderr, flush=True)

    speed = folder / "speed.json"
    suite = ["bench/bench_attention.py", "-m", "gates"]
    for note in (
        measure_speed(speed, arguments.speed_limit, arguments.processes, suite),
        *summarize_speed(speed),
        measure_host_cost(folder / "host_cost.json"),
    ):
        print(note, end="\n" if note else "")
    is_right = not (speed.exists() and json.loads(speed.read_text(encoding="utf-8"))["failures"])
    return 0 if status == 0 and not report["not_finished"] and is_right else 1


def _record() -> int:
    """Run pytest here, as the child that `run_tests` starts."""
    import pytest

    _, _, record, *options = sys.argv
    options += ["-q", "-p", "no:cacheprovider", "--dist", "load", "-m", "gpu or not slow"]
    return pytest.main(options, plugins=[Recorder(Path(record))])


if __name__ == "__main__":
    sys.exit(_record() if sys.argv[1:2] == ["--record"] else main())
