"""Exports `ChatTemplate` and `normalize_messages` for programs that use text without an engine. Defined in `runtime/text/`."""

from microvllm.runtime.text.chat_template import ChatTemplate, normalize_messages

__all__ = ["ChatTemplate", "normalize_messages"]
