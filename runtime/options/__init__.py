"""Reads and checks what the engine's options name, for `runtime/config.py`. Imports no torch."""
