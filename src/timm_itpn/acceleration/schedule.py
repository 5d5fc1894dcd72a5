"""Which blocks of stage 3 gather and migrate, and how much: what users write, made explicit and checked."""
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

Amount = int | float


class Schedule(NamedTuple):
    """What each block of stage 3 does."""
    gather_window: int  # largest side of a window in tokens, 0 for one window that is the whole map
    windowed: tuple[bool, ...]  # for each block: attention is in windows, not among all tokens
    # for each block: how much leaves each window. Below 1 it is a share of the tokens that the smallest window begins
    # with, from 1 on a number of tokens
    migrate: tuple[float, ...]
    carry: bool = True  # tokens that left come back up to date, with what their partners went through


# of the number of blocks: side of the windows, blocks with windows, and block -> share of tokens that leave there
ACCELERATIONS: dict[str, Callable[[int], tuple[int, Collection[int], dict[int, float]]]] = {
    # windows in the first half, as early blocks lose least by them, and three fifths of the tokens stay
    'light': lambda depth: (16, range((depth + 1) // 2), {depth // 8: 0.2, depth // 4: 0.2}),
    # windows in the first two thirds, and two fifths of the tokens stay: attention among all of these costs little
    'full': lambda depth: (16, range((2 * depth + 2) // 3), {depth // 8: 0.2, depth // 4: 0.2, depth // 3: 0.2}),
}


def parse_schedule(
        depth: int,
        acceleration: str | None = None,
        gather_window: int | None = None,
        gather_blocks: Sequence[int] | None = None,
        migrate: Mapping[Any, Amount] | None = None,
        carry: bool | None = None,
) -> Schedule | None:
    """Make a schedule of the arguments of a model. Each of the last four replaces that part of `acceleration`.

    Args:
        depth: Blocks of stage 3.
        acceleration: Key of `ACCELERATIONS`; None for none.
        gather_window: Largest side of a window in tokens; 0 for one window that is the whole map.
        gather_blocks: Blocks with attention in windows, counted from 0, or from the end if negative; None for all,
            where there are windows.
        migrate: Block -> how many tokens leave each window there: a number (int), or a share, above 0 and below 1, of
            those that the smallest window begins with. Keys may be strings, as JSON has them.
        carry: Tokens that left come back up to date: what their partners went through is added; False = as they were.

    Returns:
        The schedule; None if nothing is to be done.

    Raises:
        ValueError: An argument is not usable; the message says which and why.
    """
    if acceleration is not None and acceleration not in ACCELERATIONS:
        raise ValueError(f'acceleration {acceleration!r} is unknown, use one of {tuple(ACCELERATIONS)} or None')
    if gather_blocks is not None and not (gather_window or acceleration):
        raise ValueError('gather_blocks needs gather_window, the side of the windows in tokens')
    window, windowed, amounts = ACCELERATIONS[acceleration](depth) if acceleration else (0, range(depth), {})
    if gather_window is not None:
        if type(gather_window) is not int or gather_window < 0:
            raise ValueError(f'gather_window {gather_window!r} is not usable: give the side of a window in tokens')
        window = gather_window
    if gather_blocks is not None:
        if not isinstance(gather_blocks, Sequence) or isinstance(gather_blocks, str):
            raise ValueError(f'gather_blocks {gather_blocks!r} is not usable: give a list of blocks, such as [0, 1, 2]')
        windowed = {_block(block, depth, 'gather_blocks') for block in gather_blocks}
    if migrate is not None:
        amounts = _amounts(migrate, depth)
    if carry not in (None, True, False):
        raise ValueError(f'carry {carry!r} is not usable: give True or False')
    if not (window and windowed) and not any(amounts.values()):
        return None
    return Schedule(
        window,
        windowed=tuple(i in windowed for i in range(depth)),
        migrate=tuple(amounts.get(i, 0.) for i in range(depth)),
        carry=carry is None or bool(carry),
    )


def _block(index: int | str, depth: int, name: str) -> int:
    """Index of a block, 0 to depth - 1."""
    try:
        number = int(index)
    except (TypeError, ValueError):
        number = depth
    if not -depth <= number < depth:
        raise ValueError(f'{name} names block {index!r}, but stage 3 has the blocks 0 to {depth - 1}')
    return number % depth


def _amounts(migrate: Mapping[Any, Amount], depth: int) -> dict[int, float]:
    """Block -> how much leaves there."""
    if not isinstance(migrate, Mapping):
        raise ValueError(f'migrate {migrate!r} is not usable: give block -> number or share, such as {{3: 0.25}}')
    amounts: dict[int, float] = {}
    for key, amount in migrate.items():
        block = _block(key, depth, 'migrate')
        if block in amounts:
            raise ValueError(f'migrate names block {block} twice')
        usable = type(amount) is int and amount >= 0 or isinstance(amount, float) and 0 <= amount < 1
        if not usable:
            raise ValueError(
                f'migrate asks for {amount!r} at block {block}: give a number (int) or a share below 1 (float)')
        amounts[block] = float(amount)
    return amounts


def num_leaving(migrate: list[float], smallest: int) -> list[int]:
    """How many tokens leave each window at each block.

    Args:
        migrate: As in `Schedule`.
        smallest: Tokens that the smallest window begins with.

    Raises:
        ValueError: More than half of the tokens that are there would leave at once.
    """
    numbers: list[int] = []
    remaining = smallest
    for block, amount in enumerate(migrate):
        number = int(amount) if amount >= 1 else int(amount * smallest)
        if number > remaining // 2:
            raise ValueError(
                f'migrate lets {number} tokens leave at block {block}, but of the {smallest} in a window {remaining} '
                f'are left there, and at most half of them can leave: ask for fewer, or for larger windows')
        numbers.append(number)
        remaining = remaining - number  # not -=: while a model is traced this is a tensor
    return numbers
