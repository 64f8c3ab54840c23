"""Bytes to tensors and back, one module for each protocol spoken on HTTP."""
