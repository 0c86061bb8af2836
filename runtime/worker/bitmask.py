"""Which tokens may come next, as a `TokenMask` decides from outside, and their bits applied to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor

from microvllm.runtime.core.plan import ScheduledRequest
from microvllm.runtime.request import EngineRequest

# The known output of a request, and whether one more token is in flight, whose value only the device has.
Output = tuple[Sequence[int], bool]
ReadTokens = Callable[[], list[int]]  # waits for the device
# Chooses tokens by masks, as `take_out` has them.
ChooseMasked = Callable[[Sequence[int], Sequence[np.ndarray]], ReadTokens]
Choice = tuple[ReadTokens | None, ChooseMasked | None]


@dataclass(slots=True, eq=False)
class Generated(Sequence[int]):
    """The tokens behind a prompt, without a copy of them: rules read their number and the last few."""

    token_ids: Sequence[int]
    prompt_len: int

    def __len__(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(self.prompt_len, len(self.token_ids))[index]
        if isinstance(places, int):
            return self.token_ids[places]
        return [self.token_ids[place] for place in places]


def known_output(items: Sequence[ScheduledRequest], i: int) -> Output:
    """What request i of a step has generated before the token that the step chooses."""
    request, end = items[i].request, items[i].start + items[i].num_new
    return Generated(request.token_ids, request.prompt_len), len(request.token_ids) < end


class TokenMask(Protocol):
    """Decides from outside which tokens may come next: a grammar, for example.

    It follows what a request generates: a step is sampled when the tokens before it are known.
    """

    def set_row(self, row: int, request: EngineRequest, output: Sequence[int]) -> None:
        """A request was admitted to the row. output: what it has generated before a preemption."""
        ...

    def clear_row(self, row: int) -> None: ...

    def concerns(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows is masked."""
        ...

    def bits(
        self, rows: Sequence[int], output: Callable[[int], Output]
    ) -> tuple[Sequence[int], Sequence[np.ndarray]]:
        """Which of the rows are masked, as indices into them, and the bits of each; waits for them.

        output(i): what rows[i] has generated. Bits: [ceil(vocab / 32)] int32 of each; token t may come if bit
        t % 32, from the least on, of word t // 32 is set.
        """
        ...


def take_out(logits: Tensor, masked: Sequence[int], bits: Sequence[np.ndarray]) -> None:
    """Set logits[masked[i], token] to -inf where bit `token` of bits[i] is 0.

    logits: [n, vocab] float32, changed in place; bits: m arrays, [ceil(vocab / 32)] int32.
    """
    if not masked:
        return
    if not logits.is_cuda:
        values, vocab = logits.numpy(), logits.shape[1]
        for i, words in zip(masked, bits, strict=True):  # a row stays in a core's cache
            out = np.unpackbits(~words.view(np.uint8), count=vocab, bitorder="little").view(np.bool_)
            np.copyto(values[i], -np.inf, where=out)
        return
    from microvllm.ops.gpu.bitmask import apply_bitmask  # a machine without a GPU need not have Triton

    sent = torch.empty(len(bits), len(bits[0]), dtype=torch.int32, pin_memory=True)
    for row, words in zip(sent.numpy(), bits, strict=True):
        row[:] = words
    at = torch.tensor(masked).pin_memory().to(logits.device, non_blocking=True)
    apply_bitmask(logits, sent.to(logits.device, non_blocking=True), at)
