"""The machine and the versions of a measurement."""
import datetime
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from .. import __version__

__all__ = ['Machine', 'this_machine']

_CPU_INFO = Path('/proc/cpuinfo')


@dataclass(frozen=True)
class Machine:
    """Machine, versions and date of a row; `gpu` is None where the CPU computes."""
    cpu: str
    gpu: str | None
    cores: int
    threads: int
    python: str
    torch: str
    timm: str
    timm_itpn: str
    date: str

    def __str__(self) -> str:
        where = self.gpu or f'{self.cpu}, threads: {self.threads}, cores: {self.cores}'
        versions = f'Python {self.python}, torch {self.torch}, timm {self.timm}, timm-itpn {self.timm_itpn}'
        return f'{where}; {versions}; {self.date}'


def this_machine(device: str) -> Machine:
    """The machine that this process runs on, and its versions.

    Args:
        device: 'cpu' or 'cuda'.
    """
    import timm
    import torch

    return Machine(
        cpu=_cpu_name(),
        gpu=torch.cuda.get_device_name() if device == 'cuda' else None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_itpn=__version__,
        date=datetime.date.today().isoformat(),
    )


def _cpu_name() -> str:
    """Name of the CPU as the system gives it."""
    lines = _CPU_INFO.read_text(encoding='utf-8', errors='replace').splitlines() if _CPU_INFO.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
