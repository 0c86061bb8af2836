"""Renders chat templates in child processes, which are killed at a limit of time or memory.

A comparison of two nested lists or `"a" * 10**9` is one call into C, which nothing inside the process can
interrupt. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.process.children import ChildProcesses, serve
from microvllm.runtime.text.template_sandbox import Sandbox

CHILDREN = 2
DEADLINE_S = 3.0
COMPILE_DEADLINES = 5  # of these a first compilation may take: without it the model has no chat
MAX_CHARS = 8_000_000
MEMORY_BYTES = 512 << 20  # of address space beside the imports, of each child
TOO_DEEP = "The conversation is nested too deeply for a chat template."


class SandboxProcesses(ChildProcesses):
    """Renders chat templates as `Sandbox` does, in child processes; safe to use from threads.

    A call waits for a free child; `render` takes at most `deadline_s` seconds from then on. Raises
    `InvalidRequestError` for what the sandbox refuses and for a template at one of the limits, `EngineError`
    where no child can be started.
    """

    def __init__(
        self,
        *,
        children: int = CHILDREN,
        deadline_s: float = DEADLINE_S,
        memory_bytes: int = MEMORY_BYTES,
        max_chars: int = MAX_CHARS,
    ) -> None:
        limits = {"memory_bytes": memory_bytes, "max_chars": max_chars}
        super().__init__(__name__, "chat template", limits, children)
        self._deadline_s = deadline_s

    def content_format(self, source: str) -> str:
        """Returns the form of contents that a template was written for. Raises as described there."""
        return self._text_of({"source": source}, COMPILE_DEADLINES * self._deadline_s)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Returns the text of a template with these variables. Raises as described there."""
        return self._text_of({"source": source, "variables": variables}, self._deadline_s)

    def _text_of(self, question: Mapping[str, Any], seconds: float) -> str:
        try:
            text: str = self.ask(question, seconds)
        except InvalidRequestError:
            raise
        except RecursionError:
            raise InvalidRequestError(TOO_DEEP) from None
        except (TypeError, ValueError) as error:  # offline, a variable may be any object
            raise InvalidRequestError(f"The chat template cannot take a value: {error}.") from None
        return text


# ---- in the child --------------------------------------------------------------------------------


def main() -> None:
    """Render templates for the parent."""
    serve(_prepare)


def _prepare(limits: Mapping[str, Any]) -> Callable[[dict[str, Any]], str]:
    sandbox = Sandbox(limits["max_chars"])

    def answer(question: dict[str, Any]) -> str:
        if "variables" not in question:
            return sandbox.content_format(question["source"])
        return sandbox.render(question["source"], question["variables"])

    return answer
