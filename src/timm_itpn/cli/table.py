"""Tables for the terminal, and text from files that may hold anything."""
from collections.abc import Iterable, Sequence

__all__ = ['printable', 'two_columns']


def printable(text: str, most: int = 1000) -> str:
    """Text with escapes in place of what a terminal would obey, such as control characters, and cut if it is long."""
    cut = text if len(text) <= most else f'{text[:most]}...'
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode('ascii') for char in cut)


def two_columns(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Names, each with the lines that belong to it; those without lines are left out."""
    shown = [(name, lines) for name, lines in rows if lines]
    width = max(len(name) for name, _ in shown)
    return '\n'.join(
        f'{"" if i else name:<{width}}  {line}' for name, lines in shown for i, line in enumerate(lines))
