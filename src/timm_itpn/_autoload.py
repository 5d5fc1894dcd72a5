"""Registration with timm at the right moment: at once if `timm.models` is loaded, else right after it loads.

PyTorch runs this while torch, and perhaps timm, is half imported. So nothing here imports either of them; a finder on
`sys.meta_path` waits for `timm.models`, lets its own loader run, then imports our models. Every failure ends as one
warning: torch and timm must import as if this package were not installed.
"""
import importlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import warn

MIN_TIMM = '1.0.31'
MODELS = f'{__package__}.models'


def install() -> None:
    """Register now or when `timm.models` is imported. Does nothing when called again, or if TIMM_ITPN_AUTOLOAD=0."""
    if os.environ.get('TIMM_ITPN_AUTOLOAD', '1') == '0':
        return
    if 'timm.models' in sys.modules:
        register()
    elif not any(isinstance(finder, TimmModelsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TimmModelsFinder())


def register() -> None:
    """Import our models, which registers them. Never raises; a failure is one warning."""
    if MODELS in sys.modules:  # done, or another thread is at it
        return
    try:
        version = importlib.import_module('timm.version').__version__
        if _numbers(version) < _numbers(MIN_TIMM):
            warn(f'it needs timm >= {MIN_TIMM}, but {version} is in use; run: pip install --upgrade timm')
        else:
            importlib.import_module(MODELS)
    except Exception as error:
        if type(error).__name__ != '_DeadlockError':  # that is another thread importing them, which waits for this one
            warn(f'{type(error).__name__}: {error}')


class TimmModelsFinder(importlib.abc.MetaPathFinder):
    """Finds `timm.models` as the finders behind it do, but with a loader that registers our models afterwards."""

    def find_spec(
            self,
            fullname: str,
            path: Sequence[str] | None,
            target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != 'timm.models':
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, 'find_spec'):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = ThenRegister(spec.loader, self)
                return spec
        return None


class ThenRegister(importlib.abc.Loader):
    """Loads with the real loader, which it puts back in its place; then removes the finder and registers."""

    def __init__(self, loader: Any, finder: TimmModelsFinder):
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for those who look before they load
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', version)[:3]]
