"""Work in processes of their own."""
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

__all__ = ['in_processes']

Item = TypeVar('Item')
Result = TypeVar('Result')


def in_processes(
        function: Callable[[Item], Result], items: Iterable[Item], processes: int, threads: int) -> Iterator[Result]:
    """Call a function of a module for each item, as `map` does.

    Args:
        function: What is called.
        items: Its arguments.
        processes: That run at a time.
        threads: Of PyTorch, in each.
    """
    with ProcessPoolExecutor(processes, get_context('spawn'), torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(function, items)
