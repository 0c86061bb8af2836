"""vLLM's offline calls for vectors, `LLM.embed`, `encode` and `score`: of models with `runner="pooling"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.offline.calls import UseTqdm, progress, refuse_given, tokenized
from microvllm.runtime.offline.core_thread import OfflineSequence
from microvllm.runtime.offline.llm_engine import one_each
from microvllm.runtime.offline.prompts import Prompt
from microvllm.runtime.vectors import VectorForm, cosine
from microvllm.runtime.worker.pooling import as_tensor

T = TypeVar("T")
TASK = "embed"


@dataclass(slots=True)
class PoolingParams:
    """The form of a vector, under vLLM's names; None: the model's own. The last three are refused."""

    use_activation: bool | None = None
    dimensions: int | None = None
    task: str | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    late_chunking_params: Any = None


@dataclass(slots=True)
class PoolingOutput:
    """`data`: [size] float32, a tensor."""

    data: Any


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """The cosine of the angle between the vectors of two texts."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[T]):
    """What a prompt gave; of a score `prompt_token_ids` are those of both texts."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]
Pooled = tuple[OfflineSequence, np.ndarray]


class PoolingMethods:
    """The methods of `LLM` for vectors. All raise `InvalidRequestError` before any prompt is computed."""

    engine: InferenceEngine
    _ids: Iterator[int]

    def _check_awake(self) -> None:
        raise NotImplementedError

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Return the vector of every prompt, in input order."""
        found = self._pool(prompts, pooling_params, use_tqdm, lora_request, tokenization_kwargs)
        return [self._output(EmbeddingOutput(vector.tolist()), sequence) for sequence, vector in found]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Return the vector of every prompt as a tensor; `pooling_task` has to be "embed"."""
        if pooling_task != TASK:
            raise InvalidRequestError(f"pooling_task must be {TASK!r}, got {pooling_task!r}.", "pooling_task")
        found = self._pool(prompts, pooling_params, use_tqdm, lora_request, tokenization_kwargs)
        return [self._output(PoolingOutput(as_tensor(vector)), sequence) for sequence, vector in found]

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        /,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: None = None,
    ) -> list[ScoringRequestOutput]:
        """Return how alike texts are, from -1 to 1: one and one, one and many, or as many of both."""
        refuse_given(chat_template=chat_template)
        first, second = (
            [each] if isinstance(each, (str, Mapping)) else list(each) for each in (data_1, data_2)
        )
        if len(first) not in (1, len(second)) or not second:
            raise InvalidRequestError("Input lengths must be either 1:1, 1:N or N:N", "data_1")
        found = self._pool([*first, *second], pooling_params, use_tqdm, lora_request, tokenization_kwargs)
        ones, others = found[: len(first)], found[len(first) :]
        return [
            self._output(ScoringOutput(cosine(one[1], other[1])), one[0], other[0])
            for one, other in zip(ones * (len(others) // len(ones)), others, strict=True)
        ]

    def classify(self, *_: Any, **__: Any) -> NoReturn:
        """Raise `InvalidRequestError`: no model here is a classifier."""
        raise InvalidRequestError("LLM.classify() is not supported: no model here is a classifier.")

    def _pool(
        self,
        prompts: Any,
        params: PoolingParams | Sequence[PoolingParams] | None,
        use_tqdm: UseTqdm,
        lora_request: None,
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[Pooled]:
        self._check_awake()
        given = tokenized(self.engine, prompts, tokenization_kwargs, lora_request, None)
        each = one_each(PoolingParams() if params is None else params, len(given), "pooling_params")
        forms = [_form(self.engine, one) for one in each]
        sequences = [self.engine.vector_sequence(one.ids or [], one.cache_salt) for one in given]
        with progress(use_tqdm, len(sequences)) as advance:
            for _ in self.engine.generate_deltas(sequences):
                advance()
        return [
            (sequence, form.read(sequence.pooled)) for sequence, form in zip(sequences, forms, strict=True)
        ]

    def _output(self, outputs: T, *sequences: OfflineSequence) -> PoolingRequestOutput[T]:
        ids = [token for sequence in sequences for token in sequence.prompt_token_ids]
        cached = sum(sequence.num_cached_tokens for sequence in sequences)
        return PoolingRequestOutput(str(next(self._ids)), outputs, ids, cached)


def _form(engine: InferenceEngine, params: PoolingParams) -> VectorForm:
    if not isinstance(params, PoolingParams):
        raise InvalidRequestError(
            f"pooling_params must be PoolingParams, got {type(params).__name__}", "pooling_params"
        )
    if params.task not in (None, TASK):
        raise InvalidRequestError(f"task must be {TASK!r}, got {params.task!r}.", "task")
    refuse_given(
        step_tag_id=params.step_tag_id,
        returned_token_ids=params.returned_token_ids,
        late_chunking_params=params.late_chunking_params,
    )
    return VectorForm.of(engine.config.spec, params.dimensions, params.use_activation)
