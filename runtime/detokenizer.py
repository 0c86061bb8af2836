"""Exports `Detokenizer` for programs that use text without an engine. Defined in `runtime/text/`."""

from microvllm.runtime.text.detokenizer import Detokenizer

__all__ = ["Detokenizer"]
