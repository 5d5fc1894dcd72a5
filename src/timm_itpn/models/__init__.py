"""The models; importing this package registers them with timm."""
from .itpn import ITPN as ITPN
