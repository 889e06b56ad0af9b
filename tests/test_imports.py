"""Every test here starts a fresh Python: what an import does shows only the first time."""

import shutil
from functools import partial
from pathlib import Path

import fresh_python
import pytest

REPO = Path(__file__).resolve().parents[1]
python = partial(fresh_python.python, path=())


@pytest.fixture
def fake_kernels(tmp_path) -> Path:
    """A site folder with a package named `kernels` that is not ours."""
    package = tmp_path / "site/kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from kernels.hub import load\n")
    (package / "hub.py").write_text("def load():\n    return 'not ours'\n")
    return package.parent


def test_import_needs_torch_alone(tmp_path):
    code = """
import sys
for name in ("triton", "numpy", "matplotlib", "click", "rich"):
    sys.modules[name] = None  # makes `import name` fail
import shaped_attn
import torch
print(torch.ops.shaped_attn.attention)
"""
    assert python("-c", code, cwd=tmp_path, path=[REPO]) == "shaped_attn.attention"


def test_import_stays_light(tmp_path):
    code = """
import sys
import torch
before = set(sys.modules)
import shaped_attn
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(added & {"triton", "matplotlib", "click", "rich", "pytest", "hypothesis"}))
"""
    assert python("-c", code, cwd=tmp_path, path=[REPO]) == ""


@pytest.mark.parametrize("is_first", [True, False])
def test_flops_are_counted_whichever_import_comes_first(is_first, tmp_path):
    imports = ["import torch.utils.flop_counter", "import shaped_attn"]
    code = """
import torch
q = torch.randn(1, 2, 5, 16)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    torch.ops.shaped_attn.attention(q, q, q)
print(counter.get_total_flops())
"""
    code = "\n".join([*(imports if is_first else imports[::-1]), code])
    assert python("-c", code, cwd=tmp_path, path=[REPO]) == str(4 * 2 * 5 * 5 * 16)


def test_cpu_call_needs_no_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch
from shaped_attn import shaped_attention
q = torch.randn(1, 2, 5, 16)
print(*shaped_attention(q, q, q).shape)
"""
    assert python("-c", code, cwd=tmp_path, path=[REPO]) == "1 2 5 16"


def test_public_names_equal_all(tmp_path):
    code = """
import types
import shaped_attn
public = {
    name
    for name, value in vars(shaped_attn).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}
print(public ^ (set(shaped_attn.__all__) - {"__version__"}))
from shaped_attn import *
print(all(name in globals() for name in shaped_attn.__all__))
"""
    assert python("-c", code, cwd=tmp_path, path=[REPO]).split("\n") == ["set()", "True"]


SHOW_FILES = """
import sys
import shaped_attn.kernels
import shaped_attn.kernels.configs
print(shaped_attn.__file__)
print(shaped_attn.kernels.__file__)
print(sys.modules["shaped_attn.kernels.configs"].__file__)
print("kernels" in sys.modules)
"""


def files_in(root: Path) -> list[str]:
    """What SHOW_FILES prints for a checkout at `root`."""
    files = ("shaped_attn/__init__.py", "kernels/__init__.py", "kernels/configs.py")
    return [str(root / file) for file in files] + ["False"]


def test_import_in_the_repository_root():
    assert python("-c", SHOW_FILES, cwd=REPO).split("\n") == files_in(REPO)


def test_bare_checkout_uses_its_own_kernels(tmp_path):
    """Not installed, only on the path; an installed version must not lend its kernels to it."""
    checkout = tmp_path / "checkout"
    for folder in ("shaped_attn", "kernels"):
        shutil.copytree(REPO / folder, checkout / folder)
    out = python("-c", SHOW_FILES, cwd=tmp_path, path=[checkout], safe_path=True)
    assert out.split("\n") == files_in(checkout)


def test_root_runs_a_kernels_module_as_a_script():
    """As `python -m shaped_attn.kernels.compile_gate` is."""
    python("-m", "shaped_attn.kernels.configs", cwd=REPO)


def test_installed_package_ignores_a_foreign_kernels(tmp_path, fake_kernels):
    """In site-packages the folder next to ours named `kernels` is somebody else's."""
    package = fake_kernels / "shaped_attn"
    shutil.copytree(REPO / "shaped_attn", package)
    shutil.copytree(REPO / "kernels", package / "kernels")
    code = "import shaped_attn.kernels as k, kernels; print(k.__file__); print(kernels.load())"
    out = python("-c", code, cwd=tmp_path, path=[fake_kernels], safe_path=True)
    assert out.split("\n") == [str(package / "kernels/__init__.py"), "not ours"]


def test_root_hands_over_to_an_installed_kernels(fake_kernels):
    """transformers breaks if the root shadows the package `kernels` that it looks for."""
    code = "import kernels; from kernels import hub, load; print(load(), kernels.__file__)"
    out = python("-c", code, cwd=REPO, path=[fake_kernels])
    assert out == f"not ours {fake_kernels / 'kernels/__init__.py'}"


def test_pytest_in_the_root_hands_over(tmp_path, fake_kernels):
    probe = tmp_path / "test_probe.py"
    probe.write_text("import kernels\n\ndef test_it():\n    assert kernels.load() == 'not ours'\n")
    flags = ["-q", "-p", "no:cacheprovider", "-c", REPO / "pyproject.toml"]
    out = python("-m", "pytest", *flags, probe, cwd=REPO, path=[fake_kernels])
    assert "1 passed" in out


def test_two_checkouts_on_the_path_do_not_chase_each_other(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(REPO / "kernels", other / "kernels")
    (other / "shaped_attn").mkdir()
    code = "import kernels; print(kernels.__file__)"
    out = python("-S", "-c", code, cwd=REPO, path=[other])
    assert out == str(REPO / "kernels/__init__.py")


@pytest.mark.parametrize("elsewhere", ["nothing", "namespace", "broken"])
def test_root_kernels_never_raises(elsewhere, tmp_path):
    """Without a usable package of that name (-S: no site-packages) the import is quiet."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    if elsewhere == "broken":
        (site / "kernels/__init__.py").write_text("raise OSError('no driver')\n")
    path = [] if elsewhere == "nothing" else [site]
    code = "import kernels; print(kernels.__file__, [n for n in vars(kernels) if n[0] != '_'])"
    out = python("-S", "-c", code, cwd=REPO, path=path)
    assert out == f"{REPO / 'kernels/__init__.py'} []"
