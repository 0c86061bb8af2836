"""Our tokenizer as one of transformers', for users of the offline API who expect its whole interface."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from microvllm.runtime.text.tokenizer import Tokenizer


def as_transformers(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Ids and texts are those of `tokenizer`; chat template and special tokens come along.

    A special token that the vocabulary lacks is left out: transformers would invent an id, for which the
    model has no row.
    """
    named = {
        name: text
        for name, text in tokenizer.special_tokens.items()
        if tokenizer.backend.token_to_id(text) is not None
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **named,
    )
    made.chat_template = tokenizer.chat_template
    return made
