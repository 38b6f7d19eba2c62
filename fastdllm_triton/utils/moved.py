"""Modules under the names that they had: importing one warns, and gives the module that it is now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.partition(".")[0]

#: Documented names of before, and where the modules are now.
MOVED = {
    "environment": "utils.environment",
    "evaluation.harness": "evaluation.lm_eval",
    "roofline": "tools.roofline",
    "swap": "integrations.transformers",
    "swap.accelerate": "integrations.transformers.accelerate",
}


class _Alias(MetaPathFinder, Loader):
    """Finds the modules of :data:`MOVED`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self, is_package=True) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        target = f"{_PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {target} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(target)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # The import system has put the alias's there.


def install() -> None:
    """Makes the names of :data:`MOVED` importable."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.append(_Alias())
