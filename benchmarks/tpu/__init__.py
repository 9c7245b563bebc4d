"""What the TPU compiler makes of a kernel, read from its own listings on a machine without a TPU.

kernels.py   which kernels, at which block sizes
compiler.py  compiles one of them for a chip, in a process of its own (worker.py)
listing.py   reads the schedule out of the compiler's listings
"""
