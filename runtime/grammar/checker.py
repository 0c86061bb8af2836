"""Checks forms before their requests are queued, and keeps the grammars of those that passed.

Imports no torch.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict

import msgspec

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar.translate import Specials
from microvllm.runtime.process.children import ChildProcesses
from microvllm.runtime.request import StructuredOutput
from microvllm.runtime.text.tokenizer import Tokenizer

CHILDREN = 2
DEADLINE_S = 2.0  # usual schemas take milliseconds, one of 2,000 optional properties takes half a second
MEMORY_BYTES = 1 << 30  # of address space beside the imports, of each child
MAX_CHARS = 1 << 19
CACHED_CHARS = 1 << 24  # of forms and grammars together
CACHED_FORMS = 256


class GrammarChecker:
    """Compiles forms in child processes, which are killed at a deadline; safe to use from threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, has_end: bool) -> None:
        self._tokenizer, self._vocab_size, self._has_end = tokenizer, vocab_size, has_end
        self._children = ChildProcesses(
            "microvllm.runtime.grammar.translate", "grammar", {"memory_bytes": MEMORY_BYTES}, CHILDREN
        )
        self._lock = threading.Lock()
        self._checked: OrderedDict[bytes, tuple[str, str]] = OrderedDict()  # grammar or problem
        self._chars = 0

    def check(self, form: StructuredOutput) -> str:
        """Return the form as a grammar for the engine.

        Raises `InvalidRequestError` naming the form's `field`, with the reason and the place in the form.
        """
        size = len(form.spec) + len(form.whitespace or "")
        if self._tokenizer.token_bytes is None:
            problem = "structured output is not available with this model's tokenizer"
            raise InvalidRequestError(f"{form.field}: {problem}.", form.field)
        if not self._has_end:
            problem = "structured output needs a model with an end token"
            raise InvalidRequestError(f"{form.field}: {problem}.", form.field)
        if size > MAX_CHARS:
            raise InvalidRequestError(
                f"{form.field} has {size} characters, the limit is {MAX_CHARS}.", form.field
            )
        if any(token >= self._vocab_size for token in (*form.after, *form.opens, *form.head)):
            raise InvalidRequestError(f"{form.field}: a token id is out of vocabulary.", form.field)
        question = msgspec.structs.replace(form, after=[], opens=[], head=[], field="")
        key = msgspec.msgpack.encode(question)
        with self._lock:
            known = self._checked.get(key)
            if known is not None:
                self._checked.move_to_end(key)
        if known is None:
            known = self._ask(question)
            self._keep(key, known)
        grammar, problem = known
        if problem:
            raise InvalidRequestError(f"{form.field}: {problem}", form.field)
        return grammar

    @functools.cached_property
    def _specials(self) -> Specials:
        names = {index: self._tokenizer.id_to_token(index) for index in self._tokenizer.special_ids}
        ids = {text: index for index, text in names.items() if text and index < self._vocab_size}
        return Specials(self._vocab_size, ids)

    def _ask(self, form: StructuredOutput) -> tuple[str, str]:
        question = {"form": msgspec.to_builtins(form), "specials": msgspec.to_builtins(self._specials)}
        try:
            return self._children.ask(question, DEADLINE_S), ""
        except InvalidRequestError as error:
            return "", error.message

    def _keep(self, key: bytes, result: tuple[str, str]) -> None:
        with self._lock:
            if key not in self._checked:
                self._chars += len(key) + len(result[0])
            self._checked[key] = result
            while self._chars > CACHED_CHARS or len(self._checked) > CACHED_FORMS:
                old, (grammar, _) = self._checked.popitem(last=False)
                self._chars -= len(old) + len(grammar)
