"""The benchmark around what it times: gates, reports, tracking, and the compiled composition."""

import csv
import functools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from command_line import invoke
from scripts import BENCH_CONFTEST, ROOT
from torch._dynamo.exc import FailOnRecompileLimitHit

from shaped_attn import plots, speed
from shaped_attn.plots.speed import plot_speed
from shaped_attn.testing import Case

# What an H100 measured, in the columns of an older script.
H100 = ROOT / "bench" / "results" / "h100" / "attention_at_d0ec308.csv"


def entries_of(rows):
    """Entries as `bench_attention.py` writes them, of one case of the CSV."""
    ours, *peers = rows["shaped"], rows["cudnn"], rows["flash"], rows["composed"]
    names = ("cudnn", "flash", "cudnn+epilogue")
    length, head_dim = int(ours["T"]), int(ours["D"])
    for which, columns in zip(
        speed.PASSES, (["forward"], ["backward"], ["forward", "backward"]), strict=True
    ):

        def milliseconds(row, columns=columns):
            return sum(float(row[f"{column}_ms"]) for column in columns)

        times = {"ours": milliseconds(ours)}
        times |= {name: milliseconds(row) for name, row in zip(names, peers, strict=True)}
        best = min(("cudnn", "flash"), key=times.get)
        entry = {
            "case": f"fixed-T{length}-D{head_dim}-{ours['mask']}",
            "set": "gates",
            "form": "fixed",
            "pass": which,
            "heads": int(ours["H"]),
            "kv_heads": int(ours["H"]),
            "length": length,
            "head_dim": head_dim,
            "is_causal": ours["mask"] == "causal",
            "dtype": "bfloat16",
            "times": {
                name: {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "tflops": 100 / ms}
                for name, ms in times.items()
            },
            "best_plain": best,
            "speed_vs_plain": times[best] / times["ours"],
            "composition": "cudnn+epilogue",
            "speed_vs_composition": times["cudnn+epilogue"] / times["ours"],
        }
        if which == "forward+backward":
            entry["memory_vs_cudnn"] = int(ours["peak_mb"]) / int(peers[0]["peak_mb"])
        yield entry


@pytest.fixture
def h100(tmp_path):
    """A report of the H100 as a file."""
    cases = {}
    for row in csv.DictReader(H100.read_text().splitlines()):
        case = tuple(row[name] for name in ("D", "T", "mask"))
        cases.setdefault(case, {})[row["form"].split(" ")[0]] = row
    entries = [entry for rows in cases.values() for entry in entries_of(rows)]
    machine = {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}], "libraries": {"torch": "2.11.0"}}
    path = tmp_path / "bench" / "results" / "h100" / "speed.json"
    path.parent.mkdir(parents=True)
    report = {
        "machine_info": machine,
        "commit_info": {"id": "d0ec308ffffff", "dirty": False},
        "benchmarks": [{"extra_info": entry} for entry in entries],
    }
    path.write_text(json.dumps(report))
    return path


def test_gates_are_met_or_missed_as_the_numbers_say(h100):
    report = speed.load(h100)
    assert len(report.attention) == 48
    verdicts = {(gate["gate"], gate["case"]): gate for gate in report.gates}
    # 32 of T >= 4096 and one pass, 8 pairs beside the composition, 8 short ones, 16 of memory
    assert len(verdicts) == 2 * 8 + 8 + 8 + 16
    slow = verdicts["forward: speed relative to the fastest plain peer", "fixed-T4096-D128-full"]
    assert (slow["met"], slow["value"]) == (False, pytest.approx(0.8163 / 1.6540))
    small = verdicts["forward+backward: peak memory relative to cuDNN's", "fixed-T4096-D128-full"]
    assert (small["met"], small["value"]) == (True, pytest.approx(393 / 387))


def test_gates_are_asked_of_their_cases_alone():
    entry = {"case": "a", "pass": "forward", "length": 4096, "speed_vs_plain": 0.75, "set": "gates"}

    def judge(**changes):
        return [gate["met"] for gate in speed.gates([{"extra_info": entry | changes}])]

    assert judge() == [True]
    assert judge(speed_vs_plain=0.7499) == [False]
    assert judge(length=2048) == []
    assert judge(set="default") == []
    assert judge(**{"pass": "backward", "speed_vs_plain": 0.7}) == [True]


def test_the_report_of_an_h100_renders(h100, tmp_path):
    done = invoke("bench", "--show", h100, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for part in ("NVIDIA H100", "d0ec308", "fixed T 4096 D 128", "missed", "met"):
        assert part in done.output
    assert (tmp_path / "out" / "speed.png").stat().st_size > 10_000


def test_the_plot_has_a_panel_for_each_pass_head_dimension_and_mask(h100):
    figure = plot_speed(speed.load(h100))
    assert len(figure.axes) == 12
    for axes in figure.axes:
        assert len(axes.lines) == 4
        assert all(len(line.get_xdata()) == 4 for line in axes.lines)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"shaped_attn", "cudnn", "flash", "composition"}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"benchmarks": [1]}')
    done = invoke("bench", "--show", path)
    assert done.exit_code == 1
    assert "other.json" in done.output and "--record" in done.output


def test_readme_is_written_from_results_and_names_what_is_missing(h100, bench_modules, tmp_path):
    import readme

    text = "".join(
        f"before\n<!-- speed of the {name}: python bench/readme.py -->\nold\n<!-- end -->\nafter\n"
        for name in ("gpu", "cpu")
    )
    path = tmp_path / "README.md"
    path.write_text(text)
    readme.update(tmp_path)
    written = path.read_text()
    gpu, cpu = written.split("speed of the cpu")
    assert "old" not in written
    assert written.count("before") == written.count("after") == 2
    assert "| D = 128, full | 0.28 / 0.32 | 0.41 / 0.26 | 0.49 / 0.25 | 0.53 / 0.25 |" in gpu
    assert readme.NOT_MEASURED not in gpu
    assert (h100.parent / "speed.png").is_file() and "speed.png" in gpu
    assert cpu.lower().count(readme.NOT_MEASURED) == 1
    readme.update(tmp_path)
    assert path.read_text() == written


def test_the_readme_is_that_of_the_committed_results(bench_modules, tmp_path):
    import readme

    text = (ROOT / "README.md").read_text()
    for name in readme.LENGTHS:
        mark = f"<!-- speed of the {name}: python bench/readme.py -->\n"
        found = re.search(re.escape(mark) + "\n(.*?)\n\n<!-- end -->", text, re.DOTALL)
        assert found.group(1) == readme.section(ROOT, name), "run python bench/readme.py"


# Two candidates whose times are given, and the fixtures of the real benchmark.
TRACKED = """
import os
import pytest
import timing
from timing import Step

OURS, PEER = map(float, os.environ["SECONDS_TAKEN"].split())

class FakeStopwatch:
    device = timing.torch.device("cpu")

    def seconds(self, step):
        return step.run(None)

@pytest.mark.benchmark(timer=timing.clock)
def test_tracked(benchmark):
    peers = {"peer": Step(lambda _: PEER)}
    timing.race(benchmark, "group", FakeStopwatch(), Step(lambda _: OURS), peers, ["peer"])
"""


def test_the_hosts_time_is_that_of_the_call_alone(bench_modules, monkeypatch):
    import timing

    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: passes(7.0))
    step = timing.Step(lambda prepared: passes(prepared), lambda: passes(5.0) or 0.002)
    assert timing.host_ms(step) == 2.0


def test_tracking_compares_ratios(monkeypatch, tmp_path):
    (tmp_path / "conftest.py").write_text(BENCH_CONFTEST)
    (tmp_path / "bench_tracked.py").write_text(TRACKED)
    baseline = tmp_path / "baseline.json"
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # nothing is timed in a worker

    def run(ours, peer, *options):
        monkeypatch.setenv("SECONDS_TAKEN", f"{ours} {peer}")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
        return subprocess.run(
            [*command, str(tmp_path / "bench_tracked.py"), *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = run(0.2, 0.1, f"--benchmark-json={baseline}")
    assert done.returncode == 0, done.stdout + done.stderr
    compare = (f"--benchmark-compare={baseline}", "--benchmark-compare-fail=median:20%")
    assert run(0.6, 0.3, *compare).returncode == 0  # a slower machine
    done = run(0.25, 0.1, *compare)
    assert done.returncode != 0
    assert "Performance has regressed" in done.stdout + done.stderr


def test_the_composition_never_turns_to_eager_code(bench_modules, monkeypatch):
    import cases
    import peers

    # Without the time that Inductor takes; Dynamo does the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    for length in range(8, 24):
        sizes = Case(1, 2, queries=length, head_dim=8, residual_dtype=torch.float32)
        case = cases.AttentionCase(sizes)
        problem = peers.draw(case, torch.device("cpu"))
        base = peers.PEERS["sdpa"](case, problem)
        composition = peers.composition(case, problem, base)
        before = peers.compiled_graphs()
        try:
            composition.function(problem.tensors)
        except FailOnRecompileLimitHit:
            break
        assert peers.compiled_graphs() == before + 1
    else:
        pytest.fail("sixteen shapes were compiled, where Dynamo's limit is eight")
    torch.compiler.reset()


def test_plots_can_be_saved_in_every_format(h100, tmp_path):
    for suffix in plots.SUFFIXES:
        assert plots.save(plot_speed(speed.load(h100)), tmp_path / f"speed{suffix}").is_file()
