"""Operator norms of convolution kernels."""
