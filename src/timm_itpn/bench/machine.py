"""What was measured on, and with what versions."""
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__

__all__ = ['cpu_name', 'facts']

CPU_INFO = Path('/proc/cpuinfo')


def facts(device: str) -> dict[str, Any]:
    """Machine, versions and date for a row.

    Args:
        device: 'cpu' or 'cuda'; the name of what computes is `machine`.
    """
    gpu = torch.cuda.get_device_name() if device == 'cuda' else None
    return {
        'machine': gpu or cpu_name(),
        'cpu': cpu_name(),
        'gpu': gpu,
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_itpn': __version__,
        'date': datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """Name of the CPU as the system gives it."""
    lines = CPU_INFO.read_text(encoding='utf-8', errors='replace').splitlines() if CPU_INFO.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
