"""What griffe, which reads the sources, has to be told of this package."""

import re
from pathlib import Path

from griffe import Extension

ROOT = Path(__file__).resolve().parents[1]


class ShapedAttn(Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        """Put `kernels/` where it is installed, and a function where it hides its module."""
        if pkg.path == "shaped_attn":
            pkg.set_member("kernels", loader.load(ROOT / "kernels"))
            name = "nn.parameter_groups"
            pkg.set_member(name, pkg[f"{name}.parameter_groups"])

    def on_object(self, *, obj, **kwargs):
        """Leave out what nobody calls; let "Example:" begin a section, as the plural does."""
        if obj.name in ("__post_init__", "extra_repr"):
            obj.parent.del_member(obj.name)
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
