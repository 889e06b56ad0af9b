import contextlib

import pytest
import torch

from shaped_attn.kernels import families, launch


@pytest.fixture
def hopper():
    """Makes calls run on the Hopper kernels: on the GPU, or in the emulator.

    hopper(seed=0, interleave=1) is a context manager; seed and interleave are the emulator's.
    """
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
