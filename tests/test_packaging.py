import configparser
import email
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from fresh_python import python

REPO = Path(__file__).resolve().parents[1]
VERSION = re.search(
    r'^__version__ = "(.+)"$', (REPO / "shaped_attn/_version.py").read_text(), re.MULTILINE
)[1]


def files_under(folder: Path) -> set[str]:
    """Paths below `folder` that belong into a distribution."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix()
        for path in paths
        if path.suffix not in {".pyc", ".pyo"} and not path.name.startswith(".")
    }


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist.

    Built from a copy: a `build/` folder in the tree keeps modules that were deleted since, and
    setuptools packs them.
    """
    folder = tmp_path_factory.mktemp("packaging")
    junk = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info"
    )
    shutil.copytree(REPO, folder / "tree", ignore=junk)
    python("-m", "build", "--no-isolation", "--outdir", "dist", "tree", cwd=folder, timeout=600)
    return folder / "dist"


@pytest.fixture(scope="session")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="session")
def sdist_files(built) -> set[str]:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.partition("/")[2] for name in members}


def dist_info(wheel, name: str) -> str:
    return wheel.read(f"shaped_attn-{VERSION}.dist-info/{name}").decode()


def test_wheel_holds_exactly_the_tree(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {f"shaped_attn/{path}" for path in files_under(REPO / "shaped_attn")}
    kernels = {f"shaped_attn/kernels/{path}" for path in files_under(REPO / "kernels")}
    assert packed == package | kernels
    assert "shaped_attn/py.typed" in packed


def test_wheel_installs_one_top_level_package(wheel):
    top_level = {name.partition("/")[0] for name in wheel.namelist()}
    assert top_level == {"shaped_attn", f"shaped_attn-{VERSION}.dist-info"}
    assert dist_info(wheel, "top_level.txt").split() == ["shaped_attn"]


@pytest.mark.parametrize("folder", ["shaped_attn", "kernels", "tests"])
def test_sdist_holds_exactly_the_folder(folder, sdist_files):
    packed = {path for path in sdist_files if path.startswith(f"{folder}/")}
    assert packed == {f"{folder}/{path}" for path in files_under(REPO / folder)}


def test_sdist_can_be_tested_and_rebuilt(sdist_files):
    """What the README's commands and `.ci/run` read."""
    assert sdist_files >= {
        ".ci/run",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "constraints.txt",
        "mkdocs.yml",
        "pyproject.toml",
        "setup.py",
    }


def test_metadata(wheel):
    metadata = email.message_from_string(dist_info(wheel, "METADATA"))
    assert metadata["Name"] == "shaped-attn"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = {line.replace('"', "'") for line in metadata.get_all("Requires-Dist")}
    assert {line for line in required if "extra ==" not in line} == {
        "torch>=2.11",
        "numpy",
        "triton>=3.6; platform_system == 'Linux'",
        "click",
        "rich",
        "matplotlib",
        "scipy",
        "jinja2",
    }
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")


def test_version_is_written_once(wheel):
    metadata = email.message_from_string(dist_info(wheel, "METADATA"))
    assert metadata["Version"] == VERSION
    code = [path for folder in ("kernels", "shaped_attn") for path in (REPO / folder).rglob("*.py")]
    code += [REPO / "pyproject.toml", REPO / "setup.py"]
    holders = [path for path in code if f'"{VERSION}"' in path.read_text()]
    assert holders == [REPO / "shaped_attn/_version.py"]


@pytest.fixture
def run_from_wheel(wheel, tmp_path):
    """Run code with the wheel's own files, although an editable install may be there as well."""
    wheel.extractall(tmp_path / "site")

    return lambda code: python("-c", code, cwd=tmp_path, path=[tmp_path / "site"])


def test_wheel_imports(run_from_wheel, tmp_path):
    code = "import shaped_attn, shaped_attn.kernels as k; print(shaped_attn.__file__, k.__file__)"
    package = tmp_path / "site/shaped_attn"
    expected = [str(package / "__init__.py"), str(package / "kernels/__init__.py")]
    assert run_from_wheel(code).split() == expected


def test_console_script_runs(wheel, run_from_wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(dist_info(wheel, "entry_points.txt"))
    assert list(scripts["console_scripts"]) == ["shaped-attn"]
    module, _, function = scripts["console_scripts"]["shaped-attn"].partition(":")
    start = f"from {module} import {function}; {function}()"
    shown = run_from_wheel(f"import sys; sys.argv = ['shaped-attn', '--help']; {start}")
    for command in ("check", "demo", "env"):
        assert command in shown
