"""The sizes of captured steps, and how a step with prompts is padded to one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from microvllm.runtime.worker.step_inputs import StepArrays

# Sizes of the captured steps with prompts in them; the longer ones are of small models alone. Beyond the last
# a step that is padded to the next size takes the GPU as long as its kernels take the host to launch.
PROMPT_TOKENS = (16, 64, 128, 256, 512, 1024, 1280, 1536, 2048, 2560, 3072)
FEW_TOKENS = 1024
DECODES = (0, 32)  # and as many as there can be
SEGMENTS = 32
ALIGNMENT = 4  # int32 numbers in 16 bytes: Triton compiles a kernel anew for pointers that are not multiples


def batch_sizes(largest: int) -> list[int]:
    """Of decode steps: 1, 2, 4, 8, then multiples of 8 up to 256 and of 16 beyond, and the largest."""
    sizes = {1, 2, 4, *range(8, min(largest, 256) + 1, 8), *range(272, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass(frozen=True, slots=True)
class StepSize:
    """How many decodes, and tokens of prompts, a captured step has room for. `groups`: of layers."""

    decodes: int
    tokens: int
    groups: int = 1

    def fits(self, arrays: StepArrays) -> bool:
        decodes = arrays.num_decodes
        return (
            decodes <= self.decodes
            and len(arrays.ids) - decodes <= self.tokens
            and len(arrays.lengths) - decodes <= SEGMENTS
        )

    def fields(self) -> list[slice]:
        """Return where each field lies in the staged inputs.

        In this order: ids, rows and positions of the tokens; context lengths and rows of the requests;
        starts of the segments; slots of the tokens in each group of layers.
        """
        tokens, requests = self.decodes + self.tokens, self.decodes + SEGMENTS
        found, start = [], 0
        for length in (tokens, tokens, tokens, requests, requests, SEGMENTS + 1, *[tokens] * self.groups):
            found.append(slice(start, start + length))
            start += -(-length // ALIGNMENT) * ALIGNMENT
        return found

    def staged(self, arrays: StepArrays, padding_row: int) -> np.ndarray:
        """The inputs of a step that fits, padded with tokens of the padding row: int32, as `fields` says."""
        fields = self.fields()
        staged = np.zeros(fields[-1].stop, dtype=np.int32)
        ids, rows, positions, context, request_rows, starts, *slots = (staged[field] for field in fields)
        rows[:], request_rows[:], staged[fields[6].start :] = padding_row, padding_row, -1
        decodes = arrays.num_decodes
        for padded, values in (
            (ids, arrays.ids),
            (rows, arrays.rows),
            (positions, arrays.positions),
            (context, arrays.context),
            (request_rows, arrays.request_rows),
            *zip(slots, arrays.slots, strict=True),
        ):
            padded[:decodes] = values[:decodes]
            padded[self.decodes : self.decodes + len(values) - decodes] = values[decodes:]
        ends = np.cumsum(arrays.lengths[decodes:])
        starts[1 : len(ends) + 1] = ends
        starts[len(ends) + 1 :] = starts[len(ends)]
        return staged


def step_sizes(
    max_num_seqs: int, max_num_batched_tokens: int, longest: int = FEW_TOKENS, groups: int = 1
) -> list[StepSize]:
    """The smaller before the larger; of more than FEW_TOKENS up to `longest`, without or with all decodes."""
    decodes = sorted({min(count, max_num_seqs) for count in (*DECODES, max_num_seqs)})
    tokens = [n for n in PROMPT_TOKENS if n <= min(max(longest, FEW_TOKENS), max_num_batched_tokens)]
    return [
        StepSize(d, n, groups) for d in decodes for n in tokens if n <= FEW_TOKENS or d in (0, max_num_seqs)
    ]
