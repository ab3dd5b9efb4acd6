"""Kernels of a CUDA library against references and this GPU's limits; shipped by `build.gpucheck` alone."""
