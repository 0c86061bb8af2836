"""The command line: `microvllm serve`, `generate`, `chat` and the other commands.

Flags carry the names and defaults of `vllm serve` 0.33. Everything is checked here or in
`EngineArgs.resolve()` before a model is loaded; whatever is wrong is two lines on stderr, the cause and the
remedy. Exit status: 0 done, 1 the engine failed, 2 a flag, a file or the machine does not allow what was
asked.

Nothing heavy is imported at the top, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from microvllm import __version__
from microvllm.openai_compat.argv import UsageError
from microvllm.openai_compat.command import Command, LogHandler, remedy_for, report_error
from microvllm.openai_compat.engine_options import (
    BackendOpt,
    BlockSizeOpt,
    CpuActivationsOpt,
    CpuThreadsOpt,
    DtypeOpt,
    GGUFWeightsOpt,
    IgnoreUnsupportedOpt,
    KVBytesOpt,
    LoadFormatOpt,
    MaxModelLenOpt,
    ModelOpt,
    SeedOpt,
    StepTimesOpt,
    TokenizerOpt,
    check_paths,
    choose_model,
    engine_args,
)
from microvllm.openai_compat.option_groups import takes
from microvllm.openai_compat.progress import ProgressLine
from microvllm.openai_compat.server_options import answer_options, server_options
from microvllm.runtime.errors import ConfigError, MicroVLLMError, RequestError

if TYPE_CHECKING:
    from microvllm.runtime.config import EngineArgs


app = typer.Typer(
    name="microvllm",
    help="A compact LLM inference engine with an OpenAI-compatible server.",
    add_completion=False,
    invoke_without_command=True,
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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-v", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=Command)
@takes(engine_args, answer_options, server_options)
def serve(
    engine: EngineArgs,
    answers: dict[str, Any],
    server: dict[str, Any],
    max_num_queued_reqs: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that may wait; more are answered 503."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A YAML file of options, for those that are not given here."),
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI and vLLM do."""
    # `config` is only here for --help: `Command` has put the file's options into the others.
    from microvllm.runtime.program import EngineProgram

    engine = dataclasses.replace(engine, max_num_queued_reqs=max_num_queued_reqs)
    with EngineProgram(engine.cpu_threads) as program:
        from microvllm.openai_compat.config import ServerArgs
        from microvllm.openai_compat.server import serve as serve_http

        server_args = ServerArgs(**answers, **server)
        with ProgressLine() as progress:
            serve_http(engine, server_args, on_progress=progress, program=program)


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
    gguf_weights: GGUFWeightsOpt = "auto",
    cpu_activations: CpuActivationsOpt = "float32",
    max_model_len: MaxModelLenOpt = None,
    seed: SeedOpt = 0,
    cpu_threads: CpuThreadsOpt = None,
    attention_backend: BackendOpt = "auto",
    block_size: BlockSizeOpt = None,
    kv_cache_memory_bytes: KVBytesOpt = None,
    log_step_times: StepTimesOpt = False,
    ignore_unsupported_flags: IgnoreUnsupportedOpt = False,
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
        "gguf_weights": gguf_weights,
        "cpu_activations": cpu_activations,
        "max_model_len": None if max_model_len == -1 else max_model_len,
        "seed": seed,
        "cpu_threads": cpu_threads,
        "attention_backend": attention_backend,
        "block_size": block_size,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "log_step_times": log_step_times,
    }
    wishes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "stop": stop}
    sampling: dict[str, Any] = {key: value for key, value in wishes.items() if value is not None}
    sampling |= {"max_tokens": max_tokens, "ignore_eos": ignore_eos}
    # The engine checks all this again, but only after torch was imported and the model was loaded.
    EngineArgs(model=name, **options).resolve()
    SamplingParams(**sampling)

    from microvllm import InferenceEngine

    with ProgressLine() as progress:
        engine = InferenceEngine(name, on_progress=progress, **options)
    for _, text in engine.stream_generate(prompt, **sampling):
        print(text, end="", flush=True)
    print()


@app.command(cls=Command)
@takes(engine_args, answer_options)
def run_batch(
    engine: EngineArgs,
    answers: dict[str, Any],
    input_file: Annotated[
        str,
        typer.Option("--input-file", "-i", help="Requests: a file, an http(s) address, or - for stdin."),
    ],
    output_file: Annotated[
        str, typer.Option("--output-file", "-o", help="Answers: a file, or - for stdout.")
    ],
) -> None:
    """Answer a file of requests in the format of OpenAI's batches, without a server.

    A line is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or "/v1/completions",
    "body": {...}}. Answers come in the order of the requests; one that fails has a line that says why.
    """
    from microvllm.openai_compat.batch import run_batch as answer_batch
    from microvllm.openai_compat.config import ServerArgs

    server_args = ServerArgs(**answers)
    with ProgressLine() as progress:
        answer_batch(
            engine,
            server_args,
            input_file,
            output_file,
            on_load=progress,
            on_progress=functools.partial(progress, "Requests"),
        )


# The options of `chat` and `complete`.
UrlOpt = Annotated[str, typer.Option(help="Where the server's OpenAI-compatible interface is.")]
ClientKeyOpt = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="The server's API key.")
]
ModelNameOpt = Annotated[str | None, typer.Option(help="Model to ask; the server's first if not given.")]
QuickOpt = Annotated[
    str | None, typer.Option("--quick", "-q", metavar="TEXT", help="Answer this one text and end.")
]
StatsOpt = Annotated[
    bool, typer.Option("--stats", help="Show time to first token and tokens per second of each answer.")
]
DEFAULT_URL = "http://localhost:8000/v1"


@app.command(cls=Command)
def chat(
    url: UrlOpt = DEFAULT_URL,
    api_key: ClientKeyOpt = None,
    model_name: ModelNameOpt = None,
    system_prompt: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    quick: QuickOpt = None,
    stats: StatsOpt = False,
) -> None:
    """Talk to a model on a running server.

    Each line typed, or piped in, is a message; Ctrl-C ends an answer, Ctrl-D the chat.
    """
    from microvllm.openai_compat import terminal

    remote = terminal.Remote.connect(url, api_key, model_name, stats)
    terminal.chat(remote, system_prompt=system_prompt, quick=quick)


@app.command(cls=Command)
def complete(
    url: UrlOpt = DEFAULT_URL,
    api_key: ClientKeyOpt = None,
    model_name: ModelNameOpt = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate; the server's default if not given.")
    ] = None,
    quick: QuickOpt = None,
    stats: StatsOpt = False,
) -> None:
    """Continue texts with a model on a running server.

    Each line typed, or piped in, is a text to go on from.
    """
    from microvllm.openai_compat import terminal

    remote = terminal.Remote.connect(url, api_key, model_name, stats)
    terminal.complete(remote, max_tokens=max_tokens, quick=quick)


@app.command(cls=Command)
def collect_env() -> None:
    """Print what a bug report needs: versions, processor, memory, GPU, settings. Secrets are left out."""
    from microvllm.runtime.environment import report

    print(report())


def main() -> NoReturn:
    """The console script: runs the command and turns every deliberate error into two lines."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    commands = typer.main.get_command(app)
    logger = logging.getLogger("microvllm")
    handler = LogHandler()
    logger.addHandler(handler)
    failure: Exception
    try:
        # Typer gives back the code of typer.Exit, or what the command returned, which is None.
        return int(commands.main(list(argv), prog_name="microvllm", standalone_mode=False) or 0)
    except typer.TyperException as error:
        message, failure, code = error.format_message(), error, 2
    except MicroVLLMError as error:
        message, failure = str(error), error
        code = 2 if isinstance(error, (ConfigError, RequestError)) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of a pipe left (`| head`). Python's flush at exit would report it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        logger.removeHandler(handler)
    report_error(message, remedy_for(failure, message, commands, argv))
    return code


if __name__ == "__main__":
    main()
