"""Python in a process of its own: what an import, a signal or an environment does there."""

import os
import subprocess
import sys


def python(*args, cwd=None, path=(), safe_path=False, **env) -> str:
    """Standard output of `python *args`, which must succeed.

    `path` becomes PYTHONPATH; no other variable PYTHON... is passed on. `env` adds variables.
    """
    inherited = {key: os.environ[key] for key in os.environ if not key.startswith("PYTHON")}
    env = inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | env
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    if safe_path:
        env["PYTHONSAFEPATH"] = "1"
    run = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()
