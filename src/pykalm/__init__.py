"""kalm aligns an autoregressive language model with a knowledge graph, measures it, and asks it.

Nothing is loaded at import: each name below is fetched from its module when it is first used, so that the
command line can print its help without loading PyTorch. No other place of the package imports lazily.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykalm.api import (
        check_data,
        evaluate_links,
        fetch_data,
        list_data,
        load_graph,
        load_run,
        predict,
        run_demo,
        train,
    )
    from pykalm.config import Config, load_config
    from pykalm.errors import KalmError

__version__ = "0.1.0"

HOMES = {
    "pykalm.api": (
        "check_data",
        "evaluate_links",
        "fetch_data",
        "list_data",
        "load_graph",
        "load_run",
        "predict",
        "run_demo",
        "train",
    ),
    "pykalm.config": ("Config", "load_config"),
    "pykalm.errors": ("KalmError",),
}

__all__ = [
    "Config",
    "KalmError",
    "__version__",
    "check_data",
    "evaluate_links",
    "fetch_data",
    "list_data",
    "load_config",
    "load_graph",
    "load_run",
    "predict",
    "run_demo",
    "train",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module (PEP 562); raises AttributeError for any other name."""
    for home, names in HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'pykalm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    """List the public names, fetched or not."""
    return sorted({*globals(), *__all__})
