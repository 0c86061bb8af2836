"""The command line's options of the engine. Names and defaults are those of `vllm serve` 0.33."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microvllm.openai_compat.flags.argv import UsageError
from microvllm.openai_compat.flags.option_values import OBJECT, context_length, human_int, json_object, share
from microvllm.runtime.machine import usable_cores
from microvllm.runtime.vllm_environment import unknown_variables

if TYPE_CHECKING:
    from microvllm.runtime.config import EngineArgs


def check_paths(tokenizer: str | None, generation_config: str = "auto") -> None:
    """Raises `ConfigError` for paths that no file system takes, under the names of their flags."""
    from microvllm.runtime.find_model import user_path

    if tokenizer is not None:
        user_path(tokenizer, "--tokenizer")
    user_path(generation_config, "--generation-config")


def choose_model(positional: Sequence[str], option: str | None) -> str:
    """The model named in the arguments or in `--model`. Raises `UsageError` for none or two."""
    if len(positional) > 1:
        raise UsageError(f"two models were given: {positional[0]} and {positional[1]}")
    if positional and option is not None and positional[0] != option:
        raise UsageError(f"two models were given: {positional[0]} and --model {option}")
    model = positional[0] if positional else option
    if not model:
        raise UsageError(
            "no model was given", remedy="name one: --model DIR, a .gguf file, or smollm2-135m-instruct"
        )
    return model


ModelArg = Annotated[list[str] | None, typer.Argument(metavar="[MODEL]", help="Same as --model.")]
ModelOpt = Annotated[
    str | None,
    typer.Option("--model", help="A model folder, a .gguf file, or smollm2-135m-instruct."),
]
TokenizerOpt = Annotated[
    str | None,
    typer.Option(help="Folder or .gguf file of the tokenizer, if not the model's."),
]
DtypeOpt = Annotated[str, typer.Option(help="auto, float32 (float), bfloat16, or on a GPU float16 (half).")]
LoadFormatOpt = Annotated[
    str,
    typer.Option(help="auto, safetensors, gguf, or dummy (random weights)."),
]
GGUFWeightsOpt = Annotated[
    str,
    typer.Option(
        help="How the matrices of a .gguf file are kept: packed, multiplied exactly from its own blocks; "
        "dequantized, rounded to --dtype; auto, packed with the backend cpu."
    ),
]
CpuActivationsOpt = Annotated[
    str,
    typer.Option(
        help="What packed weights are multiplied with: float32, exact; int8, activations rounded to 8 bits "
        "in groups of 32: products in integers, faster, not exact."
    ),
]
GenerationConfigOpt = Annotated[
    str,
    typer.Option(help="Sampling defaults: auto (the model's), vllm (none), or a folder."),
]
MaxModelLenOpt = Annotated[
    int | None,
    typer.Option(
        parser=context_length,
        metavar="TOKENS",
        help="Context length; auto or -1: as long as the model and memory allow.",
    ),
]
SeedOpt = Annotated[
    int, typer.Option(min=-(1 << 63), max=(1 << 63) - 1, help="Seed of requests that bring none.")
]
CpuThreadsOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=usable_cores(),
        help="Threads to compute with; one for each physical core, within the cgroup's limit, if not given.",
    ),
]
BackendOpt = Annotated[
    str,
    typer.Option(
        help="What computes: cpu, our kernels in C, compiled at the first start; torch, PyTorch's own "
        "operators, slower; auto, cpu where a C compiler is found, else torch."
    ),
]
BlockSizeOpt = Annotated[int | None, typer.Option(min=1, help="Tokens in a KV block.")]
KVBytesOpt = Annotated[
    int | None,
    typer.Option(parser=human_int, metavar="BYTES", help="Size of the KV cache, such as 1G."),
]
StepTimesOpt = Annotated[
    bool,
    typer.Option(
        "--log-step-times/--no-log-step-times",
        help="Log where the time of steps goes: a table every 10 s while there are requests, one at the end.",
    ),
]
IgnoreUnsupportedOpt = Annotated[
    bool,
    typer.Option(
        "--ignore-unsupported-flags/--no-ignore-unsupported-flags",
        help="Start without the flags of vllm serve that would change what is served and do not exist here.",
    ),
]


def engine_args(
    *,
    model_arg: ModelArg = None,
    model: ModelOpt = None,
    tokenizer: TokenizerOpt = None,
    dtype: DtypeOpt = "auto",
    load_format: LoadFormatOpt = "auto",
    gguf_weights: GGUFWeightsOpt = "auto",
    cpu_activations: CpuActivationsOpt = "float32",
    generation_config: GenerationConfigOpt = "auto",
    override_generation_config: Annotated[
        Any,
        typer.Option(parser=json_object, metavar=OBJECT, help="Sampling defaults in place of the model's."),
    ] = None,
    hf_overrides: Annotated[
        Any,
        typer.Option(parser=json_object, metavar=OBJECT, help="Values in place of those in config.json."),
    ] = None,
    rope_scaling: Annotated[
        Any, typer.Option(parser=json_object, metavar=OBJECT, help="The same as --hf-overrides.rope_scaling.")
    ] = None,
    rope_theta: Annotated[float | None, typer.Option(help="The same as --hf-overrides.rope_theta.")] = None,
    max_logprobs: Annotated[
        int, typer.Option(min=-1, help="Log probabilities that a request may ask for; -1: all.")
    ] = 20,
    logprobs_mode: Annotated[
        str,
        typer.Option(help="raw_logprobs, processed_logprobs, raw_logits or processed_logits."),
    ] = "raw_logprobs",
    max_model_len: MaxModelLenOpt = None,
    seed: SeedOpt = 0,
    cpu_threads: CpuThreadsOpt = None,
    attention_backend: BackendOpt = "auto",
    block_size: BlockSizeOpt = None,
    kv_cache_memory_bytes: KVBytesOpt = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            parser=share, metavar="SHARE", help="Part of the GPU's memory to use; no effect on a CPU."
        ),
    ] = 0.92,
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager/--no-enforce-eager", help="Run every step without CUDA graphs."),
    ] = False,
    num_gpu_blocks_override: Annotated[
        int | None, typer.Option(min=1, help="Number of KV blocks, whatever fits.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Reuse the KV blocks of equal prompt beginnings.",
        ),
    ] = True,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests that run at once.")] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(parser=human_int, metavar="TOKENS", help="Tokens in one step."),
    ] = None,
    enable_chunked_prefill: Annotated[
        bool,
        typer.Option(
            "--enable-chunked-prefill/--no-enable-chunked-prefill",
            help="Split a long prompt over several steps.",
        ),
    ] = True,
    long_prefill_token_threshold: Annotated[
        int,
        typer.Option(min=0, help="Most prompt tokens of one request in a step; 0: no limit."),
    ] = 0,
    scheduling_policy: Annotated[
        str,
        typer.Option(
            help="fcfs; priority: of each request, smaller first; sjf: align lengths, shorter texts first."
        ),
    ] = "fcfs",
    async_scheduling: Annotated[
        bool | None,
        typer.Option(
            "--async-scheduling/--no-async-scheduling",
            help="Plan the next step while this one computes; on by default on a GPU.",
        ),
    ] = None,
    log_step_times: StepTimesOpt = False,
    ignore_unsupported_flags: IgnoreUnsupportedOpt = False,
    fail_on_environ_validation: Annotated[
        bool,
        typer.Option(
            "--fail-on-environ-validation/--no-fail-on-environ-validation",
            help="Do not start with a VLLM_ variable in the environment that vLLM does not know.",
        ),
    ] = False,
) -> EngineArgs:
    """What the options ask for. Raises `UsageError` and `ConfigError` naming the option."""
    # `ignore_unsupported_flags` is only here for --help: `normalise_argv` has dealt with those flags.
    if fail_on_environ_validation and (unknown := unknown_variables(os.environ)):
        raise UsageError(f"--fail-on-environ-validation: vLLM does not know {', '.join(unknown)}")
    name = choose_model(model_arg or (), model)
    check_paths(tokenizer, generation_config)

    from microvllm.runtime.config import EngineArgs

    return EngineArgs(
        model=name,
        tokenizer=tokenizer,
        dtype=dtype,
        max_model_len=None if max_model_len == -1 else max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        device=device,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        num_gpu_blocks_override=num_gpu_blocks_override,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        long_prefill_token_threshold=long_prefill_token_threshold,
        scheduling_policy=scheduling_policy,
        async_scheduling=async_scheduling,
        seed=seed,
        load_format=load_format,
        gguf_weights=gguf_weights,
        cpu_activations=cpu_activations,
        generation_config=generation_config,
        override_generation_config=override_generation_config,
        hf_overrides=hf_overrides,
        rope_scaling=rope_scaling,
        rope_theta=rope_theta,
        max_logprobs=max_logprobs,
        logprobs_mode=logprobs_mode,
        attention_backend=attention_backend,
        cpu_threads=cpu_threads,
        log_step_times=log_step_times,
    )
