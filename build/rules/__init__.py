"""Rules that find the regions of the imported graph that our kernels compute.

Each returns a `Region`, or raises `NoMatch` for "not mine". A rule checks everything that the kernel takes for
granted: slice bounds, axes, constants, and, for attention, that the mask is the banded causal mask of exactly this
cache's length and that the graph's new cache is the old one rolled by T. A graph that has lost its window matches no
rule.
"""
