"""A driver that stands for a GPU: Triton compiles for it, and launches are kept, not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget

from . import configs


def target_of(arch: int | str) -> GPUTarget:
    """Compilation target of an architecture of the tables."""
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


class StandInDriver:
    """For ``triton.runtime.driver.driver.set_active``. Without a GPU there is no way back.

    Attributes:
        launches: the positional arguments of each launch, with what a launcher gets before them.
    """

    def __init__(self, arch: int | str) -> None:
        self.target = target_of(arch)
        self.device = configs.ARCHITECTURES.index(arch)
        self.launches: list[tuple] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Return a number of its own for each architecture: Triton caches by it."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return None, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: None) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launcher(*arguments: Any) -> None:
            self.launches.append(arguments)

        return launcher
