"""The operators, installed as ``mmfuse.kernels``."""

if __name__ == "kernels":
    # The checkout's root is on sys.path (`python -m`, `python -c`), so this folder shadows Hugging Face's `kernels`
    # distribution, which transformers imports: step aside for the real one where there is one.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        _module = module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
else:
    from importlib import import_module
    from pkgutil import iter_modules

    from mmfuse.kernels import codebook, contrastive, multiway, patch, qformer
    from mmfuse.kernels.codebook import *  # noqa: F403
    from mmfuse.kernels.contrastive import *  # noqa: F403
    from mmfuse.kernels.multiway import *  # noqa: F403
    from mmfuse.kernels.patch import *  # noqa: F403
    from mmfuse.kernels.qformer import *  # noqa: F403

    # what `mmfuse` has too; the other families' operators stay in their namespaces, such as `mmfuse.kernels.points`
    __all__: list[str] = []
    __all__ += codebook.__all__
    __all__ += contrastive.__all__
    __all__ += multiway.__all__
    __all__ += patch.__all__
    __all__ += qformer.__all__

    for _family in iter_modules(__path__):  # noqa: F405
        if not _family.name.startswith("_"):
            import_module(f"mmfuse.kernels.{_family.name}")
