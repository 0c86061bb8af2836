"""Finds the log probabilities of the answer among those of an output that is parsed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from microvllm.openai_compat.api.logprobs import ChatLogprobs
from microvllm.openai_compat.parsers.events import Content, Event, Reasoning
from microvllm.runtime.text.detokenizer import TextDelta


class OutputLogprobs:
    """Writes the entries of an output's tokens, and says which of them a text of the answer was made of.

    A parser's events have the text and not its place. It is looked for among the bytes of the tokens: from
    their end on, as tags, reasoning and calls stand in front of it, and in front of what is not decided yet.
    `unseen` are tokens that are no part of an output's text; with `ends_unseen` one that ends it is none.
    """

    def __init__(self, entries: ChatLogprobs, unseen: Collection[int], ends_unseen: bool) -> None:
        self._chat = entries
        self._unseen = unseen
        self._ends_unseen = ends_unseen
        self._entries: list[tuple[Any, bytes]] = []
        self._ahead = 0  # bytes of tokens whose text has not come, as it may begin a stop string

    def add(self, piece: TextDelta) -> None:
        """Read the next tokens and their text."""
        entries = self._chat.format_tokens(piece.token_ids, piece.logprobs or [])["content"]
        texts = [
            b"" if token in self._unseen else bytes(entry["bytes"])
            for token, entry in zip(piece.token_ids, entries, strict=True)
        ]
        by_token = piece.finish_reason == "stop" and not isinstance(piece.stop_reason, str)
        if texts and by_token and self._ends_unseen:
            texts[-1] = b""
        self._entries += zip(entries, texts, strict=True)
        self._ahead += sum(map(len, texts)) - len(piece.text.encode())

    def take_all(self) -> list[Any]:
        """Return the entries of all tokens since the last time."""
        taken, self._entries = self._entries, []
        return [entry for entry, _ in taken]

    def take(self, events: Sequence[Event], held: str) -> list[list[Any]]:
        """Return the entries of each event, none of what is no text of the answer.

        `held` is the text that the parser has not decided. What stands in front of it is then done with.
        """
        found: list[list[Any]] = [[] for _ in events]
        if not any(isinstance(event, (Content, Reasoning)) for event in events):
            return found  # what stands between the parts of a call may still become text
        came = b"".join(text for _, text in self._entries)
        limit = end = len(came) - len(held.encode()) - max(0, self._ahead)
        places: dict[int, tuple[int, int]] = {}
        for index in reversed(range(len(events))):
            event = events[index]
            if isinstance(event, Content) and (place := _found(event.text.encode(), came, end)) is not None:
                places[index] = place
                end = place[0]
        first = at = 0
        bounds = [(*places[index], found[index]) for index in sorted(places)]
        for start, stop, taken in [*bounds, (limit, 0, [])]:
            while first < len(self._entries):
                entry, text = self._entries[first]
                if at + len(text) > start:
                    if at >= stop:
                        break
                    taken.append(entry)
                at += len(text)
                first += 1
        del self._entries[:first]
        return found


def _found(text: bytes, came: bytes, end: int) -> tuple[int, int] | None:
    """Return where the text stands last in front of `end`, or anywhere; None if it does not.

    Line breaks at its start may have stood in front of a tag. A tokenizer may leave out a space at the start
    of a text, or write a byte as another character: then the bytes before `end` are not all of the text's.
    """
    own = text.lstrip(b"\n")
    for limit in (max(0, end), len(came)):
        for wanted in (text, own) if own else (text,):
            start = came.rfind(wanted, 0, limit)
            if start >= 0:
                return start, start + len(wanted)
    return None
