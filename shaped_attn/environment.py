"""What a bug report needs to know about the machine, the interpreter and the libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from ._version import __version__

LIBRARIES = ("torch", "triton", "numpy", "click", "rich", "matplotlib")


def collect() -> dict[str, Any]:
    """Describe the environment as plain numbers, strings, lists and dicts, ready for JSON.

    Nothing is launched and no file is written. Missing libraries and absent devices are None or an
    empty list, never an error: a broken environment is the one that has to be described.
    """
    return {
        "shaped_attn": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "os": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver_version(),
        "gpus": [_gpu(index) for index in range(_gpu_count())],
        "triton_interpret": os.environ.get("TRITON_INTERPRET"),
        "kernels": kernel_availability(),
        "default_impl": "triton" if _gpu_count() else "torch",
    }


def kernel_availability() -> dict[str, str | bool]:
    """Say whether ``impl="triton"`` runs the Triton kernels here, and why or why not.

    ``mode`` is "gpu", "interpreter" or "unavailable".
    """
    try:
        import triton.language as tl
        from triton import JITFunction

        from .kernels.launch import is_interpreted

        interpreted = is_interpreted()
        was_late = interpreted and isinstance(tl.cdiv, JITFunction)
    except Exception as error:  # any failure of a third-party import is the answer, not a crash
        reason = f"{type(error).__name__}: {error}"
        return {"available": False, "mode": "unavailable", "reason": reason}
    if was_late:
        reason = "TRITON_INTERPRET was set after Triton was imported; set it before Python starts"
        return {"available": False, "mode": "unavailable", "reason": reason}
    if interpreted:
        reason = "Triton's interpreter runs the kernels: exact, for checks only, slow"
        return {"available": True, "mode": "interpreter", "reason": reason}
    if _gpu_count():
        return {"available": True, "mode": "gpu", "reason": "compiled for the GPU at first use"}
    reason = "no GPU; set TRITON_INTERPRET=1 before Python starts to run them under the interpreter"
    return {"available": False, "mode": "unavailable", "reason": reason}


def lines(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Turn what :func:`collect` returned into (name, text) pairs, in the order to print them."""
    gpus = [
        f"{gpu['name']} (capability {gpu['capability']}, {gpu['memory_gib']:.0f} GiB)"
        for gpu in environment["gpus"]
    ]
    cpu = [environment["cpu"], f"{environment['cpu_count']} cores", environment["cpu_capability"]]
    kernels = environment["kernels"]
    return [
        ("shaped_attn", environment["shaped_attn"]),
        ("Python", f"{environment['python']} ({environment['executable']})"),
        *((name, found or "not installed") for name, found in environment["libraries"].items()),
        ("OS", environment["os"]),
        ("libc", environment["libc"] or "unknown"),
        ("CPU", ", ".join(map(str, cpu))),
        ("torch threads", str(environment["threads"])),
        ("GPU", "; ".join(gpus) or "none"),
        ("driver", environment["driver"] or "none"),
        ("CUDA (torch)", environment["cuda"] or "none"),
        ("ROCm (torch)", environment["hip"] or "none"),
        ("TRITON_INTERPRET", environment["triton_interpret"] or "not set"),
        ("Triton kernels", f"{kernels['mode']} ({kernels['reason']})"),
        ("default impl", environment["default_impl"]),
    ]


def _version(distribution: str) -> str | None:
    # ROCm builds bring Triton under another distribution name.
    others = ("pytorch-triton-rocm", "pytorch-triton", "triton-windows")
    for name in (distribution, *(others if distribution == "triton" else ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_name() -> str:
    # platform.processor() is empty or an architecture on Linux.
    found = _first_line("model name", "/proc/cpuinfo")
    return found.partition(":")[2].strip() if found else platform.processor() or platform.machine()


def _driver_version() -> str | None:
    # The kernel module says it without starting another program.
    return _first_line("", "/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def _first_line(start: str, *paths: str) -> str | None:
    """Return the first line with this start in the first file that can be read."""
    for path in paths:
        with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
            return next((line.strip() for line in file if line.startswith(start)), None) or None
    return None


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": getattr(properties, "gcnArchName", None)
        if torch.version.hip
        else f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }
