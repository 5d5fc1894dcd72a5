"""Imports point one way: each room of the package may use those before it, never those after."""
import ast
from pathlib import Path

import pytest

import timm_itpn

ROOMS = (
    'ops', 'layers', 'acceleration', 'weights', 'models', 'tracking', 'tools', 'engine', 'pretrain', 'detection',
    'bench', 'studies', 'cli')
ROOT = Path(timm_itpn.__file__).parent


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text())
    if not package:  # the package's own files run while torch is half imported; only `fuse` comes later
        allowed = set()
        tree.body = [node for node in tree.body if getattr(node, 'name', '') != 'fuse']
    else:
        allowed = set(ROOMS[:ROOMS.index(package[0]) + 1])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1]
            full = base + tuple((node.module or '').split('.') if node.module else ())
            targets = {full[0]} if full else {alias.name for alias in node.names} & set(ROOMS)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            targets = {name.split('.')[1] for name in names if name.startswith('timm_itpn.')}
            private = [name for name in names if name.startswith('timm.') and '._' in name]
            assert not private or path.name == '_timm.py', f'{path}: {private} is private to timm'
        else:
            continue
        assert targets & set(ROOMS) <= allowed, f'{path}:{node.lineno} imports {targets}'
