"""Kernels for x86-64 CPUs: plain TIR loops, vectorised over lanes, parallel over independent outputs."""
