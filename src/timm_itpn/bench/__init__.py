"""The benchmark.

What is measured: `cases`, `contestants` (`baseline` among them), `ceiling`, `suites`. How: `timing`, `memory`, `flops`,
all put together in `measure`. What comes out: `rows`, with `machine`, and `chart`.
"""
