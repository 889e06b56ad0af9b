import importlib.util
import sys
from pathlib import Path


def import_sibling_kernels() -> None:
    """Import `kernels/` of a source checkout as `shaped_attn.kernels`.

    An installed package has its kernels inside, and nothing happens. In a checkout they lie beside
    the package, where `import shaped_attn` from the repository's root, or with the root on
    `PYTHONPATH`, would find no kernels, or those of another installed version.
    """
    package = Path(__file__).parent
    source = package.parent / "kernels" / "__init__.py"
    # In site-packages the `kernels` next to us is somebody else's.
    if (package / "kernels" / "__init__.py").is_file() or not source.is_file():
        return
    name = f"{__package__}.kernels"
    spec = importlib.util.spec_from_file_location(
        name, source, submodule_search_locations=[str(source.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    sys.modules[__package__].kernels = module
