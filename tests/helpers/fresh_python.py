"""Python in a process of its own: what an import, an environment or the end of a process does."""

import os
import subprocess
import sys
from pathlib import Path


def python(*args, status=0, cwd=None, path=None, safe_path=False, timeout=300, **variables) -> str:
    """Standard output of `python *args`; its errors, where it is to end with another status.

    Its environment is this one's with `variables` set, or left out where they are None. A `path`
    becomes PYTHONPATH; no other variable PYTHON... is then passed on.
    """
    env = {"PYTHONDONTWRITEBYTECODE": "1"} | variables
    if path is not None:
        env = dict.fromkeys(name for name in os.environ if name.startswith("PYTHON")) | env
        env["PYTHONPATH"] = os.pathsep.join(map(str, path)) or None
    if safe_path:
        env["PYTHONSAFEPATH"] = "1"
    env = os.environ | env
    run = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == status, run.stdout + run.stderr
    return run.stderr if status else run.stdout.strip()


def compile_table(module: str, folder: Path) -> Path:
    """The table that a compile gate writes, compiled anew: nothing is decorated to interpret."""
    options = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": str(folder / "cache")}
    table = folder / "table.csv"
    python("-m", module, "--output", table, cwd=folder, safe_path=True, timeout=3600, **options)
    return table
