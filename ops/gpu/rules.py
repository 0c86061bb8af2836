"""Penalties and biases of logits in one pass, from tables on the GPU, so that a captured graph applies them.

A row's tables are its penalties, its biases, and a word of 16 bits for each token of the vocabulary: the
lowest bit says that the token is in the prompt, the others how often it is in the output, up to MAX_COUNT.
Of each logit 2 bytes are read and 4 written; of a penalised row 2 more are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options

LANES = tl.constexpr(4096)  # entries of a program
MAX_BIASES = tl.constexpr(1024)  # of a row
MAX_COUNT = tl.constexpr((1 << 14) - 1)
PRESENCE, FREQUENCY, REPETITION = range(3)


@triton.jit
def _is_penalised(presence, frequency, repetition):
    return (presence != 0) | (frequency != 0) | (repetition != 1)


@triton.jit
def _change_kernel(
    changed, logits, at, rows, words, presences, frequencies, repetitions, bias_ids, biases, num_biases,
    VOCAB: tl.constexpr, IN_PLACE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: LANES entries of one row of logits; IN_PLACE: of row at[i], whose biases are added already."""
    follow(PDL)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    presence, frequency = tl.load(presences + row), tl.load(frequencies + row)
    repetition = tl.load(repetitions + row)
    place = (tl.load(at + i) if IN_PLACE else i) * VOCAB
    entry = tl.program_id(1) * LANES + tl.arange(0, LANES)
    value = tl.load(logits + place + entry, entry < VOCAB, 0.0).to(tl.float32)
    if not IN_PLACE:
        for j in range(tl.load(num_biases + row)):
            token = tl.load(bias_ids + row * MAX_BIASES + j)
            value += tl.where(entry == token, tl.load(biases + row * MAX_BIASES + j), 0.0)
    if _is_penalised(presence, frequency, repetition):
        word = tl.load(words + row * VOCAB + entry, entry < VOCAB, 0).to(tl.int32)
        scaled = tl.where(value > 0, value / repetition, value * repetition)
        value = tl.where(word != 0, scaled, value)
        value -= frequency * (word >> 1).to(tl.float32) + tl.where(word > 1, presence, 0.0)
    tl.store(changed + place + entry, value, entry < VOCAB)


@triton.jit
def _count_kernel(
    words, tokens, rows, presences, frequencies, repetitions, m,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK tokens, of rows of which no two penalised ones are the same."""
    follow(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i, i < m, 0).to(tl.int64)
    token = tl.load(tokens + i, i < m, -1)
    presence, frequency = tl.load(presences + row), tl.load(frequencies + row)
    counted = _is_penalised(presence, frequency, tl.load(repetitions + row)) & (token >= 0)
    at = words + row * VOCAB + token
    word = tl.load(at, counted, 0).to(tl.int32)
    tl.store(at, (word + 2).to(tl.int16), counted & (word < 2 * MAX_COUNT))


class RuleTables:
    """Holds the penalties, token counts and biases of `num_rows` rows; a row that is clear has none."""

    def __init__(self, num_rows: int, vocab: int, device: torch.device, *, pdl: bool = False) -> None:
        self._words = torch.zeros(num_rows, vocab, dtype=torch.int16, device=device)
        self._penalties = torch.zeros(3, num_rows, device=device)
        self._penalties[REPETITION] = 1.0
        self._bias_ids = torch.zeros(num_rows, MAX_BIASES.value, dtype=torch.int32, device=device)
        self._biases = torch.zeros(num_rows, MAX_BIASES.value, device=device)
        self._num_biases = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._device = device
        self._pdl = pdl

    def set_penalties(
        self,
        row: int,
        penalties: tuple[float, float, float],
        prompt: Sequence[int],
        output: Sequence[int],
    ) -> None:
        """Set presence, frequency and repetition penalty of a clear row, and its tokens so far."""
        self._penalties[:, row] = self._sent(np.array(penalties, dtype=np.float32))
        words = self._words[row]
        words.index_fill_(0, self._sent(np.array(prompt, dtype=np.int64)), 1)
        if output:
            ids, counts = np.unique(np.array(output, dtype=np.int64), return_counts=True)
            at = self._sent(ids)
            words[at] += self._sent(2 * np.minimum(counts, MAX_COUNT.value).astype(np.int16))

    def set_biases(self, row: int, biases: Mapping[int, float]) -> None:
        """Set what is added to the logits of at most MAX_BIASES tokens of a clear row."""
        count = len(biases)
        self._bias_ids[row, :count] = self._sent(np.array(list(biases), dtype=np.int32))
        self._biases[row, :count] = self._sent(np.array(list(biases.values()), dtype=np.float32))
        self._num_biases[row] = count

    def clear_penalties(self, row: int) -> None:
        self._words[row] = 0
        self._penalties[:REPETITION, row] = 0.0
        self._penalties[REPETITION, row] = 1.0

    def clear_biases(self, row: int) -> None:
        self._num_biases[row] = 0

    def change(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Add the biases of each row to its logits, then subtract its penalties -> [m, vocab] float32.

        logits: [m, vocab], contiguous; rows: [m], the row of each. Presence and frequency look at the output,
        repetition (Keskar et al., 2019, arXiv:1909.05858) at prompt and output.
        """
        changed = torch.empty(logits.shape, device=logits.device)
        self._launch(changed, logits, rows, rows, in_place=False)
        return changed

    def penalise(self, logits: Tensor, at: Tensor, rows: Tensor) -> None:
        """Subtract the penalties of rows: [r] from logits: [m, vocab] float32 at the indices `at`: [r]."""
        self._launch(logits, logits, at, rows, in_place=True)

    def _launch(self, changed: Tensor, logits: Tensor, at: Tensor, rows: Tensor, *, in_place: bool) -> None:
        vocab = logits.shape[1]
        _change_kernel[(len(rows), triton.cdiv(vocab, LANES.value))](
            changed, logits, at, rows, self._words, *self._penalties.unbind(0), self._bias_ids, self._biases,
            self._num_biases, VOCAB=vocab, IN_PLACE=in_place, num_warps=4, **launch_options(self._pdl),
        )  # fmt: skip

    def count(self, rows: Tensor, tokens: Tensor) -> None:
        """Count the chosen tokens, [m] int64 (negative: none), of penalised rows: [m]."""
        m = len(tokens)
        _count_kernel[(triton.cdiv(m, 128),)](
            self._words, tokens, rows, *self._penalties.unbind(0), m, VOCAB=self._words.shape[1], BLOCK=128,
            num_warps=4, **launch_options(self._pdl),
        )  # fmt: skip

    def _sent(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return (
            tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)
        )
