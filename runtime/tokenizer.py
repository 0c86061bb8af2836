"""Exports `Tokenizer` for programs that use text without an engine. Defined in `runtime/text/`."""

from microvllm.runtime.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
