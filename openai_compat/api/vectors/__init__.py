"""Vectors of texts, and scores of them."""
