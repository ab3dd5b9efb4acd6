"""Kernels of a CUDA library against references and this GPU's limits; shipped only by `build.gpucheck`."""
