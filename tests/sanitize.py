"""Run the Hopper kernels, small, under NVIDIA's compute-sanitizer: `make sanitize`.

memcheck finds accesses out of bounds, racecheck races on shared memory, synccheck barriers used
wrongly. The exit code is 1 if a tool finds something or does not end within the limit.

    python tests/sanitize.py [--tools memcheck racecheck synccheck] [--limit SECONDS]
    python tests/sanitize.py --calls     # the calls alone, as the tools run them
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")
LENGTH, KEYS = 200, 530  # ragged, more than one tile of each kind, both launches of the forward


def missing_requirements() -> list[str]:
    """What this machine lacks, in words."""
    missing = []
    if shutil.which("compute-sanitizer") is None:
        missing.append("compute-sanitizer on PATH (it comes with the CUDA toolkit)")
    import torch

    if not torch.cuda.is_available():
        missing.append(f"a GPU that torch sees (torch {torch.__version__} sees none)")
    elif torch.cuda.get_device_capability() != (9, 0):
        missing.append(f"a Hopper GPU (this is a {torch.cuda.get_device_name()})")
    return missing


def calls(device: str = "cuda", lengths: tuple[int, int] = (LENGTH, KEYS)) -> int:
    """Run forward and backward of a few calls on the Hopper kernels; return how many."""
    import torch

    from shaped_attn import shaped_attention
    from shaped_attn.kernels import use_family

    count = 0
    for head_dim, is_causal, deterministic in itertools.product(
        (64, 128, 256), (True, False), (True, False)
    ):
        queries, keys = lengths
        q = torch.randn(2, 2, queries, head_dim).to(device, torch.bfloat16).requires_grad_()
        k, v = (
            torch.randn(2, 1, keys, head_dim).to(device, torch.bfloat16).requires_grad_()
            for _ in range(2)
        )
        residual = torch.randn(q.shape).to(device, torch.bfloat16).requires_grad_()
        # Some weights overflow in the first launch.
        scale = 20 / head_dim**0.5
        options = {"key_start": torch.tensor([0, 3], device=device), "is_causal": is_causal}
        with use_family("hopper"):
            out = shaped_attention(
                *(q, k, v, residual),
                scale=scale,
                **options,
                deterministic=deterministic,
                impl="triton",
            )
            gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v, residual))
        assert all(x.isfinite().all() for x in (out, *gradients))
        count += 1
    return count


def main() -> int:
    """Check what is there, run the tools; 0 only if none finds anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit", type=float, default=180, help="of each tool, in seconds")
    parser.add_argument("--calls", action="store_true", help="make the calls, without a tool")
    arguments = parser.parse_args()
    if arguments.calls:
        print(f"{calls()} calls, forward and backward")
        return 0
    missing = missing_requirements()
    if missing:
        print(
            "make sanitize runs the Hopper kernels under compute-sanitizer.\n"
            f"This machine lacks {' and '.join(missing)}.\n"
            "Without them, tests/kernels finds races in the emulator of Gluon kernels.",
            file=sys.stderr,
        )
        return 2
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Allocations of their own, so that an access beside one is seen.
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    this = [sys.executable, __file__, "--calls"]
    code = 0
    print("compiling", flush=True)
    if subprocess.run(this, env=environment, timeout=arguments.limit).returncode:
        return 1
    for tool in arguments.tools:
        print(f"==> {tool}", flush=True)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *this]
        try:
            found = subprocess.run(command, env=environment, timeout=arguments.limit).returncode
        except subprocess.TimeoutExpired:
            print(f"{tool} did not end within {arguments.limit:g} s; --limit allows for more")
            found = 1
        code = code or min(1, abs(found))
    return code


if __name__ == "__main__":
    sys.exit(main())
