"""Describes each request field in one sentence, for the OpenAPI document and its page."""

from __future__ import annotations

from collections.abc import Mapping

DESCRIPTIONS: Mapping[str, str] = {
    # what to continue
    "model": "A name of `/v1/models`; the served model if left out.",
    "prompt": "A string, a list of token ids, or a list of either, which returns a choice for each.",
    "messages": "The conversation so far.",
    "tokens": "The token ids to turn into text.",
    "tools": "Functions that the model may call.",
    "add_special_tokens": "Put the special tokens that belong around every text (BOS) around the prompt.",
    "add_generation_prompt": "End the conversation with the beginning of a response.",
    "continue_final_message": "Continue the last message instead of responding to it.",
    "chat_template_kwargs": 'Variables of the chat template, such as `{"enable_thinking": false}`.',
    "reasoning_effort": "A variable of the chat template; `none` also turns thinking off.",
    "truncate_prompt_tokens": "Keep so many tokens of a prompt that is longer; -1: as many as fit.",
    "truncation_side": "The side from which `truncate_prompt_tokens` drops tokens.",
    # how to sample
    "temperature": "Divides the logits: 0 always takes the likeliest token, more than 1 flattens.",
    "top_p": "Sample among the likeliest tokens that have this share of the probability together.",
    "top_k": "Sample among the k likeliest tokens; 0 or -1: all.",
    "min_p": "Sample among tokens with at least this share of the likeliest one's probability.",
    "seed": "The same seed and request give the same random numbers.",
    "n": "Choices for each prompt.",
    "presence_penalty": "Subtracted from the logit of each token that the output already has.",
    "frequency_penalty": "Subtracted from the logit of a token, times its count in the output.",
    "repetition_penalty": "Divides positive logits of tokens in prompt and output, multiplies negative ones.",
    "logit_bias": "Maps a token id to a number that is added to its logit.",
    "allowed_token_ids": "Only these tokens may be generated.",
    "bad_words": "Words that must not be generated.",
    "use_beam_search": "Search for the likeliest text with `n` beams instead of sampling.",
    "length_penalty": "Exponent of the length by which a beam's score is divided.",
    # when to end
    "max_tokens": "Maximum number of output tokens.",
    "max_completion_tokens": "Maximum number of output tokens; overrides `max_tokens`.",
    "min_tokens": "Minimum number of output tokens before the output may end.",
    "stop": "Strings at which the output ends.",
    "stop_token_ids": "Tokens at which the output ends.",
    "include_stop_str_in_output": "Keep the stop string that ended the output.",
    "ignore_eos": "Continue after the model's end token.",
    "repetition_detection": "End an output that repeats a pattern of tokens.",
    # how to respond
    "stream": "Send the response as it is generated, as server-sent events.",
    "stream_options": "`include_usage` adds a chunk with token counts, `continuous_usage_stats` to each.",
    "stream_interval": "Minimum number of tokens in a chunk.",
    "echo": "Put the prompt, or the last message, in front of the output.",
    "logprobs": "Log probabilities of the tokens.",
    "top_logprobs": "The likeliest tokens at each position with their log probabilities.",
    "prompt_logprobs": "Log probabilities of the prompt's tokens, and of so many likeliest ones each.",
    "logprob_token_ids": "Log probabilities of these tokens at each position.",
    "return_tokens_as_token_ids": "Write tokens of log probabilities as `token_id:N`.",
    "return_token_ids": "Add the token ids of prompt and output.",
    "return_token_strs": "Add each token as the vocabulary spells it.",
    "return_prompt_text": "Add the text that the chat template made.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "spaces_between_special_tokens": "Put spaces between special tokens that are shown.",
    # how to serve
    "priority": "Lower is served earlier, with `--scheduling-policy priority`.",
    "cache_salt": "Requests share cached prefixes only with the same salt.",
    "request_id": "The end of the response's `id`.",
}
