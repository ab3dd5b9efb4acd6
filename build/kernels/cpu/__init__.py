"""Kernels for x86-64 CPUs: plain TIR loops, vectorised over LANES, parallel over independent outputs."""
