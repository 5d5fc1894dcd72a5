"""Registers the models of `timm_itpn` with timm, as soon as `timm.models` is loaded and with no import of ours needed.

PyTorch calls `autoload` at the end of `import torch` (entry-point group `torch.backends`), while torch, and perhaps
timm, is half imported. So nothing here imports either of them, nor `timm_itpn`: a finder on `sys.meta_path` waits for
`timm.models`, lets its own loader run, then imports `timm_itpn.models`. Every failure ends as one warning: torch and
timm must import as if this package were not installed.

This is a module beside the package, which even an editable install copies to where its metadata lies (force-include in
pyproject.toml): PyTorch finds it although the folder of the package has been moved or deleted.

Set TIMM_ITPN_AUTOLOAD=0 to register only on `import timm_itpn.models`.
"""
import importlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ['autoload', 'check_timm']

MIN_TIMM = '1.0.31'
MODELS = 'timm_itpn.models'
_warned: list[str] = []


def autoload() -> None:
    """Register now if `timm.models` is loaded, else when it is. Never raises; may be called again."""
    if os.environ.get('TIMM_ITPN_AUTOLOAD', '1') == '0':
        return
    if 'timm.models' in sys.modules:
        _register()
    elif not any(isinstance(finder, _TimmModelsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmModelsFinder())


def _register() -> None:
    if MODELS in sys.modules:  # done, or another thread is at it
        return
    try:
        check_timm(importlib.import_module('timm.version').__version__)
        importlib.import_module(MODELS)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ('timm_itpn', MODELS):
            _warn('its files are gone (a moved or deleted folder?); install it again, or run: pip uninstall timm-itpn')
        elif type(error).__name__ != '_DeadlockError':  # another thread imports them, and waits for this one
            _warn(f'{type(error).__name__}: {error}')


def check_timm(version: str) -> None:
    """Raise ImportError for a version of timm that is too old."""
    if _numbers(version) < _numbers(MIN_TIMM):
        raise ImportError(
            f'timm-itpn needs timm >= {MIN_TIMM}, but {version} is in use; run: pip install --upgrade timm')


def _warn(reason: str) -> None:
    """Say, once, that the models are not registered; never raises, not even where warnings are errors."""
    if _warned:
        return
    _warned.append(reason)
    message = f'timm-itpn: its models are not registered with timm: {reason}'
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:
        try:
            print(message, file=sys.stderr)
        except Exception:  # a closed stderr
            pass


class _TimmModelsFinder(importlib.abc.MetaPathFinder):
    """Finds `timm.models` as the finders behind it do, but with a loader that registers our models afterwards."""

    def __init__(self) -> None:
        self.asking: set[int] = set()  # threads that are in `find_spec`, for finders that ask this one in turn

    def find_spec(
            self,
            fullname: str,
            path: Sequence[str] | None,
            target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        finders, thread = list(sys.meta_path), threading.get_ident()
        if fullname != 'timm.models' or thread in self.asking or self not in finders:
            return None
        self.asking.add(thread)
        try:
            for finder in finders[finders.index(self) + 1:]:  # those in front have been asked
                spec = finder.find_spec(fullname, path, target) if hasattr(finder, 'find_spec') else None
                if spec is not None:
                    if hasattr(spec.loader, 'exec_module'):
                        spec.loader = _ThenRegister(spec.loader, self)
                    return spec
            return None
        finally:
            self.asking.discard(thread)


class _ThenRegister(importlib.abc.Loader):
    """Loads with the real loader, which it puts back in its place; then removes the finder and registers."""

    def __init__(self, loader: Any, finder: _TimmModelsFinder):
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
        # a new list: another thread may be in the middle of the old one, and would miss a finder
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self.finder]
        _register()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', version)[:3]]
