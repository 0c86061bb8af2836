"""Exports the chat template for programs that use text without an engine. Defined in `runtime/text/`."""

from microvllm.runtime.text.chat_template import ChatTemplate, normalize_messages

__all__ = ["ChatTemplate", "normalize_messages"]
