"""Token gathering and token migration: the acceleration of Fast-iTPN, which its authors describe but did not release.

`schedule.py` says which block of stage 3 does what, `stage.py` runs it, and README.md tells what it is.
"""
import timm.models  # noqa: F401  first: once it has loaded, our models load, which take their parts from files here
