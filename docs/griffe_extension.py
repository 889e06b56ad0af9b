"""What griffe, which reads the sources, has to be told of this package."""

import importlib
import inspect
import re
from pathlib import Path

from griffe import ExprCall, Extension

ROOT = Path(__file__).resolve().parents[1]


class ShapedAttn(Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        """Put `kernels/` where it is installed, and a function where it hides its module."""
        if pkg.path == "shaped_attn":
            pkg.set_member("kernels", loader.load(ROOT / "kernels"))
            name = "nn.parameter_groups"
            pkg.set_member(name, pkg[f"{name}.parameter_groups"])

    def on_attribute_instance(self, *, attr, **kwargs):
        """Of a setting of a dataclass show the default alone."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "setting":
            default = attr.value.arguments[0]
            attr.value = None if str(default) == "MISSING" else default

    def on_object(self, *, obj, **kwargs):
        """Leave out what nobody calls; let "Example:" begin a section, as the plural does."""
        if obj.name in ("__post_init__", "extra_repr"):
            obj.parent.del_member(obj.name)
        if obj.is_class and any("documented" in str(d.value) for d in obj.decorators):
            found = getattr(importlib.import_module(obj.module.path), obj.name)
            obj.docstring.value = inspect.getdoc(found)  # which its settings complete
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
