"""Token gathering and token migration: the acceleration of Fast-iTPN, which its authors describe but did not release.

In some blocks of stage 3 attention is in windows, and a gathering token per window tells the others what is in it; in
some blocks the tokens that are most like others leave, to return after the last block. `schedule.py` says which block
does what, `stage.py` runs it. What the paper leaves open was decided by the experiments in `studies/`.
"""
import timm.models  # noqa: F401  first: once it has loaded, our models load, which take their parts from files here
