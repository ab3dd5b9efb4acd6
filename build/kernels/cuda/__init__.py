"""Kernels for NVIDIA GPUs: plain TIR with bound thread loops, written in phases."""
