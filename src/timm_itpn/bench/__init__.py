"""The benchmark: models timed in turn, beside others and against what the machine can do.

What is measured: `cases`, of which the files in `suites/` are lists; `candidates`, `baseline` among them; `flops`, with
the ceiling. How: `measure`. What comes out: `rows`.
"""
