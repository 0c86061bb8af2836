"""Counts what an engine does, and describes it as metrics under vLLM's names. Imports no torch."""
