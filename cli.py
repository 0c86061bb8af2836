"""The command line: `microvllm serve` and `microvllm generate`.

Flags carry the names and defaults of `vllm serve` 0.33. Everything is checked here or in
`EngineArgs.resolve()` before a model is loaded; whatever is wrong is one line on stderr. Exit status:
0 done, 1 the engine failed, 2 a flag, a file or the machine does not allow what was asked.

Nothing heavy is imported at the top, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from microvllm import __version__
from microvllm.openai_compat.vllm_flags import UsageError, normalise_argv
from microvllm.runtime.cpu import usable_cores
from microvllm.runtime.errors import ConfigError, MicroVLLMError, RequestError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Command(TyperCommand):
    """A Typer command that reads its flags the way `vllm serve` does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help": "switch", "-h": "switch"}
        for param in self.params:
            switch = getattr(param, "is_flag", False)
            kind = "switch" if switch else "list" if getattr(param, "multiple", False) else "value"
            own |= {name: kind for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
        return super().parse_args(ctx, normalise_argv(args, own, warn))


def warn(message: str) -> None:
    """One warning line on stderr."""
    print(f"microvllm: warning: {message}", file=sys.stderr)


DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def human_int(text: str) -> int:
    """`4096`, `1k` = 1000, `25.6k` = 25600, `1K` = 1024: as vLLM reads sizes. Raises `typer.BadParameter`."""
    match = re.fullmatch(r"([+-]?\d+)(\.\d+)?([kKmMgGtT]?)", str(text).strip())
    if match is None or (match[2] and match[3] not in DECIMAL):
        raise typer.BadParameter(
            f"{text!r} is not a whole number (1k = 1000 and 1K = 1024 are understood, 25.6k too)"
        )
    whole, fraction, suffix = match[1], match[2] or "", match[3]
    if suffix not in DECIMAL:
        return int(whole) * BINARY.get(suffix, 1)
    # Digits are shifted, not multiplied as floats: 25.6k must be 25600 and not 25599.
    factor = DECIMAL[suffix]
    parts: int = 10 ** len(fraction[1:])
    scaled = int(whole + fraction[1:]) * factor
    if scaled % parts:
        raise typer.BadParameter(f"{text!r} is not a whole number")
    return scaled // parts


def context_length(text: str) -> int:
    """Like `human_int`; `auto` and -1 (as long as the model and the KV cache allow) give -1."""
    return -1 if str(text).strip().lower() == "auto" else human_int(text)


def chat_template_text(wish: str | None) -> str | None:
    """The text of `--chat-template`, which is a file or the template itself. Raises `ConfigError`."""
    if wish is None:
        return None
    try:
        return Path(wish).read_text("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        if any(mark in wish for mark in "{}\n"):
            return wish
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        shown = wish if len(wish) <= 200 else wish[:200] + "..."
        raise ConfigError(f"--chat-template {shown!r}: {reason}, and it is no template either") from error


def check_paths(tokenizer: str | None, generation_config: str = "auto") -> None:
    """Raises `ConfigError` for paths that no file system takes, under the names of their flags."""
    from microvllm.runtime.models import user_path

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
        raise UsageError("no model was given: --model DIR, a .gguf file, or smollm2-135m-instruct")
    return model


class LoadProgress:
    """Shows how much of the weights is loaded: a bar on a terminal, a plain line each quarter elsewhere.

    Call it with (done, total). Writes to stderr.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._quarter = 0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("Loading weights"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # gives the cursor back, also after Ctrl-C

    def __call__(self, done: int, total: int) -> None:
        if total < 1:
            return
        if self._bar is None:
            quarter = 4 * done // total
            if quarter > self._quarter:
                self._quarter = quarter
                print(f"Loading weights: {25 * quarter} %", file=sys.stderr, flush=True)
            return
        if self._task is None:
            self._task = self._bar.add_task("load", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self._bar.stop()


app = typer.Typer(
    name="microvllm",
    help="A compact LLM inference engine with an OpenAI-compatible server.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich cuts long flags short in 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"microvllm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-v", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


# The options of both commands.
ModelArg = Annotated[list[str] | None, typer.Argument(metavar="[MODEL]", help="Same as --model.")]
ModelOpt = Annotated[
    str | None,
    typer.Option("--model", help="A model folder, a .gguf file, or smollm2-135m-instruct."),
]
TokenizerOpt = Annotated[
    str | None,
    typer.Option(help="Folder or .gguf file of the tokenizer, if not the model's."),
]
DtypeOpt = Annotated[str, typer.Option(help="auto, float32 (float) or bfloat16.")]
LoadFormatOpt = Annotated[
    str,
    typer.Option(help="auto, safetensors, gguf, or dummy (random weights)."),
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
    typer.Option(min=1, max=usable_cores(), help="Threads to compute with; all cores if not given."),
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


@app.command(cls=Command)
def serve(
    model_arg: ModelArg = None,
    model: ModelOpt = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Names of the model in requests; the first is answered."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    uds: Annotated[
        str | None,
        typer.Option(help="Unix socket to listen on, in place of host and port."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=["MICROVLLM_API_KEY", "VLLM_API_KEY"],
            show_envvar=True,
            help="Keys, one of which each request must carry.",
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A file with a chat template, or the template."),
    ] = None,
    uvicorn_log_level: Annotated[
        str,
        typer.Option(help="critical, error, warning, info, debug or trace."),
    ] = "info",
    disable_uvicorn_access_log: Annotated[
        bool,
        typer.Option(
            "--disable-uvicorn-access-log/--no-disable-uvicorn-access-log", help="No line per request."
        ),
    ] = False,
    disable_log_stats: Annotated[
        bool,
        typer.Option("--disable-log-stats", help="No line of statistics every 10 s."),
    ] = False,
    shutdown_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that running requests get to finish after SIGTERM."),
    ] = 10.0,
    response_role: Annotated[str, typer.Option(help="Role of the answers in chats.")] = "assistant",
    enable_prompt_tokens_details: Annotated[
        bool,
        typer.Option(
            "--enable-prompt-tokens-details/--no-enable-prompt-tokens-details",
            help="Report cached tokens in the usage.",
        ),
    ] = False,
    enable_force_include_usage: Annotated[
        bool,
        typer.Option(
            "--enable-force-include-usage/--no-enable-force-include-usage",
            help="End every stream with its usage.",
        ),
    ] = False,
    tokenizer: TokenizerOpt = None,
    dtype: DtypeOpt = "auto",
    load_format: LoadFormatOpt = "auto",
    generation_config: GenerationConfigOpt = "auto",
    max_model_len: MaxModelLenOpt = None,
    seed: SeedOpt = 0,
    cpu_threads: CpuThreadsOpt = None,
    attention_backend: BackendOpt = "auto",
    block_size: BlockSizeOpt = None,
    kv_cache_memory_bytes: KVBytesOpt = None,
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
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority.")] = "fcfs",
    async_scheduling: Annotated[
        bool,
        typer.Option(
            "--async-scheduling/--no-async-scheduling", help="Plan the next step while this one computes."
        ),
    ] = False,
    max_num_queued_reqs: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that may wait; more are answered 503."),
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI and vLLM do."""
    name = choose_model(model_arg or (), model)
    template = chat_template_text(chat_template)
    check_paths(tokenizer, generation_config)

    from microvllm.openai_compat.config import ServerArgs
    from microvllm.openai_compat.server import serve as serve_http
    from microvllm.runtime.config import EngineArgs

    engine_args = EngineArgs(
        model=name,
        tokenizer=tokenizer,
        dtype=dtype,
        max_model_len=None if max_model_len == -1 else max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_gpu_blocks_override=num_gpu_blocks_override,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        long_prefill_token_threshold=long_prefill_token_threshold,
        scheduling_policy=scheduling_policy,
        async_scheduling=async_scheduling,
        max_num_queued_reqs=max_num_queued_reqs,
        seed=seed,
        load_format=load_format,
        generation_config=generation_config,
        attention_backend=attention_backend,
        cpu_threads=cpu_threads,
    )
    server_args = ServerArgs(
        host=host,
        port=port,
        uds=uds,
        served_model_names=tuple(served_model_name or []),
        api_keys=tuple(api_key or []),
        chat_template=template,
        uvicorn_log_level=uvicorn_log_level,
        disable_uvicorn_access_log=disable_uvicorn_access_log,
        disable_log_stats=disable_log_stats,
        shutdown_timeout=shutdown_timeout,
        response_role=response_role,
        enable_prompt_tokens_details=enable_prompt_tokens_details,
        enable_force_include_usage=enable_force_include_usage,
    )
    with LoadProgress() as progress:
        serve_http(engine_args, server_args, on_progress=progress)


@app.command(cls=Command)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    model: ModelOpt = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 100,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this share.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Texts to stop at.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    tokenizer: TokenizerOpt = None,
    dtype: DtypeOpt = "auto",
    load_format: LoadFormatOpt = "auto",
    max_model_len: MaxModelLenOpt = None,
    seed: SeedOpt = 0,
    cpu_threads: CpuThreadsOpt = None,
    attention_backend: BackendOpt = "auto",
    block_size: BlockSizeOpt = None,
    kv_cache_memory_bytes: KVBytesOpt = None,
) -> None:
    """Continue a text in the terminal, without a server.

    Sampling options that are not given are the model's own defaults.
    """
    name = choose_model((), model)
    if not prompt:
        raise UsageError("the prompt is empty")
    check_paths(tokenizer)

    from microvllm.runtime.config import EngineArgs
    from microvllm.runtime.request import SamplingParams

    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "dtype": dtype,
        "load_format": load_format,
        "max_model_len": None if max_model_len == -1 else max_model_len,
        "seed": seed,
        "cpu_threads": cpu_threads,
        "attention_backend": attention_backend,
        "block_size": block_size,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
    }
    wishes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "stop": stop}
    sampling: dict[str, Any] = {key: value for key, value in wishes.items() if value is not None}
    sampling |= {"max_tokens": max_tokens, "ignore_eos": ignore_eos}
    # The engine checks all this again, but only after torch was imported and the model was loaded.
    EngineArgs(model=name, **options).resolve()
    SamplingParams(**sampling)

    from microvllm import InferenceEngine

    with LoadProgress() as progress:
        engine = InferenceEngine(name, on_progress=progress, **options)
    for _, text in engine.stream_generate(prompt, **sampling):
        print(text, end="", flush=True)
    print()


def main() -> NoReturn:
    """The console script: runs the command and turns every deliberate error into one line."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    try:
        # Typer gives back the code of typer.Exit, or what the command returned, which is None.
        return int(app(list(argv), prog_name="microvllm", standalone_mode=False) or 0)
    except typer.TyperException as error:
        # Typer's own message may have several lines (a missing argument lists choices).
        message, code = " ".join(error.format_message().split()), 2
    except (ConfigError, RequestError) as error:
        message, code = str(error), 2
    except MicroVLLMError as error:
        message, code = str(error), 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of a pipe left (`| head`). Python's flush at exit would report it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"microvllm: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
