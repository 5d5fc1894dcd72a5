"""Which implementation of an operation is used."""
from collections.abc import Mapping

__all__ = ['choose']


def choose(argument: str, name: str, why_not: Mapping[str, str | None]) -> str:
    """Return the name of the implementation to use.

    Args:
        argument: What the choice is called in messages.
        name: A key of `why_not`, or 'auto' for the first that can run.
        why_not: Implementation -> reason why it cannot run here, None if it can; the preferred ones first.

    Raises:
        ValueError: `name` is unknown.
        RuntimeError: The implementation asked for cannot run; the message gives the reason.
    """
    if name == 'auto':
        return next(each for each, reason in why_not.items() if reason is None)
    if name not in why_not:
        raise ValueError(f'{argument} {name!r} is unknown, use one of: auto, {", ".join(why_not)}')
    if reason := why_not[name]:
        raise RuntimeError(f'{argument} {name!r} cannot run: {reason}')
    return name
