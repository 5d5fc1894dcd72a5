"""The models; importing this package registers them with timm."""
import timm
from timm.models import is_model_in_modules

from timm_itpn_autoload import check_timm

check_timm(timm.__version__)

from .itpn import ITPN  # noqa: E402  an older timm has not all that it imports

__all__ = ['ITPN', 'MODULES', 'check_name']

MODULES = ('itpn',)  # timm.list_models(module=MODULES)


def check_name(name: str) -> None:
    """Raise ValueError for a name, `arch` or `arch.tag`, that is not of a model of this package."""
    known = timm.list_models(module=MODULES, include_tags='.' in name)
    alias = '.' not in name and is_model_in_modules(name, MODULES)  # the authors' names are not listed
    if name not in known and not alias:
        raise ValueError(f'there is no model {name!r}; there are: {", ".join(known)}')
