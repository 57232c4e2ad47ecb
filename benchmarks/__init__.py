"""What cosprobe costs, measured against what it replaces or cannot avoid: `make bench`.

Every line of the table is a pair, both sides measured in turns in one process on one machine: read the ratios, not the
seconds. Nothing here is asserted in tests, which only run each script at a tiny size.
"""
