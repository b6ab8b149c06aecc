"""Run every seeded break of the laws: each must turn its test red. `python -m tests.laws.breaks`."""

import importlib
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from _pytest.outcomes import Failed

import tests.laws


def law_modules() -> Iterator[ModuleType]:
    """Yield the modules test_law_*, in order."""
    for module in sorted(pkgutil.iter_modules(tests.laws.__path__), key=lambda entry: entry.name):
        if module.name.startswith("test_law_"):
            yield importlib.import_module(f"tests.laws.{module.name}")


def turns_red(module: ModuleType, name: str) -> bool:
    """Return whether the test that guards against a break fails under it; without the break it must pass."""
    check = getattr(module, module.CHECKS[name])
    with module.BREAKS[name]():
        try:
            check()
        except (AssertionError, Failed) as error:
            # Any other error means that the break itself is broken, and is shown; so is a check of the product's own,
            # which the law has not seen.
            if not raised_by_a_law(error):
                raise
            return True
    return False


def raised_by_a_law(error: BaseException) -> bool:
    """Return whether the assertion that failed stands in tests/laws (or is pytest's: an error that did not come)."""
    if isinstance(error, Failed):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).parent == Path(__file__).parent


def main() -> int:
    """Print a line for each break; return 0 only if every one turned its test red, and every test is green without."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny models gain nothing from more, and wait for each other on a busy machine
    failed, count = 0, 0
    for module in law_modules():
        for test in sorted(set(module.CHECKS.values())):
            getattr(module, test)()
        for name in module.BREAKS:
            red = turns_red(module, name)
            count, failed = count + 1, failed + (not red)
            law = module.__name__.rsplit(".", 1)[-1].removeprefix("test_law_")
            print(f"{'red ' if red else 'GREEN, the law does not see it'}  {law:14} {name}", flush=True)
    print(f"{count - failed} of {count} seeded breaks turned their law red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
