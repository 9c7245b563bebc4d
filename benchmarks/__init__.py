"""Benchmarks: one script per question, the baseline measured beside ours in the same run.

python -m benchmarks.attention      one layer's attention in the published settings, and how it scales
python -m benchmarks.model          one denoising and one training step of a whole model
python -m benchmarks.codec          what the codec loses on videos
python -m benchmarks.tpu_schedule   what the TPU compiler expects of attention kernels; needs libtpu, not a TPU
python -m benchmarks.tpu_memory     what attention needs in a TPU's memory; needs libtpu, not a TPU
python -m benchmarks.report         tables and plot of the results, which lie in benchmarks/results as JSON
"""

import os

# Before jax starts: large programs need more of the device than the three quarters that it takes by default. What is
# left serves libraries that allocate by themselves.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
