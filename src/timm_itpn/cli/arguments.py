"""Arguments that several commands have."""
__all__ = ['PREFIX_HELP', 'height_width']

PREFIX_HELP = "what the keys of the network start with, such as 'backbone' (to choose from several networks)"


def height_width(sides: list[int] | None) -> tuple[int, int] | None:
    """Height and width from the one or two numbers of --img-size, None without it."""
    if sides is None:
        return None
    if len(sides) > 2:
        raise ValueError(f'--img-size takes one or two numbers, not {len(sides)}')
    return sides[0], sides[-1]
