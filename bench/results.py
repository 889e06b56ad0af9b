"""Where results go: one JSON file in the format of pytest-benchmark, complete after every entry."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark
import torch

from shaped_attn import environment, speed

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "results"

# What a session has measured about the machine: "ceilings" and "gpu".
state: dict[str, Any] = {}


def device_folder() -> Path:
    """The folder of this machine's results."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return FOLDER / re.sub(r"[^a-z0-9]+", "-", name.lower())


def machine() -> dict[str, Any]:
    """What a result depends on, beside the sources."""
    collected = environment.collect()
    del collected["executable"]
    return {**collected, **state}


def sources() -> str:
    """Digest of all that is measured and that measures: results are of one state of it."""
    digest = hashlib.sha256()
    for folder in ("bench", "kernels", "shaped_attn"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Recorder:
    """Plugin of pytest: keeps a JSON file up to date, and goes on where it stopped.

    What the file has is left out, unless that is all that was asked for: then it is measured anew.
    A file that is not continued, such as one of other sources or another machine, is renamed.
    """

    def __init__(self, config, path: Path) -> None:
        self.config = config
        self.path = path
        family = os.environ.get("SHAPED_ATTN_FAMILY", "auto")  # of kernels, for "ours"
        self.key = {"sources": sources(), "device": device_folder().name, "family": family}
        if path.exists():
            self.report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if any(self.report.get(name) != value for name, value in self.key.items()):
                self.start_anew()
            elif self.report["running"]:  # the process ended in it
                self.report["not_finished"].append(self.report["running"])
                self.report["running"] = None
        else:
            self.start_anew()

    def start_anew(self) -> None:
        """Begin an empty report; a file that is there gets the date of its last result."""
        if self.path.exists():
            date = re.sub(r"[:.+]", "-", self.report.get("datetime", "undated"))
            self.path.rename(self.path.with_name(f"{self.path.stem}_{date}{self.path.suffix}"))
        self.report = {
            **self.key,
            "version": pytest_benchmark.__version__,
            "commit_info": self.config.hook.pytest_benchmark_generate_commit_info(
                config=self.config
            ),
            "benchmarks": [],
            "failures": {},
            "not_finished": [],
            "running": None,
        }

    def save(self) -> None:
        """Replace the file as a whole."""
        self.report["datetime"] = datetime.now(timezone.utc).isoformat()
        self.report["machine_info"] = machine()
        self.report["gates"] = speed.gates(self.report["benchmarks"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        done = {entry["fullname"] for entry in self.report["benchmarks"]}
        done |= {*self.report["failures"], *self.report["not_finished"]}
        if all(item.nodeid in done for item in items):
            self.start_anew()
            done = set()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
        self.report["to_do"] = len(items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.report["running"] = nodeid
        self.save()
        if self.config.getoption("--watchdog"):
            # Works while the process waits for a GPU that hangs.
            faulthandler.dump_traceback_later(self.config.getoption("--watchdog"), exit=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            self.report["failures"][item.nodeid] = report.longreprtext[-2000:]
        elif report.when == "call" and report.passed:
            benchmark = item.funcargs.get("benchmark")
            if benchmark is not None and (stats := benchmark.stats) is not None:
                self.report["benchmarks"].append(stats.as_dict() | {"params": None})
        return report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.report["running"] = None
        self.report["to_do"] -= 1
        self.save()
