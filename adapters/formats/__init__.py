"""Formats of weights: how each is stored, loaded and kept in memory, packed or dequantised."""
