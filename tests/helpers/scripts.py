"""Scripts beside the package, which are no modules of it."""

from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A conftest.py of a folder whose tests use the fixtures of the benchmark.
BENCH_CONFTEST = f"""
from importlib import util
spec = util.spec_from_file_location("bench_conftest", {str(ROOT / "bench/conftest.py")!r})
module = util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({{name: x for name, x in vars(module).items() if not name.startswith("__")}})
"""


def load_script(path: Path):
    """The module that a script is, which is not run as one."""
    spec = util.spec_from_file_location(path.stem, path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
