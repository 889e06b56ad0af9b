"""Triton kernels and their host launchers, imported as `shaped_attn.kernels`.

Nothing of autograd or torch.library is here, and every import inside this folder is relative.
`README.md` has the derivations and the naming grammar.
"""


def __getattr__(name: str):
    if name == "use_family":
        from .families import use_family

        return use_family
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "kernels":
    # Python was started in the repository's root, and `import kernels` found this folder before the
    # package of that name on PyPI, which transformers looks for: hand over to it. Without it this
    # folder has to import quietly, since transformers tests for the package by importing it.

    def _hand_over() -> None:
        import os
        import sys
        from importlib.machinery import PathFinder
        from importlib.util import module_from_spec

        def is_checkout(entry: str) -> bool:  # ours: shaped_attn/ without kernels/ inside
            package = os.path.join(entry, "shaped_attn")
            inside = os.path.join(package, "kernels", "__init__.py")
            return os.path.isdir(package) and not os.path.isfile(inside)

        this = sys.modules[__name__]
        try:
            spec = PathFinder.find_spec(__name__, [p for p in sys.path if not is_checkout(p)])
            if spec is not None and spec.has_location:  # a namespace package has none
                sys.modules[__name__] = module_from_spec(spec)
                spec.loader.exec_module(sys.modules[__name__])
        except Exception:  # a broken package elsewhere must not break whoever only probes for it
            sys.modules[__name__] = this

    _hand_over()
