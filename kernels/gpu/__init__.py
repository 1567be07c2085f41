"""Live-range attention in Triton: one kernel per file, and the table of their block sizes.

The kernels also run on CPU tensors, slowly, in Triton's interpreter: set `TRITON_INTERPRET=1` before the import.
"""
