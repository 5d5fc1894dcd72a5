"""Arguments that several commands have."""
from ..bench.cases import parse_size

PREFIX_HELP = "what the keys of the network start with, such as 'backbone' (to choose from several networks)"

ROLE_HELP = "of a tracker's file: an image and its size, in the order of the position embedding; give it for each"


def sizes_of_roles(roles: list[str]) -> dict[str, tuple[int, int]]:
    """Role -> (height, width) from the values of --role."""
    if wrong := [role for role in roles if not role.partition('=')[2]]:
        raise ValueError(f'--role {wrong[0]} has no size: give it as search=224 or search=224x320')
    return {role.partition('=')[0]: parse_size(role.partition('=')[2]) for role in roles}


def height_width(sides: list[int] | None) -> tuple[int, int] | None:
    """Height and width from the one or two numbers of --img-size, None without it."""
    if sides is None:
        return None
    if len(sides) > 2:
        raise ValueError(f'--img-size takes one or two numbers, not {len(sides)}')
    return sides[0], sides[-1]
