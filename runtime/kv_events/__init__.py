"""Publishes what the prefix cache stores and evicts, in the form of vLLM 0.33's KV events."""
