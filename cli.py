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
from microvllm.openai_compat.bench.options import BenchArgs, bench_args
from microvllm.openai_compat.flags.argv import UsageError
from microvllm.openai_compat.flags.command import Command, LogHandler, remedy_for, report_error, warn
from microvllm.openai_compat.flags.engine_options import (
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
from microvllm.openai_compat.flags.option_groups import takes
from microvllm.openai_compat.flags.option_values import human_int, queue_length
from microvllm.openai_compat.flags.progress import ProgressLine
from microvllm.openai_compat.flags.server_options import answer_options, server_options
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
        Any,
        typer.Option(
            parser=queue_length,
            metavar="N|auto",
            help="Requests that may wait (16384); more are answered 503. auto: those that will be begun "
            "within --queue-timeout.",
        ),
    ] = None,
    max_num_queued_tokens: Annotated[
        Any, typer.Option(parser=human_int, metavar="N", help="Prompt tokens that may wait (16M).")
    ] = None,
    queue_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a request may wait until it is begun; 0: no limit.")
    ] = 0.0,
    request_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a request may take in all; 0: no limit.")
    ] = 0.0,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A YAML file of options, for those that are not given here."),
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI and vLLM do."""
    # `config` is only here for --help: `Command` has put the file's options into the others.
    from microvllm.runtime.process.spawn import SpawnedEngine

    engine = dataclasses.replace(
        engine,
        max_num_queued_reqs=max_num_queued_reqs,
        max_num_queued_tokens=max_num_queued_tokens,
        queue_timeout=queue_timeout,
        request_timeout=request_timeout,
    )
    with SpawnedEngine(engine.cpu_threads) as spawned:
        from microvllm.openai_compat.config import ServerArgs
        from microvllm.openai_compat.server import serve as serve_http

        server_args = ServerArgs(**answers, **server)
        with ProgressLine() as progress:
            serve_http(engine, server_args, on_progress=progress, spawned=spawned)


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
    from microvllm.runtime.request import SamplingParams, check_sampling

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
    check_sampling(SamplingParams(**sampling))

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
        str,
        typer.Option(
            "--output-file", "-o", help="Answers: a file, an http(s) address (with PUT), or - for stdout."
        ),
    ],
    output_tmp_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where what comes from or goes to an address is kept meanwhile."),
    ] = None,
    max_inflight: Annotated[
        int | None,
        typer.Option(min=1, help="Requests with the engine at a time; a few more than run if not given."),
    ] = None,
    enable_metrics: Annotated[
        bool, typer.Option("--enable-metrics", help="Serve the metrics for Prometheus meanwhile.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address of the metrics; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Their port; 8000 if not given.")] = None,
    url: Annotated[str | None, typer.Option(help="The older name of --host.")] = None,
) -> None:
    """Answer a file of requests in the format of OpenAI's batches, without a server.

    A line is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions" or "/v1/completions",
    "body": {...}}. Answers come in the order of the requests; one that fails has a line that says why. A
    line that is no request ends the run before the model loads.
    """
    from microvllm.openai_compat.batch import run_batch as answer_batch
    from microvllm.openai_compat.config import ServerArgs

    listening = {"--host": host, "--port": port, "--url": url}
    given = next((flag for flag, value in listening.items() if value is not None), None)
    if given is not None and not enable_metrics:
        warn(f"{given} has no effect without --enable-metrics")
    server_args = ServerArgs(**answers, host=host or url or "127.0.0.1", port=port or 8000)
    with ProgressLine() as progress:
        answer_batch(
            engine,
            server_args,
            input_file,
            output_file,
            tmp_dir=output_tmp_dir,
            max_inflight=max_inflight,
            enable_metrics=enable_metrics,
            on_load=progress,
            on_progress=functools.partial(progress, "Requests"),
        )


# The options of `chat` and `complete`.
TextArg = Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Answer this one text and end.")]
UrlOpt = Annotated[
    str,
    typer.Option(
        envvar="OPENAI_BASE_URL",
        show_envvar=True,
        help="Where the server's OpenAI-compatible interface is.",
    ),
]
ClientKeyOpt = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="The server's API key.")
]
ModelNameOpt = Annotated[str | None, typer.Option(help="Model to ask; the server's first if not given.")]
QuickOpt = Annotated[str | None, typer.Option("--quick", "-q", metavar="TEXT", help="The same as TEXT.")]
MaxTokensOpt = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of an answer; the server's default if not given.")
]
TemperatureOpt = Annotated[
    float | None,
    typer.Option(min=0, max=2, help="0 always takes the likeliest token; the server's default if not given."),
]
StatsOpt = Annotated[
    bool, typer.Option("--stats", help="Show time to first token and tokens per second of each answer.")
]
DEFAULT_URL = "http://localhost:8000/v1"


def one_text(text: str | None, quick: str | None) -> str | None:
    """The one text to answer, None for a session. Raises `UsageError` for two."""
    if text is not None and quick is not None:
        raise UsageError(
            "two texts were given, one with --quick", remedy="give one text, with or without --quick"
        )
    return quick if text is None else text


@app.command(cls=Command)
def chat(
    text: TextArg = None,
    url: UrlOpt = DEFAULT_URL,
    api_key: ClientKeyOpt = None,
    model_name: ModelNameOpt = None,
    system_prompt: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: MaxTokensOpt = None,
    temperature: TemperatureOpt = None,
    quick: QuickOpt = None,
    stats: StatsOpt = False,
) -> None:
    """Talk to a model on a running server.

    Without TEXT each line typed, or piped in, is a message; Ctrl-C ends an answer, Ctrl-D the chat.
    """
    from microvllm.openai_compat.flags import terminal

    remote = terminal.Remote.connect(url, api_key, model_name, stats)
    limits = {"max_tokens": max_tokens, "temperature": temperature}
    terminal.chat(remote, limits, system_prompt=system_prompt, quick=one_text(text, quick))


@app.command(cls=Command)
def complete(
    text: TextArg = None,
    url: UrlOpt = DEFAULT_URL,
    api_key: ClientKeyOpt = None,
    model_name: ModelNameOpt = None,
    max_tokens: MaxTokensOpt = None,
    temperature: TemperatureOpt = None,
    quick: QuickOpt = None,
    stats: StatsOpt = False,
) -> None:
    """Continue texts with a model on a running server.

    Without TEXT each line typed, or piped in, is a text to go on from.
    """
    from microvllm.openai_compat.flags import terminal

    remote = terminal.Remote.connect(url, api_key, model_name, stats)
    limits = {"max_tokens": max_tokens, "temperature": temperature}
    terminal.complete(remote, limits, quick=one_text(text, quick))


bench = typer.Typer(help="Measure a running server.", invoke_without_command=True)
app.add_typer(bench, name="bench")


@bench.callback()
def bench_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command("serve", cls=Command)
@takes(bench_args)
def bench_serve(args: BenchArgs) -> None:
    """Send random requests to a running server and report throughput and latency.

    The flags, the report and the result file are those of `vllm bench serve`. Exit status 1: a request did
    not give exactly the tokens it was asked for.
    """
    from microvllm.openai_compat.bench.run import run as measure_server

    raise typer.Exit(measure_server(args))


@app.command(cls=Command)
def collect_env() -> None:
    """Print what a bug report needs: versions, processor, memory, GPU, settings. Secrets are left out."""
    from microvllm.runtime.collect_env import report

    print(report())


def main() -> NoReturn:
    """The console script: runs the command and turns every deliberate error into two lines."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file or socket would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    logger = logging.getLogger("microvllm")
    handler = LogHandler()
    logger.addHandler(handler)
    failure: Exception
    try:
        # Typer gives back the code of typer.Exit, or what the command returned, which is None.
        commands = typer.main.get_command(app)
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
