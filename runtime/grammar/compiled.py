"""Compiles grammars in worker threads and keeps them: requests get copies of a matcher at the start.

llguidance and the tokenizer are loaded with the first grammar.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.grammar.translate import parser_limits
from microvllm.runtime.machine import usable_cores

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 64
LEXERS = 16  # of a grammar at most, one for a core; each of them finds the states of its lexer anew
LEXERS_S = 0.1  # processor time in which all of them are compiled


def num_lexers() -> int:
    """The lexers of a grammar that compiles fast."""
    return min(LEXERS, usable_cores())


class Start:
    """The start of a grammar, of which the matchers of requests are copies.

    Copies of one matcher share the states of its lexer, and a lock with them: what advances at the same time
    should be of several. Raises `ValueError` for a grammar that cannot be compiled.
    """

    def __init__(self, make: Callable[[], LLMatcher]) -> None:
        start = time.thread_time()
        first = make()
        seconds = time.thread_time() - start
        self._make = make
        self._most = num_lexers()
        number = min(self._most, max(1, int(LEXERS_S / seconds))) if seconds else self._most
        self._matchers: list[LLMatcher | None] = [first, *[None] * (number - 1)]
        self._making = [threading.Lock() for _ in self._matchers]

    def copy(self, place: int) -> LLMatcher:
        """place: any number; those of which it is the same modulo `num_lexers()` may wait for each other."""
        lexer = place % self._most * len(self._matchers) // self._most
        with self._making[lexer]:  # others compile theirs meanwhile
            matcher = self._matchers[lexer] = self._matchers[lexer] or self._make()
        return matcher.deep_copy()


class CompiledGrammars:
    """The newest `MAX_COMPILED` grammars of an engine; `pool` compiles them."""

    def __init__(self, config: EngineConfig, pool: ThreadPoolExecutor) -> None:
        self._config = config
        self._pool = pool
        self._starts: OrderedDict[str, Future[Start]] = OrderedDict()
        self._loading = threading.Lock()

    def __len__(self) -> int:
        return len(self._starts)

    def compile(self, grammar: str) -> Future[Start]:
        """Start to compile a grammar, unless it is there; in the engine's thread."""
        future = self._starts.get(grammar)
        if future is None or (future.done() and future.exception() is not None):
            make = functools.partial(self._make, grammar)
            future = self._starts[grammar] = self._pool.submit(Start, make)
            while len(self._starts) > MAX_COMPILED:
                self._starts.popitem(last=False)
        self._starts.move_to_end(grammar)
        return future

    def drop(self, grammar: str) -> None:
        """Have a grammar compiled anew: its lexer has found all the states that it may, for all requests."""
        self._starts.pop(grammar, None)

    def copy(self, grammar: str, row: int) -> LLMatcher:
        """A matcher at the start of a grammar; in a worker thread."""
        future = self._starts.get(grammar)
        # One that was dropped is compiled here: to wait for another thread could be to wait for ever.
        return future.result().copy(row) if future is not None and future.done() else self._make(grammar)

    def _make(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer(), grammar, limits=parser_limits(), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().partition("\n")[0])
        return matcher

    def _tokenizer(self) -> LLTokenizer:
        with self._loading:
            return self._loaded

    @functools.cached_property
    def _loaded(self) -> LLTokenizer:
        from microvllm.runtime.grammar.vocabulary import model_tokenizer
        from microvllm.runtime.text.end_tokens import end_tokens
        from microvllm.runtime.text.tokenizer import Tokenizer

        vocab_size = self._config.spec.vocab_size
        tokenizer = Tokenizer.load(Path(self._config.tokenizer_path))
        end, others = end_tokens(self._config, tokenizer)
        if end is None:
            raise ValueError("the model has no end token")
        ends = [end, *(token for token in others if token < vocab_size)]
        return model_tokenizer(tokenizer, vocab_size, ends)
