"""Weights from and to the original PyTorch code."""
