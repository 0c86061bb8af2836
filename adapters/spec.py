"""Describes a model as data: `ModelSpec`, read from `config.json` or from a GGUF header.

Imports no torch: the API process reads it too, for the context length and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from microvllm.adapters.cache_plan import CachePlan
from microvllm.adapters.files.quantization import Quantization
from microvllm.adapters.layers.dense_and_experts import DenseAndExperts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.head_norms import head_norms, whole_norms
from microvllm.adapters.layers.latent import LatentAttention
from microvllm.adapters.layers.layer_tails import LayerTails
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.layers.nothing import Nothing
from microvllm.adapters.layers.stateful import StatefulMixer
from microvllm.adapters.layers.stateful_kinds import StatefulKind
from microvllm.adapters.pooling_spec import Pooling
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.tensors import WHOLE, LayerWeights, Shard, Slot, fused, matrix_slots, vector_slot

if TYPE_CHECKING:
    from microvllm.ops.attention import AttentionBackend, AttentionWeights, BackendConfig
    from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators


class Attention(msgspec.Struct, frozen=True, kw_only=True, tag="attention"):
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245) over rotated queries and keys.

    window: the positions that a query sees, its own included; None for all. Scores are multiplied by `scale`
    (None: head_dim ** -0.5), then capped as cap * tanh(score / cap) if there is a `softcap`. `qk_norm`: an
    RMSNorm over each head of q and of k before the rotation; `whole_qk_norm`: one over all of q, and of k;
    `v_norm`: beside `qk_norm`, one without weights over each head of v. `keys_as_values`: v is what k is
    before its norm. `source`: the layer whose keys and values are attended to; there are none of its own.
    With a `temperature`, (beta, length), queries are multiplied by 1 + beta * log(1 + position // length).
    `sinks`: see `ops.attention.AttentionConfig`. If `gated`, the output is multiplied by a sigmoid of as many
    more outputs of q's matrix, which has those of a head behind its queries.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    v_norm: bool = False
    keys_as_values: bool = False
    source: int | None = None
    temperature: tuple[float, int] | None = None
    sinks: bool = False
    gated: bool = False

    @property
    def out_size(self) -> int:
        """The width of what is between the two products."""
        return self.q_size

    @property
    def cache_size(self) -> int:
        """Elements that a layer's cache has for one token."""
        return 2 * self.kv_size

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return 0 if self.source is not None else self.num_kv_heads * self.head_dim

    def at_length(self, length: int) -> Attention:
        """The same for texts of at most `length` tokens: see `RopeSpec.at_length`."""
        return msgspec.structs.replace(self, rope=self.rope.at_length(length, self.head_dim))

    def num_products(self, hidden_size: int) -> int:
        """Multiplications with weights that one token takes."""
        return hidden_size * ((2 + self.gated) * self.q_size + 2 * self.kv_size)

    def sharded(self, size: int) -> Attention:
        """What one of `size` shards computes of it; shards beyond the heads of keys and values share these.

        Raises ValueError if its heads do not divide evenly.
        """
        kv_heads = self.num_kv_heads
        if self.num_heads % size:
            raise ValueError(f"{self.num_heads} heads do not divide into {size} shards")
        if kv_heads % size and size % kv_heads:
            raise ValueError(f"{kv_heads} heads of keys and values do not divide into {size} shards")
        return msgspec.structs.replace(
            self, num_heads=self.num_heads // size, num_kv_heads=max(1, kv_heads // size)
        )

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """`qkv` [(H + 2 Hkv) D, h], `o` [h, H D], `q_norm`, `k_norm` [D], `sinks` [H].

        q and k are in `rope.order`. With a `source` there is nothing of k and v. Gates are behind the others:
        [H D, h] more of `qkv`.
        """
        order = self.head_dim, self.rope.order(self.head_dim)
        kv, hidden = shard.share_units(self.num_kv_heads, self.head_dim), WHOLE.share(hidden_size)
        v = "k_as_v" if self.keys_as_values else "v"
        own = {} if self.source is not None else {"k": kv.reordered(*order), v: kv}
        rows = {"q": shard.share(self.q_size).reordered(*order), **own}
        if self.gated:
            both, pair = shard.share(2 * self.q_size), 2 * self.head_dim
            gates = both.reordered(pair, [(self.head_dim, pair)])
            rows |= {"q": both.reordered(pair, order[1]), "gate_of_q": gates}
        yield from matrix_slots("qkv", fused(rows, names, "qkv"), hidden, bias=self.qkv_bias)
        # Shards add up what `o` gives, its bias once.
        bias = self.o_bias and shard.rank == 0
        yield from matrix_slots("o", {"o": hidden}, shard.share(self.q_size), bias=bias)
        if self.qk_norm:
            one_head = WHOLE.share(self.head_dim).reordered(*order)
            yield from (vector_slot(f"{part}_norm", one_head) for part in ("q", *own)[:2])
        if self.whole_qk_norm:
            yield from (vector_slot(f"{part}_norm", rows[part]) for part in ("q", "k"))
        if self.sinks:
            yield vector_slot("sinks", shard.share(self.num_heads))

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        """The products before and behind what the attention backend does."""
        qkv = operators.product(*weights.matrix("qkv"), norm=norm)
        if self.whole_qk_norm:
            qkv = whole_norms(qkv, weights, operators)
        if self.v_norm:
            qkv = head_norms(qkv, self.num_heads, self.num_kv_heads, weights, operators)
        return qkv, operators.linear(*weights.matrix("o"))

    def kept(self, weights: LayerWeights) -> AttentionWeights:
        """What a layer needs between its products."""
        from microvllm.ops.attention import AttentionWeights
        from microvllm.ops.attention.e4m3 import KVScales

        q_norm, k_norm = weights.norm("q_norm"), weights.norm("k_norm")
        qk_norm = (q_norm[0], k_norm[0]) if q_norm and k_norm else None
        sinks, scales = weights.vector("sinks"), weights.vector("kv_scales")
        return AttentionWeights(qk_norm, sinks, KVScales() if scales is None else KVScales(*scales.tolist()))

    def backend(
        self, layers: Sequence[AttentionWeights], config: BackendConfig, operators: Operators
    ) -> AttentionBackend:
        """The attention of these layers over their part of the KV cache."""
        from microvllm.adapters.rotary import inverse_frequencies
        from microvllm.ops.attention import AttentionConfig, AttentionShape, QKNorms
        from microvllm.ops.attention.gated import GatedAttention
        from microvllm.ops.attention.temperature import tempered

        heads = len(layers), self.num_heads, self.num_kv_heads, self.head_dim
        shape = AttentionShape(*heads, self.window, self.rope.attention_factor, self.scale, self.softcap)
        pages, length = config.pages.pages, config.max_position
        inv_freq = inverse_frequencies(self.rope, self.head_dim).to(pages.device)
        cache = pages.num_blocks, pages.block_size, inv_freq, length, pages.dtype
        norms = tuple(each.qk_norm for each in layers if each.qk_norm is not None)
        qk_norms = QKNorms(norms, config.eps) if norms else None
        scales = tuple(each.scales for each in layers)
        sinks = tuple(each.sinks.float() for each in layers if each.sinks is not None)
        made = operators.attention(AttentionConfig(shape, *cache, qk_norms, scales, sinks, config.pages))
        if self.gated:
            return GatedAttention(made, self.q_size + 2 * self.kv_size)
        return tempered(made, self.q_size, self.temperature, length, pages.device)


Mixer: TypeAlias = Attention | LatentAttention | StatefulKind
MLPKind: TypeAlias = MLP | Experts | DenseAndExperts | Nothing


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: hidden += mixer(hidden), then hidden += mlp(hidden); either may be `Nothing`.

    `pre_norms`: each of the two has an RMSNorm in front of it; `post_norms`: one behind it, before the sum.
    """

    mixer: Mixer
    mlp: MLPKind
    pre_norms: bool = True
    post_norms: bool = False

    @property
    def attention(self) -> Attention:
        """The mixer of a layer that is known to have attention. Raises TypeError for another."""
        if not isinstance(self.mixer, Attention):
            raise TypeError("the layer has no attention")
        return self.mixer

    def with_parts(self, **changes: Any) -> LayerSpec:
        """The same layer, but with these fields."""
        return msgspec.structs.replace(self, **changes)

    def with_mixer(self, **changes: Any) -> LayerSpec:
        """The same layer, but with these fields of its mixer."""
        return self.with_parts(mixer=msgspec.structs.replace(self.mixer, **changes))

    def slots(self, hidden_size: int, names: Mapping[str, str], shard: Shard) -> Iterator[Slot]:
        """Those of the mixer and of the MLP, and `mixer_norm`, `mixer_post_norm` and `mlp_`'s, each [h]."""
        for kind, part in (("mixer", self.mixer), ("mlp", self.mlp)):
            yield from part.slots(hidden_size, names, shard)
            if self.pre_norms and not isinstance(part, Nothing):
                yield vector_slot(f"{kind}_norm", hidden_size)
            if self.post_norms and not isinstance(part, Nothing):
                yield vector_slot(f"{kind}_post_norm", hidden_size)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer. Sizes in elements; `dtype` is the checkpoint's own.

    Token embeddings are multiplied by `embedding_scale`; `norm_offset` is added to the weights of all norms;
    logits are multiplied by `logits_scale`, then capped as cap * tanh(logit / cap) if there is a
    `logits_softcap`. With a `pooling` there is no head: the output is a vector for each text.
    `tails`: what all layers do behind their MLP.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    rms_norm_eps: float
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    tails: LayerTails | None = None
    tie_embeddings: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pooling: Pooling | None = None
    quantization: Quantization | None = None  # of a Hugging Face folder

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mixers(self) -> tuple[Attention, ...]:
        """Each kind of attention once."""
        kinds = dict.fromkeys(layer.mixer for layer in self.layers)
        return tuple(kind for kind in kinds if isinstance(kind, Attention))

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Each kind of rotation once."""
        mixers = (layer.mixer for layer in self.layers)
        return tuple(dict.fromkeys(m.rope for m in mixers if not isinstance(m, StatefulMixer)))

    @property
    def default_length(self) -> int:
        """Context length in tokens if none is requested.

        Of "longrope" the original one, as in vLLM: a longer one changes the output for short texts.
        """
        originals = [rope.original_max_position for rope in self.ropes if rope.scaling == "longrope"]
        return min([self.max_position, *originals])

    @property
    def num_products(self) -> int:
        """Multiplications with weights that one token takes."""
        parts = (
            part.num_products(self.hidden_size) for layer in self.layers for part in (layer.mixer, layer.mlp)
        )
        tails = self.num_layers * self.tails.num_products(self.hidden_size) if self.tails else 0
        return self.vocab_size * self.hidden_size + sum(parts) + tails

    @property
    def cache_plan(self) -> CachePlan:
        """How its layers share the pages of the KV cache."""
        mixers = [layer.mixer for layer in self.layers]
        dims = [mixer.head_dim if isinstance(mixer, Attention) else mixer.cache_size for mixer in mixers]
        return CachePlan.of([(m.window, m.cache_size, dim) for m, dim in zip(mixers, dims, strict=True)])

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes that a request holds over all layers whatever its length; `dtype_bytes` of an activation."""
        mixers = (layer.mixer for layer in self.layers)
        return sum(m.state_bytes(dtype_bytes) for m in mixers if isinstance(m, StatefulMixer))

    def with_layers(self, layers: Iterable[LayerSpec], **changes: Any) -> ModelSpec:
        """The same model, but with these layers and fields."""
        return msgspec.structs.replace(self, layers=tuple(layers), **changes)

    def at_length(self, length: int) -> ModelSpec:
        """The model for texts of at most `length` tokens: see `RopeSpec.at_length`."""
        return self.with_layers(each.with_parts(mixer=each.mixer.at_length(length)) for each in self.layers)

    def sharded(self, size: int) -> ModelSpec:
        """The model that one of `size` shards computes. Raises ValueError if it does not divide.

        `vocab_size` stays the whole one.
        """
        if -(-self.vocab_size // size) * (size - 1) >= self.vocab_size:
            raise ValueError(f"a vocabulary of {self.vocab_size} does not divide into {size} shards")
        return self.with_layers(
            layer.with_parts(mixer=layer.mixer.sharded(size), mlp=layer.mlp.sharded(size))
            for layer in self.layers
        )

    def slots(self, names: Mapping[str, str], shard: Shard = WHOLE) -> Iterator[Slot]:
        """The tensors of the model in the order in which they are loaded; `names` are the family's."""
        hidden, vocabulary = WHOLE.share(self.hidden_size), shard.share(self.vocab_size)
        yield from matrix_slots("embed", {"embed": vocabulary}, hidden)
        for index, layer in enumerate(self.layers):
            for slot in layer.slots(self.hidden_size, names, shard):
                yield slot._replace(name=f"layers.{index}.{slot.name}", layer=index)
        if self.tails is not None:
            yield from self.tails.slots(self.vocab_size, self.hidden_size, self.num_layers, shard)
        yield vector_slot("norm", self.hidden_size)
        if not self.tie_embeddings:
            yield from matrix_slots("lm_head", {"lm_head": vocabulary}, hidden)
