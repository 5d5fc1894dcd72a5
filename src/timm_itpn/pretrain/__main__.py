"""`python -m timm_itpn.pretrain`, for `torchrun -m timm_itpn.pretrain`: the command `timm-itpn pretrain`."""
import json
import sys

from .arguments import ConfigurableParser, add_arguments
from .loop import pretrain

if __name__ == '__main__':
    parser = ConfigurableParser(prog='python -m timm_itpn.pretrain', description='Integral pre-training.')
    add_arguments(parser)
    try:
        result = pretrain(parser.parse_args())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'timm_itpn.pretrain: {error}')
    if result:
        print(json.dumps(result))
