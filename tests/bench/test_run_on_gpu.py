"""The runner behind `make gpu`, on tests that need no GPU."""

import json

import pytest
from scripts import BENCH_CONFTEST, ROOT, load_script

SCRIPT = ROOT / "tests/run_on_gpu.py"

TESTS = """
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "what went wrong"

@pytest.mark.skip(reason="not here")
def test_skips():
    pass

@pytest.fixture
def breaks_at_the_end():
    yield
    raise RuntimeError("in teardown")

def test_fails_in_teardown(breaks_at_the_end):
    pass

@pytest.mark.slow
def test_is_left_out():
    pass
"""


# A benchmark of which two cases end the process, one of them by the watchdog.
BENCHMARK = """
import os, signal
import pytest

@pytest.fixture(autouse=True)
def only_when_timed(is_compile_only):
    if is_compile_only:
        pytest.skip("compiled")

def test_first(benchmark):
    benchmark.pedantic(lambda: None)

def test_crashes(benchmark):
    os._exit(7)

def test_hangs(benchmark):
    signal.pause()

def test_is_wrong(benchmark):
    assert 1 == 2, "what went wrong"

def test_last(benchmark):
    benchmark.pedantic(lambda: None)
"""


@pytest.fixture
def runner():
    return load_script(SCRIPT)


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "results.jsonl"
    path.touch()
    return path


def test_every_file_it_runs_exists(runner):
    assert [name for name in runner.TEST_FILES if not (SCRIPT.parent / name).is_file()] == []


def test_every_outcome_is_in_the_report(runner, record, tmp_path):
    file = tmp_path / "test_outcomes.py"
    file.write_text(TESTS)
    status, output = runner.run_tests(record, [str(file)], limit=300, processes=2)
    assert status == 1, output
    report = runner.summarize(record.read_text().splitlines())
    assert (report["passed"], report["failed"], report["skipped"]) == (1, 2, 1)
    assert report["not_finished"] == []
    by_name = {name.split("::")[1]: message for name, message in report["failures"].items()}
    assert "what went wrong" in by_name["test_fails"]
    assert "in teardown" in by_name["test_fails_in_teardown"]


def test_at_the_limit_the_report_names_what_did_not_finish(runner, record, tmp_path):
    file = tmp_path / "test_endless.py"
    file.write_text("import signal\n\ndef test_endless():\n    signal.pause()\n")
    status, _ = runner.run_tests(record, [str(file)], limit=0, processes=1)
    assert status is None
    lines = [
        json.dumps({"collected": ["a.py::one", "a.py::two"]}),
        json.dumps({"test": "a.py::one", "outcome": "passed", "seconds": 1.0, "message": ""}),
    ]
    report = runner.summarize(lines)
    assert (report["passed"], report["not_finished"]) == (1, ["a.py::two"])


def test_ratios_of_families_are_printed(runner, tmp_path):
    entry = {"case": "a", "pass": "forward", "family": "hopper", "hopper_vs_portable": 1.499}
    other = entry | {"pass": "backward", "any_order_vs_fixed": 1.25, "family": "portable"}
    plain = {"case": "b", "pass": "forward", "family": "portable"}
    record = tmp_path / "speed.json"
    report = dict.fromkeys(("gates", "failures", "not_finished"), ()) | {"running": None}
    report["benchmarks"] = [{"extra_info": x} for x in (entry, other, plain)]
    record.write_text(json.dumps(report))
    assert runner.summarize_speed(record)[1:] == [
        "speed of hopper / portable 1.50, auto picks hopper: a, forward",
        "speed of hopper / portable 1.50, any order / fixed 1.25, auto picks portable: a, backward",
    ]


def test_the_benchmark_goes_on_after_a_crash_and_a_hang(runner, monkeypatch, tmp_path):
    (tmp_path / "conftest.py").write_text(BENCH_CONFTEST)
    file = tmp_path / "bench_endings.py"
    file.write_text(BENCHMARK)
    record = tmp_path / "speed.json"
    monkeypatch.setattr(runner, "CASE_SECONDS", 1)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # nothing is timed in a worker
    note = runner.measure_speed(record, limit=300, processes=1, suite=[str(file)])
    assert note == ""
    report = json.loads(record.read_text())

    def names(nodeids):
        return [nodeid.split("::")[1] for nodeid in nodeids]

    fullnames = [entry["fullname"] for entry in report["benchmarks"]]
    assert names(fullnames) == ["test_first", "test_last"]
    assert names(report["not_finished"]) == ["test_crashes", "test_hangs"]
    assert names(report["failures"]) == ["test_is_wrong"]
    assert "what went wrong" in next(iter(report["failures"].values()))
    assert (report["running"], report["to_do"]) == (None, 0)
    said = "\n".join(runner.summarize_speed(record))
    for part in ("2 times", "FAILED", "test_is_wrong", "not finished", "test_hangs"):
        assert part in said
