"""What only a machine with CUDA can show: `make gpu-check`. It first runs the tests marked `gpu`.

Every part is a function of a device that returns rows of a table. Tests run each of them on a CPU, at a tiny size.
"""
