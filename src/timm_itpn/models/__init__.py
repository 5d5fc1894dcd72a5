"""Model families; importing this package registers them with timm."""
from .fast_itpn import FastITPN as FastITPN
from .itpn import ITPN as ITPN
