"""What the calls of `LLM` have in common: prompts, arguments that are refused, and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import Progress

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.offline.prompts import OfflinePrompt, read_prompts

if TYPE_CHECKING:
    from microvllm.runtime.engine import InferenceEngine

UseTqdm: TypeAlias = "bool | Callable[..., Any]"


def tokenized(
    engine: InferenceEngine,
    prompts: Any,
    tokenization_kwargs: Mapping[str, Any] | None,
    lora_request: None,
    mm_processor_kwargs: Mapping[str, Any] | None,
) -> list[OfflinePrompt]:
    """Return the prompts with their token ids."""
    refuse_given(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
    special = add_special_tokens(tokenization_kwargs, True)
    tokenize = engine.processor.tokenize_prompt
    return [
        prompt._replace(ids=tokenize(prompt.text or "", special)) if prompt.ids is None else prompt
        for prompt in read_prompts(prompts)
    ]


def add_special_tokens(tokenization_kwargs: Mapping[str, Any] | None, default: bool) -> bool:
    """Return the one option of tokenization that there is."""
    options = dict(tokenization_kwargs or {})
    value = options.pop("add_special_tokens", None)
    for name in options:
        raise InvalidRequestError(f"tokenization_kwargs: {name} is not supported.", "tokenization_kwargs")
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError("add_special_tokens must be true or false.", "tokenization_kwargs")
    return default if value is None else value


def refuse_given(**arguments: Any) -> None:
    """Raise `InvalidRequestError` for an argument that asks for what a text model without adapters lacks."""
    for name, value in arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(each is not None and each != {} for each in values):
            raise InvalidRequestError(f"{name} is not supported.", name)


@contextmanager
def progress(use_tqdm: UseTqdm, total: int) -> Iterator[Callable[[], object]]:
    """Shows a bar while the block runs; yields what advances it by one prompt."""
    if callable(use_tqdm):
        bar = use_tqdm(total=total, desc="Processed prompts")
        try:
            yield lambda: bar.update(1)
        finally:
            bar.close()
        return
    # On stderr, as tqdm's, and with a console of its own: two threads cannot draw on one.
    with Progress(console=Console(stderr=True), disable=not use_tqdm, transient=True) as progress:
        task = progress.add_task("Processed prompts", total=total)
        yield lambda: progress.advance(task)
