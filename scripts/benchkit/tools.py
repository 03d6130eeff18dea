"""The measuring programs beside this package, as modules: scripts/bench-snapshot and scripts/bench-tracker."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

from labkit.hosts import CHECKOUT


def load(name: str) -> Any:
    """The program of that name, loaded and not run."""
    module_name = name.replace("-", "_")
    spec = spec_from_loader(module_name, SourceFileLoader(module_name, str(CHECKOUT / "scripts" / name)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
