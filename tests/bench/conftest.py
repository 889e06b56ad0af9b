import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

# An sdist has the tests alone.
collect_ignore_glob = [] if BENCH.is_dir() else ["test_*.py"]


@pytest.fixture
def bench_modules(monkeypatch):
    """The modules in bench/, for this test; processes that it starts can import them too."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH:
            del sys.modules[name]


@pytest.fixture
def sweep(bench_modules):
    import sweep

    return sweep
