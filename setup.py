"""The list of packages, which pyproject.toml cannot compute; everything else is there.

The folder `kernels/` is installed as `shaped_attn.kernels`, and automatic discovery cannot follow
such a mapping.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["shaped_attn", "shaped_attn.*"]) + ["shaped_attn.kernels"]
packages += [f"shaped_attn.kernels.{name}" for name in find_packages("kernels")]

setup(packages=packages, package_dir={"shaped_attn.kernels": "kernels"})
