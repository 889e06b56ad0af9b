import getpass
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# The modules beside this one, which `--import-mode=importlib` does not find.
sys.path.insert(0, str(Path(__file__).parent))

# As in tests/conftest.py: code compiled for other instructions gives wrong numbers.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(
        tempfile.gettempdir(),
        f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}",
    ),
)

# Its pool of processes would run beside what is timed, and beside that of every worker of xdist.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import results  # noqa: E402
import timing  # noqa: E402
from cases import PASSES  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    torch.set_num_threads(1)  # ratios that hold on machines with other work, and other cores


def pytest_addoption(parser):
    group = parser.getgroup("shaped_attn")
    group.addoption(
        "--compile-only",
        action="store_true",
        help="Compile and run every candidate once, for the caches; use it with -n.",
    )
    group.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="Write each result into this JSON file as it comes, and go on where it stopped.",
    )
    group.addoption(
        "--watchdog",
        type=float,
        metavar="SECONDS",
        help="End the process if one benchmark takes longer; --record then knows which.",
    )


def pytest_configure(config):
    if config.getoption("--record"):
        recorder = results.Recorder(config, config.getoption("--record"))
        config.pluginmanager.register(recorder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the extended set, unless marks or names are asked for."""

    def is_left_out(item):
        if config.getoption("--compile-only") and hasattr(item, "callspec"):
            # All passes of a case are compiled together.
            return item.callspec.params.get("which", PASSES[0]) != PASSES[0]
        is_asked_for = config.getoption("-m") or config.getoption("-k")
        return not is_asked_for and item.get_closest_marker("extended") is not None

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(results.machine())


def pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort):
    """Ratios are not scaled."""
    return "", 1.0


@pytest.fixture(scope="session")
def is_compile_only(request):
    return request.config.getoption("--compile-only")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


@pytest.fixture(scope="session")
def stopwatch(device):
    return timing.Stopwatch(device)


@pytest.fixture(scope="session")
def ceilings(stopwatch, is_compile_only):
    """What the GPU does at best, measured with warm clocks; empty without one."""
    if not HAS_GPU or is_compile_only:
        return {}
    results.state["ceilings"] = timing.ceilings(stopwatch)
    results.state["gpu"] = timing.gpu_state()
    return results.state["ceilings"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
