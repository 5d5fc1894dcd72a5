"""The benchmark: models timed in turn, beside others and against what the machine can do.

What is measured: `cases`, `candidates` (`baseline` among them), `ceiling`, `suites`. How: `timing`, `memory`, `flops`,
put together in `measure`. What comes out: `rows`, with `machine`, and `chart`.
"""
