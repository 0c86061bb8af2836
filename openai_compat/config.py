"""Declares the options of the HTTP server; the engine's own are in `runtime/config.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from microvllm.runtime.errors import ConfigError, reason_of
from microvllm.runtime.options.flag import (
    ACCESS,
    ANSWERS,
    LOGS,
    OBJECT,
    SERVER,
    check_flags,
    flag,
    human_int,
    json_object,
    json_value,
    shortened,
)
from microvllm.runtime.worker.profiler import ProfilerConfig

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
QUIET_PATHS = ("/health", "/metrics", "/load")  # polled by probes
DEFAULT_STOP_STRINGS = 4
AUTO = "auto"
TEXT = "<str>"  # the metavar of a text that is read further
STRINGS = "[JSON]"


def json_strings(text: str) -> tuple[str, ...]:
    """Read a JSON list of strings, such as `["https://example.com"]`."""
    value = json_value(text)
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{shortened(text)} is not a JSON list of strings")
    return tuple(value)


def comma_list(text: str) -> tuple[str, ...]:
    """Read `a,b` as ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def path_prefix(text: str) -> str:
    """Read a path without the slashes at its end."""
    return text.rstrip("/")


def log_level(text: str) -> str:
    """Read a level as Python's logging does: in any case, and with its other names of two."""
    return {"warn": "warning", "fatal": "critical"}.get(text.lower(), text.lower())


def profiler_config(text: str) -> ProfilerConfig | None:
    """Read a JSON object of vLLM's profiler options; None without a profiler. Raises `ConfigError`."""
    return ProfilerConfig.read(json_object(text))


def chat_template_text(text: str) -> str:
    """Return the text of a chat template, which is in a file or given itself. Raises `ConfigError`."""
    try:
        return Path(text).read_text("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        if any(mark in text for mark in "{}\n"):
            return text
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"--chat-template {shortened(text)}: {reason}, and it is no template either"
        ) from error


def keys_of(path: str) -> tuple[str, ...]:
    """Return the API keys in a file, one per line. Raises `ConfigError`."""
    try:
        keys = tuple(line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {path}: {reason_of(error)}") from error
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key")
    return keys


@dataclass(frozen=True, kw_only=True)
class AnswerArgs:
    """Options that shape the answers of a server, and of a batch; names as in `vllm serve`.

    Raises `ConfigError` with one line that names the option.
    """

    served_model_names: tuple[str, ...] = flag(
        (), ANSWERS, "Names of the model in requests; the first is answered.", name="served-model-name"
    )
    chat_template: str | None = flag(
        None, ANSWERS, "A file with a chat template, or the template.", metavar=TEXT, read=chat_template_text
    )
    chat_template_content_format: str = flag(
        "auto",
        ANSWERS,
        "What the template gets as content: string, openai (parts), or auto.",
        choices=("auto", "string", "openai"),
    )
    default_chat_template_kwargs: Mapping[str, bool | str] = flag(
        {}, ANSWERS, "Template variables of requests without them."
    )
    reasoning_effort_map: Mapping[str, str] = flag(
        {}, ANSWERS, "What the template gets for a request's reasoning effort."
    )
    response_role: str = flag("assistant", ANSWERS, "Role of the answers in chats.")
    max_stop_strings: int = flag(
        DEFAULT_STOP_STRINGS,
        ANSWERS,
        "Stop strings that a request may have.",
        low=1,
        env=("VLLM_MAX_STOP_STRINGS",),
    )
    skip_model_name_validation: bool = flag(
        False, SERVER, "Take any model name in requests.", env=("VLLM_SKIP_MODEL_NAME_VALIDATION",)
    )
    enable_auto_tool_choice: bool = flag(True, ANSWERS, "Let the model decide whether to call a tool.")
    tool_call_parser: str | None = flag(
        "auto",
        ANSWERS,
        "Format of the model's tool calls: hermes, llama3_json, ...; auto: its template's.",
    )
    reasoning_parser: str | None = flag(
        None,
        ANSWERS,
        "Format of the model's reasoning, to separate it from the answer: qwen3, ... or auto.",
    )
    exclude_tools_when_tool_choice_none: bool = flag(
        False, ANSWERS, "Keep tools from the template where none may be called."
    )
    return_tokens_as_token_ids: bool = flag(
        False, ANSWERS, "Write tokens of log probabilities as token_id:N."
    )
    enable_prompt_tokens_details: bool = flag(False, ANSWERS, "Report cached tokens in the usage.")
    enable_per_request_metrics: bool = flag(False, ANSWERS, "Report the times of a request in its answer.")
    fingerprint_mode: str = flag(
        "full",
        ANSWERS,
        "The system_fingerprint of answers: full, hash, custom or none.",
        choices=("full", "hash", "custom", "none"),
    )
    fingerprint_value: str | None = flag(None, ANSWERS, "The fingerprint, if custom.")
    enable_log_requests: bool = flag(False, LOGS, "Log the parameters of each request, never its text.")

    def __post_init__(self) -> None:
        check_flags(self)
        if not self.response_role:
            raise ConfigError("--response-role must not be empty")
        if (self.fingerprint_mode == "custom") != (self.fingerprint_value is not None):
            raise ConfigError("--fingerprint-mode custom and --fingerprint-value belong together")
        self._check_parsers()
        self._check_request_defaults()

    def _check_parsers(self) -> None:
        if self.tool_call_parser == AUTO and self.reasoning_parser in (None, AUTO):
            return  # spares the imports
        from microvllm.openai_compat.parsers.registry import REASONING_FORMATS, TOOL_FORMATS

        for name, value, known in (
            ("tool-call-parser", self.tool_call_parser, TOOL_FORMATS),
            ("reasoning-parser", self.reasoning_parser, REASONING_FORMATS),
        ):
            if value not in (None, AUTO, *known):
                raise ConfigError(
                    f"--{name} must be one of {', '.join(sorted(known))} or {AUTO}, got {value}"
                )

    def _check_request_defaults(self) -> None:
        """Check the options that are defaults or limits of request fields, by the rules of those fields."""
        if not (
            self.default_chat_template_kwargs
            or self.reasoning_effort_map
            or self.max_stop_strings > DEFAULT_STOP_STRINGS
        ):
            return  # spares the imports, which are those of the HTTP server
        from microvllm.openai_compat.api.reading import read_value
        from microvllm.openai_compat.api.requests import EFFORTS, MAX_STOP_STRINGS, TemplateKwargs
        from microvllm.openai_compat.errors import Fault

        try:
            read_value(TemplateKwargs, self.default_chat_template_kwargs)
        except Fault as fault:
            raise ConfigError(f"--default-chat-template-kwargs: {fault.problem}") from None
        for effort, value in self.reasoning_effort_map.items():
            if effort not in EFFORTS or not isinstance(value, str):
                raise ConfigError(
                    f"--reasoning-effort-map: {effort}: must be a string for one of {', '.join(EFFORTS)}"
                )
        if self.max_stop_strings > MAX_STOP_STRINGS:
            raise ConfigError(
                f"--max-stop-strings must be in [1, {MAX_STOP_STRINGS}], got {self.max_stop_strings}"
            )


@dataclass(frozen=True, kw_only=True)
class ServerArgs(AnswerArgs):
    """Options of the server: how it listens, who may use it, what it reports, and those of its answers.

    `host` is 127.0.0.1 unless given otherwise (vLLM listens on every interface). Without `api_keys` there is
    no authentication; the keys of `api_key_file` are added to them. `dev_mode` adds endpoints that report or
    change what only an operator should.
    """

    host: str = flag("127.0.0.1", SERVER, "Address to listen on.")
    port: int = flag(8000, SERVER, "Port to listen on.", low=1, high=65535)
    uds: str | None = flag(None, SERVER, "Unix socket to listen on, in place of host and port.")
    root_path: str = flag(
        "",
        SERVER,
        "Path prefix that a proxy puts in front of every path.",
        metavar="/PREFIX",
        read=path_prefix,
    )
    api_keys: tuple[str, ...] = flag(
        (),
        ACCESS,
        "Keys, one of which each request must carry. Other users can read a command line; the "
        "variable and --api-key-file hide them.",
        name="api-key",
        env=("MICROVLLM_API_KEY", "VLLM_API_KEY"),
    )
    api_key_file: str | None = flag(None, ACCESS, "A file with such keys, one a line.", metavar="FILE")
    allowed_hosts: tuple[str, ...] | None = flag(
        None,
        ACCESS,
        'Names that requests may be sent to, beside localhost; ["*"]: any. '
        "Not checked with a key or on an address that others reach, unless given.",
        metavar=STRINGS,
        read=json_strings,
    )
    ssl_certfile: str | None = flag(None, ACCESS, "Certificate (PEM): serve HTTPS.", metavar="FILE")
    ssl_keyfile: str | None = flag(None, ACCESS, "Its key, if not in the same file.", metavar="FILE")
    ssl_ca_certs: str | None = flag(
        None, ACCESS, "Who may have signed a client's certificate.", metavar="FILE"
    )
    ssl_cert_reqs: int = flag(
        0, ACCESS, "Whether clients need a certificate: 0 no, 1 if they have one, 2 yes."
    )
    ssl_ciphers: str | None = flag(None, ACCESS, "OpenSSL's names of the ciphers for TLS 1.2.")
    enable_ssl_refresh: bool = flag(False, ACCESS, "Read the certificate again when it changes.")
    allowed_origins: tuple[str, ...] | None = flag(
        None,
        ACCESS,
        "Web pages that may use the server (CORS); those of localhost if not given.",
        metavar=STRINGS,
        read=json_strings,
    )
    allowed_methods: tuple[str, ...] = flag(
        ("*",), ACCESS, "Methods they may use.", metavar=STRINGS, read=json_strings
    )
    allowed_headers: tuple[str, ...] = flag(
        ("*",), ACCESS, "Headers they may send.", metavar=STRINGS, read=json_strings
    )
    allow_credentials: bool = flag(False, ACCESS, "They may send cookies.")
    stream_interval: int = flag(1, ANSWERS, "Least tokens in a chunk of a stream.", low=1)
    sse_keep_alive_interval: float = flag(
        0.0, ANSWERS, "Seconds of silence after which a stream gets a comment; 0: never.", low=0
    )
    max_response_store_bytes: int = flag(
        64 << 20,
        ANSWERS,
        "Memory for the responses of /v1/responses, for `previous_response_id`; 0: keep none.",
        metavar="BYTES",
        low=0,
        read=human_int,
    )
    enable_force_include_usage: bool = flag(False, ANSWERS, "End every stream with its usage.")
    enable_request_id_headers: bool = flag(False, LOGS, "Answer with X-Request-Id.")
    enable_server_load_tracking: bool = flag(False, SERVER, "Count requests in progress at /load.")
    enable_sleep_mode: bool = flag(
        False, SERVER, "Serve /sleep and /wake_up, with VLLM_SERVER_DEV_MODE=1 in the environment."
    )
    enable_tokenizer_info_endpoint: bool = flag(False, SERVER, "Serve /tokenizer_info.")
    profiler: ProfilerConfig | None = flag(
        None,
        LOGS,
        "Serve /start_profile and /stop_profile: {profiler: torch, torch_profiler_dir: FOLDER}.",
        name="profiler-config",
        metavar=OBJECT,
        read=profiler_config,
    )
    disable_fastapi_docs: bool = flag(False, SERVER, "No /docs, /redoc and /openapi.json.")
    page: bool = flag(True, SERVER, "Serve the chat page at /.")
    uvicorn_log_level: str = flag(
        "info", LOGS, "critical, error, warning, info, debug or trace.", choices=LOG_LEVELS
    )
    disable_uvicorn_access_log: bool = flag(False, LOGS, "No line per request.")
    disable_access_log_for_endpoints: tuple[str, ...] = flag(
        QUIET_PATHS,
        LOGS,
        "No such line for these, in place of /health,/metrics,/load.",
        metavar="PATHS",
        read=comma_list,
    )
    disable_log_stats: bool = flag(False, LOGS, "No statistics: no log line, no metrics.")
    stats_interval: float = flag(
        10.0,
        LOGS,
        "Seconds between two lines of statistics.",
        name="log-stats-interval",
        above=0,
        env=("VLLM_LOG_STATS_INTERVAL",),
    )
    log_level: str = flag(
        "info",
        LOGS,
        "Least level of the server's own lines: critical, error, warning, info or debug.",
        metavar=TEXT,
        choices=LOG_LEVELS[:-1],
        env=("VLLM_LOGGING_LEVEL",),
        read=log_level,
    )
    http_timeout_keep_alive: int = flag(
        5,
        SERVER,
        "Seconds that an idle connection stays open; a proxy's pool needs more than its own limit.",
        low=0,
        env=("VLLM_HTTP_TIMEOUT_KEEP_ALIVE",),
    )
    max_body_bytes: int = flag(
        16 << 20,
        SERVER,
        "Size of the largest request body.",
        name="http-max-request-body-size",
        metavar="BYTES",
        low=1,
        env=("VLLM_HTTP_MAX_REQUEST_BODY_SIZE",),
        read=human_int,
    )
    shutdown_timeout: float = flag(
        10.0, SERVER, "Seconds that running requests get to finish after SIGTERM.", low=0
    )
    dev_mode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key_file is not None:
            object.__setattr__(self, "api_keys", (*self.api_keys, *keys_of(self.api_key_file)))
            object.__setattr__(self, "api_key_file", None)  # else `replace` would add them once more
        if self.enable_per_request_metrics and self.disable_log_stats:
            raise ConfigError("--enable-per-request-metrics needs statistics: leave out --disable-log-stats")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(
                f"--root-path must begin with a slash and not end with one, got {self.root_path}"
            )
        self._check_tls()

    def _check_tls(self) -> None:
        """Refuse TLS options without a certificate: the server would answer in plain text."""
        options = {
            "--ssl-keyfile": self.ssl_keyfile,
            "--ssl-ca-certs": self.ssl_ca_certs,
            "--ssl-cert-reqs": self.ssl_cert_reqs,
            "--ssl-ciphers": self.ssl_ciphers,
            "--enable-ssl-refresh": self.enable_ssl_refresh,
        }
        given = [option for option, value in options.items() if value]
        if given and self.ssl_certfile is None:
            raise ConfigError(f"{given[0]} needs --ssl-certfile")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"--ssl-cert-reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs, or no client would be let in")
