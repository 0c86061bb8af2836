"""Defines the command line: `microvllm serve`, `generate`, `chat` and the other commands.

Flags carry the names and defaults of `vllm serve` 0.33. Everything is checked here or in
`EngineArgs.resolve()` before a model is loaded; whatever is wrong is two lines on stderr, the cause and the
remedy. Exit status: 0 done, 1 the engine failed, 2 a flag, a file or the machine does not allow what was
asked, 130 Ctrl-C, 141 the reader of stdout is gone (`| head`), which says nothing.

Nothing heavy is imported at the top, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from microvllm import __version__
from microvllm.openai_compat.bench.options import BenchArgs
from microvllm.openai_compat.config import AnswerArgs, ServerArgs
from microvllm.openai_compat.flags.argv import UsageError
from microvllm.openai_compat.flags.command import Command, LogHandler, remedy_for, report_error, warn
from microvllm.openai_compat.flags.options import Fields, with_options
from microvllm.openai_compat.flags.progress import ProgressLine
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError, MicroVLLMError, RequestError, reason_of
from microvllm.runtime.options.find_model import user_path
from microvllm.runtime.options.flag import ACCESS, ANSWERS, OPTIONS, SERVER, check_flags, flag
from microvllm.runtime.options.vllm_environment import is_on, unknown_variables

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
    """Print the help if no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


# Options of the commands that load a model, beside those of the engine.
ModelArg = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Same as --model.")]
IgnoreUnsupportedOpt = Annotated[
    bool,
    typer.Option(
        help="Start without the flags of vllm serve that would change what is served and do not exist here."
    ),
]
FailOnEnvironOpt = Annotated[
    bool,
    typer.Option(help="Do not start with a VLLM_ variable in the environment that vLLM does not know."),
]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
QUEUE_OPTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", "queue_timeout", "request_timeout")


def checked(
    engine: EngineArgs, positional: Sequence[str] | None, known_environment: bool = False
) -> EngineArgs:
    """Return the engine's options with the model that is named in the arguments or in `--model`.

    Raises `UsageError` and `ConfigError` for what can be found out without reading the model.
    """
    if known_environment and (unknown := unknown_variables(os.environ)):
        raise UsageError(f"--fail-on-environ-validation: vLLM does not know {', '.join(unknown)}")
    models = list(positional or ())
    if len(models) > 1:
        raise UsageError(f"two models were given: {models[0]} and {models[1]}")
    if models and engine.model is not None and models[0] != engine.model:
        raise UsageError(f"two models were given: {models[0]} and --model {engine.model}")
    model = models[0] if models else engine.model
    if not model:
        raise UsageError(
            "no model was given", remedy="name one: --model DIR, a .gguf file, or smollm2-135m-instruct"
        )
    if engine.tokenizer is not None:
        user_path(engine.tokenizer, "--tokenizer")
    user_path(engine.generation_config, "--generation-config")
    check_flags(engine)
    return dataclasses.replace(engine, model=model)


@app.command(cls=Command)
@with_options
def serve(
    engine: EngineArgs,
    server: ServerArgs,
    model_arg: ModelArg = None,
    ignore_unsupported_flags: IgnoreUnsupportedOpt = False,
    fail_on_environ_validation: FailOnEnvironOpt = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A YAML file of options, for those that are not given here."),
    ] = None,
) -> None:
    """Serve a model over HTTP as OpenAI and vLLM do."""
    # `ignore_unsupported_flags` and `config` are only here for --help: `Command` has dealt with both.
    engine = checked(engine, model_arg, fail_on_environ_validation)
    server = dataclasses.replace(server, dev_mode=is_on("VLLM_SERVER_DEV_MODE"))

    from microvllm.runtime.process.spawn import SpawnedEngine

    with SpawnedEngine(engine.cpu_threads) as spawned:
        from microvllm.openai_compat.server import serve as serve_http

        with ProgressLine() as progress:
            serve_http(engine, server, on_progress=progress, spawned=spawned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """Sampling options of `generate`; None is the model's own default."""

    max_tokens: int = flag(100, ANSWERS, "Most tokens to generate.", low=1)
    temperature: float | None = flag(None, ANSWERS, "0 always takes the likeliest token.")
    top_k: int | None = flag(None, ANSWERS, "Keep the k likeliest tokens; 0: all.")
    top_p: float | None = flag(None, ANSWERS, "Keep the likeliest tokens up to this share.")
    min_p: float | None = flag(None, ANSWERS, "Drop tokens below this share of the likeliest.")
    stop: tuple[str, ...] = flag((), ANSWERS, "Texts to stop at.")
    ignore_eos: bool = flag(False, ANSWERS, "Go on after the end token.", spelled=("--ignore-eos",))


@app.command(cls=Command)
@with_options
def generate(
    engine: Annotated[
        EngineArgs,
        Fields(
            only=(
                *("model", "tokenizer", "dtype", "load_format", "gguf_weights", "cpu_activations"),
                *("max_model_len", "seed", "cpu_threads", "attention_backend", "block_size"),
                *("kv_cache_memory_bytes", "log_step_times"),
            )
        ),
    ],
    sampling: SamplingArgs,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    ignore_unsupported_flags: IgnoreUnsupportedOpt = False,
) -> None:
    """Continue a text in the terminal, without a server.

    Sampling options that are not given are the model's own defaults.
    """
    engine = checked(engine, None)
    if not prompt:
        raise UsageError("the prompt is empty")

    from microvllm.runtime.request import SamplingParams
    from microvllm.runtime.sampling_checks import check_sampling

    wanted = {name: value for name, value in vars(sampling).items() if value is not None}
    wanted["stop"] = list(sampling.stop)
    # The engine checks all this again, but only after torch was imported.
    engine.resolve()
    check_sampling(SamplingParams(**wanted))

    from microvllm import InferenceEngine

    options = vars(engine).copy()
    with ProgressLine() as progress:
        loaded = InferenceEngine(options.pop("model"), on_progress=progress, **options)
    for _, text in loaded.stream_generate(prompt, **wanted):
        print(text, end="", flush=True)
    print()


@app.command(cls=Command)
@with_options
def run_batch(
    engine: Annotated[EngineArgs, Fields(without=QUEUE_OPTIONS)],
    answers: AnswerArgs,
    *,
    model_arg: ModelArg = None,
    ignore_unsupported_flags: IgnoreUnsupportedOpt = False,
    fail_on_environ_validation: FailOnEnvironOpt = False,
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
    host: Annotated[
        str | None,
        typer.Option(help="Address of the metrics; 127.0.0.1 if not given.", rich_help_panel=SERVER),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Their port; 8000 if not given.", rich_help_panel=SERVER),
    ] = None,
    url: Annotated[str | None, typer.Option(help="The older name of --host.")] = None,
) -> None:
    """Answer a file of requests, without a server.

    The format is that of OpenAI's batches. A line is {"custom_id": ..., "method": "POST",
    "url": "/v1/chat/completions" or "/v1/completions", "body": {...}}. Answers come in the order of the
    requests; one that fails has a line that says why. A line that is no request ends the run before the
    model loads.
    """
    engine = checked(engine, model_arg, fail_on_environ_validation)

    from microvllm.openai_compat.batch import run_batch as answer_batch

    listening = {"--host": host, "--port": port, "--url": url}
    given = next((name for name, value in listening.items() if value is not None), None)
    if given is not None and not enable_metrics:
        warn(f"{given} has no effect without --enable-metrics")
    server_args = ServerArgs(**vars(answers), host=host or url or "127.0.0.1", port=port or 8000)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientArgs:
    """Options of `chat` and `complete`: the server, the model there, and limits of its answers."""

    url: str = flag(
        "http://localhost:8000/v1",
        OPTIONS,
        "Where the server's OpenAI-compatible interface is.",
        env=("OPENAI_BASE_URL",),
    )
    api_key: str | None = flag(None, ACCESS, "The server's API key.", env=("OPENAI_API_KEY",))
    model_name: str | None = flag(None, OPTIONS, "Model to ask; the server's first if not given.")
    system_prompt: str | None = flag(None, OPTIONS, "The system message.")
    max_tokens: int | None = flag(
        None, ANSWERS, "Most tokens of an answer; the server's default if not given.", low=1
    )
    temperature: float | None = flag(
        None,
        ANSWERS,
        "0 always takes the likeliest token; the server's default if not given.",
        low=0,
        high=2,
    )
    quick: str | None = flag(None, OPTIONS, "The same as TEXT.", metavar="TEXT", spelled=("--quick", "-q"))
    stats: bool = flag(
        False, OPTIONS, "Show time to first token and tokens per second of each answer.", spelled=("--stats",)
    )

    def one_text(self, argument: str | None) -> str | None:
        """Return the one text to answer, None for a session. Raises `UsageError` for two."""
        if argument is not None and self.quick is not None:
            raise UsageError(
                "two texts were given, one with --quick", remedy="give one text, with or without --quick"
            )
        return self.quick if argument is None else argument

    def limits(self) -> dict[str, Any]:
        """Return fields for each request."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature}


TextArg = Annotated[str | None, typer.Argument(metavar="TEXT", help="Answer this one text and end.")]


@app.command(cls=Command)
@with_options
def chat(client: ClientArgs, text: TextArg = None) -> None:
    """Talk to a model on a running server.

    Without TEXT each line typed, or piped in, is a message; Ctrl-C ends an answer, Ctrl-D the chat.
    """
    from microvllm.openai_compat.flags import terminal

    remote = terminal.Remote.connect(client.url, client.api_key, client.model_name, client.stats)
    quick = client.one_text(text)
    terminal.chat(remote, client.limits(), system_prompt=client.system_prompt, quick=quick)


@app.command(cls=Command)
@with_options
def complete(client: Annotated[ClientArgs, Fields(without=("system_prompt",))], text: TextArg = None) -> None:
    """Continue texts with a model on a running server.

    Without TEXT each line typed, or piped in, is a text to go on from.
    """
    from microvllm.openai_compat.flags import terminal

    remote = terminal.Remote.connect(client.url, client.api_key, client.model_name, client.stats)
    terminal.complete(remote, client.limits(), quick=client.one_text(text))


bench = typer.Typer(help="Measure a running server.", invoke_without_command=True)
app.add_typer(bench, name="bench")


@bench.callback()
def bench_root(context: typer.Context) -> None:
    """Print the help if no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command("serve", cls=Command)
@with_options
def bench_serve(args: BenchArgs) -> None:
    """Send random requests to a running server and report throughput and latency.

    The flags, the report and the result file are those of `vllm bench serve`. Exit status 1: a request did
    not give exactly the tokens it was asked for. The key of a server that wants one is read from
    OPENAI_API_KEY.
    """
    from microvllm.openai_compat.bench.run import run as measure_server

    raise typer.Exit(measure_server(args))


@app.command(cls=Command)
def collect_env() -> None:
    """Print what a bug report needs, secrets left out.

    That is versions, processor, memory, GPU, and settings.
    """
    from microvllm.runtime.collect_env import report

    print(report())


def main() -> NoReturn:
    """Run the command of the console script; every deliberate error becomes two lines."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file or socket would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    logger = logging.getLogger("microvllm")
    handler = LogHandler()
    logger.addHandler(handler)
    logger.getChild("config").setLevel(logging.INFO)  # what the options come to
    failure: Exception
    try:
        # Typer returns the code of typer.Exit, or what the command returned, which is None.
        commands = typer.main.get_command(app)
        status = int(commands.main(list(argv), prog_name="microvllm", standalone_mode=False) or 0)
        sys.stdout.flush()  # here, as what fails at the interpreter's exit is a traceback
        return status
    except typer.TyperException as error:
        message, failure, code = error.format_message(), error, 2
    except MicroVLLMError as error:
        message, failure = str(error), error
        code = 2 if isinstance(error, (ConfigError, RequestError)) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _drop_output()  # Typer makes an exit of it
    except BrokenPipeError:
        return _drop_output()
    except ImportError as error:
        if (error.name or "microvllm").startswith("microvllm"):
            raise
        message, code = f"{error.name} cannot be loaded: {reason_of(error)}", 1
        failure = ConfigError(message, remedy="install the package again, and see `ulimit -v` for its memory")
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_output()
        message, code = f"the output cannot be written: {reason_of(error)}", 2
        failure = ConfigError(message, remedy="write it where there is room")
    finally:
        logger.removeHandler(handler)
    report_error(message, remedy_for(failure, message, commands, argv))
    return code


def _drop_output() -> int:
    """Have Python's flush at exit not fail once more; returns a shell's status for SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # `main` has seen to it that this is stdout
    return 128 + signal.SIGPIPE


if __name__ == "__main__":
    main()
