"""Matrices that other software has quantized, one module for each way of storing them."""
