"""Reads the files of a model: config.json, safetensors, GGUF. Only `checkpoints` imports torch."""
