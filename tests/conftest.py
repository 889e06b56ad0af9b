import contextlib
import getpass
import os
import signal
import tempfile

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a failure points at the change, not at the draw.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# A shell lets its background jobs ignore Ctrl-C, and Python keeps that.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = torch.cuda.is_available()

# Triton reads this once, when a kernel is first defined.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


# torch keeps compiled code in a folder that does not tell for which instructions it was compiled:
# code of another ATEN_CPU_CAPABILITY gives wrong numbers.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(
        tempfile.gettempdir(),
        f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}",
    ),
)

# Every xdist worker would otherwise start one thread per core.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


def pytest_runtest_setup(item):
    if not HAS_GPU and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU for its size or number of calls")
    if HAS_GPU and item.get_closest_marker("interpreter"):
        pytest.skip("says something about Triton's interpreter, which is off where there is a GPU")


@pytest.fixture(scope="session")
def device():
    """The GPU if there is one. Draw on the CPU and move, for the same numbers everywhere."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    """The draws of a test do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Memory that a kernel has not written reads as NaN."""
    from shaped_attn.testing import poison_empty

    with poison_empty():
        yield


@pytest.fixture
def one_thread():
    """Training whose sums depend neither on the machine nor on tests that ran before."""
    from tiny_training import one_thread

    with one_thread():
        yield


@pytest.fixture
def hopper():
    """Makes calls run on the Hopper kernels: on the GPU, or in the emulator.

    hopper(seed=0, interleave=1) is a context manager; seed and interleave are the emulator's.
    """
    from shaped_attn.kernels import families, launch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is no Hopper")

    @contextlib.contextmanager
    def on_hopper(seed: int = 0, interleave: int = 1):
        launch.forget_plans()
        with contextlib.ExitStack() as stack:
            if not torch.cuda.is_available():
                from gluon_emulator import emulated

                stack.enter_context(emulated(seed, interleave))
                stack.enter_context(launch.assume_architecture(90))
            stack.enter_context(families.use_family("hopper"))
            yield
        launch.forget_plans()

    return on_hopper
