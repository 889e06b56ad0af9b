"""The reference has every public name, and docstrings describe the arguments that there are."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from fresh_python import python

REPO = Path(__file__).resolve().parents[1]
MODULES = (
    "shaped_attn",
    "shaped_attn.integrations.torch",
    "shaped_attn.integrations.transformers",
    "shaped_attn.kernels.families",
    "shaped_attn.nn",
    "shaped_attn.nn.activations",
    "shaped_attn.plots",
    "shaped_attn.sde",
    "shaped_attn.testing",
)
NEEDS = {
    "shaped_attn.integrations.transformers": "transformers",
    "shaped_attn.kernels.families": "triton",
}


def public_members(module: str) -> dict[str, object]:
    """The names of `__all__`; without one, what the module defines and does not hide."""
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    imported = importlib.import_module(module)
    names = getattr(imported, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(imported).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module
        ]
    return {name: getattr(imported, name) for name in names if name != "__version__"}


def directives() -> dict[str, str]:
    """What the pages of the reference name after `:::`, and its options."""
    pages = "\n".join(page.read_text() for page in sorted((REPO / "docs/api").glob("*.md")))
    return dict(re.findall(r"^::: (\S+)((?:\n    .*)*)", pages, re.MULTILINE))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    shown = directives()
    if " members:" in shown[module]:
        assert {f"{module}.{name}" for name in public_members(module)} <= set(shown)


def described(docstring: str) -> set[str]:
    """Names that the sections of arguments and attributes describe; `a, b: ...` describes two."""
    names = set()
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", docstring, re.M):
        for entry in re.findall(r"^    (\S[^:\n]*):", section, re.M):
            names |= {name.strip(" *") for name in entry.split(",")}
    return names


def arguments(member: object) -> set[str]:
    return set(inspect.signature(member).parameters) - {"self", "args"}


def callables(module: str) -> dict[str, object]:
    found = {}
    for name, member in public_members(module).items():
        if inspect.isfunction(member) or inspect.isclass(member):
            found[name] = member
        if inspect.isclass(member):
            methods = inspect.getmembers(member, inspect.isfunction)
            own = {
                method
                for base in member.__mro__[:-1]
                for method in vars(base)
                if base.__module__.startswith("shaped_attn")
            }
            found |= {
                f"{name}.{key}": value
                for key, value in methods
                if key in own and not key.startswith("_")
            }
    return found


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_describe_the_arguments_that_there_are(module):
    wrong = {}
    for name, member in callables(module).items():
        docstring = inspect.getdoc(member)
        names = described(docstring)
        if not names:
            continue
        known = arguments(member)
        unknown = names - known if inspect.isfunction(member) else set()
        # A class of fields may refer to its base for the rest.
        missing = set() if "The other arguments are those of" in docstring else known - names
        if unknown or missing:
            wrong[name] = {"unknown": unknown, "missing": missing}
    assert wrong == {}


@pytest.mark.slow
def test_the_site_has_every_public_name(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, cwd=REPO)
    pages = "\n".join(page.read_text() for page in tmp_path.glob("api/*/index.html"))
    ids = set(re.findall(r'id="(shaped_attn[\w.]*)"', pages))
    expected = {f"{module}.{name}" for module in MODULES for name in public_members(module)}
    assert expected - ids == set()
    # Sections that a docstring's markup hides, and tables or literal blocks of another markup.
    assert re.findall(r"(?:Args|Raises|Returns|Example):</p>|::</p>|====", pages) == []
