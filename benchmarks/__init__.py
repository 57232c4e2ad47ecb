"""Benchmarks: run time of parts of cosprobe, compared with alternatives or with unavoidable work. `make bench`.

Every row of the table is a pair, measured alternately on one machine. The ratios are meaningful, the seconds depend on
the machine. Tests run each benchmark at a tiny size and assert no run times.
"""
