"""Golden values: weights and images filled by name, and comparison with what the official models compute.

The rules are in goldens/README.md.
"""
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent.parent / 'goldens'


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f'{name}.json').read_text())


def noise(name: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform numbers in [-1, 1), by a hash of name and index."""
    u = np.empty(int(np.prod(shape)))
    for start in range(0, u.size, 2 ** 16):  # parts that stay in the cache
        part = u[start:start + 2 ** 16]
        x = np.arange(start, start + part.size, dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
        for shift, factor in ((0, 0x9E3779B1), (15, 0x85EBCA77), (13, 0xC2B2AE3D)):
            x ^= x >> np.uint32(shift) if shift else np.uint32(0)
            x *= np.uint32(factor)
        x ^= x >> np.uint32(16)
        np.divide(x, 2 ** 31, out=part)
        part -= 1
    return u.reshape(shape)


def image(golden: dict[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(noise(*golden['input'])).to(dtype)


def tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    u = noise(name, shape)
    last = name.rpartition('.')[2]
    if last in ('gamma_1', 'gamma_2'):
        u = 0.1 + 0.02 * u
    elif last == 'weight' and len(shape) == 1:
        u = 1 + 0.1 * u
    elif last == 'weight':
        u = u * np.sqrt(3 / np.prod(shape[1:]))
    else:
        u = 0.05 * u
    return torch.from_numpy(u)


def official_state_dict(golden: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: tensor(name, shape).to(dtype) for name, shape in golden['keys']}


def error(actual: torch.Tensor, expected: dict[str, Any]) -> float:
    """Largest difference of samples, mean and std from a golden summary, in units of the golden std."""
    assert list(actual.shape) == expected['shape']
    actual = actual.detach().double()
    indices = np.floor(np.linspace(0, actual.numel() - 1, 16)).astype(int)
    differences = [
        np.abs(actual.flatten()[indices].numpy() - expected['samples']).max(),
        abs(actual.mean().item() - expected['mean']),
        abs(actual.std(unbiased=False).item() - expected['std']),
    ]
    return max(differences) / expected['std']
