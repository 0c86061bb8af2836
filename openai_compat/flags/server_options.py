"""The command line's options of the HTTP server. Names and defaults are those of `vllm serve` 0.33."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from microvllm.openai_compat.flags.option_values import (
    OBJECT,
    chat_template_text,
    comma_list,
    human_int,
    json_object,
    json_strings,
    keys_of,
)
from microvllm.runtime.profiler import ProfilerConfig
from microvllm.runtime.vllm_environment import is_on


def answer_options(
    *,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Names of the model in requests; the first is answered."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A file with a chat template, or the template."),
    ] = None,
    chat_template_content_format: Annotated[
        str, typer.Option(help="What the template gets as content: string, openai (parts), or auto.")
    ] = "auto",
    default_chat_template_kwargs: Annotated[
        Any,
        typer.Option(parser=json_object, metavar=OBJECT, help="Template variables of requests without them."),
    ] = None,
    reasoning_effort_map: Annotated[
        Any,
        typer.Option(
            parser=json_object,
            metavar=OBJECT,
            help="What the template gets for a request's reasoning effort.",
        ),
    ] = None,
    response_role: Annotated[str, typer.Option(help="Role of the answers in chats.")] = "assistant",
    max_stop_strings: Annotated[
        int,
        typer.Option(
            min=1,
            envvar="VLLM_MAX_STOP_STRINGS",
            show_envvar=True,
            help="Stop strings that a request may have.",
        ),
    ] = 4,
    skip_model_name_validation: Annotated[
        bool,
        typer.Option(
            "--skip-model-name-validation/--no-skip-model-name-validation",
            envvar="VLLM_SKIP_MODEL_NAME_VALIDATION",
            show_envvar=True,
            help="Take any model name in requests.",
        ),
    ] = False,
    exclude_tools_when_tool_choice_none: Annotated[
        bool,
        typer.Option(
            "--exclude-tools-when-tool-choice-none/--no-exclude-tools-when-tool-choice-none",
            help="Keep tools from the template where none may be called.",
        ),
    ] = False,
    return_tokens_as_token_ids: Annotated[
        bool,
        typer.Option(
            "--return-tokens-as-token-ids/--no-return-tokens-as-token-ids",
            help="Write tokens of log probabilities as token_id:N.",
        ),
    ] = False,
    enable_prompt_tokens_details: Annotated[
        bool,
        typer.Option(
            "--enable-prompt-tokens-details/--no-enable-prompt-tokens-details",
            help="Report cached tokens in the usage.",
        ),
    ] = False,
    enable_per_request_metrics: Annotated[
        bool,
        typer.Option(
            "--enable-per-request-metrics/--no-enable-per-request-metrics",
            help="Report the times of a request in its answer.",
        ),
    ] = False,
    fingerprint_mode: Annotated[
        str, typer.Option(help="The system_fingerprint of answers: full, hash, custom or none.")
    ] = "full",
    fingerprint_value: Annotated[str | None, typer.Option(help="The fingerprint, if custom.")] = None,
    enable_log_requests: Annotated[
        bool,
        typer.Option(
            "--enable-log-requests/--no-enable-log-requests",
            help="Log the parameters of each request, never its text.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Fields of `ServerArgs`: what shapes the answers of a server, and of a batch. Raises `ConfigError`."""
    return {
        "served_model_names": tuple(served_model_name or ()),
        "chat_template": chat_template_text(chat_template),
        "chat_template_content_format": chat_template_content_format,
        "default_chat_template_kwargs": default_chat_template_kwargs or {},
        "reasoning_effort_map": reasoning_effort_map or {},
        "response_role": response_role,
        "max_stop_strings": max_stop_strings,
        "skip_model_name_validation": skip_model_name_validation,
        "exclude_tools_when_tool_choice_none": exclude_tools_when_tool_choice_none,
        "return_tokens_as_token_ids": return_tokens_as_token_ids,
        "enable_prompt_tokens_details": enable_prompt_tokens_details,
        "enable_per_request_metrics": enable_per_request_metrics,
        "fingerprint_mode": fingerprint_mode,
        "fingerprint_value": fingerprint_value,
        "enable_log_requests": enable_log_requests,
    }


def server_options(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    uds: Annotated[
        str | None,
        typer.Option(help="Unix socket to listen on, in place of host and port."),
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="/PREFIX", help="Path prefix that a proxy puts in front of every path.")
    ] = "",
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=["MICROVLLM_API_KEY", "VLLM_API_KEY"],
            show_envvar=True,
            help="Keys, one of which each request must carry. Other users can read a command line; the "
            "variable and --api-key-file hide them.",
        ),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with such keys, one a line.")
    ] = None,
    allowed_hosts: Annotated[
        Any,
        typer.Option(
            parser=json_strings,
            metavar="[JSON]",
            help='Names that requests may be sent to, beside localhost; ["*"]: any. '
            "Not checked with a key or on an address that others reach, unless given.",
        ),
    ] = None,
    ssl_certfile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificate (PEM): serve HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its key, if not in the same file.")
    ] = None,
    ssl_ca_certs: Annotated[
        str | None, typer.Option(metavar="FILE", help="Who may have signed a client's certificate.")
    ] = None,
    ssl_cert_reqs: Annotated[
        int,
        typer.Option(help="Whether clients need a certificate: 0 no, 1 if they have one, 2 yes."),
    ] = 0,
    ssl_ciphers: Annotated[
        str | None, typer.Option(help="OpenSSL's names of the ciphers for TLS 1.2.")
    ] = None,
    enable_ssl_refresh: Annotated[
        bool,
        typer.Option(
            "--enable-ssl-refresh/--no-enable-ssl-refresh", help="Read the certificate again when it changes."
        ),
    ] = False,
    allowed_origins: Annotated[
        Any,
        typer.Option(
            parser=json_strings,
            metavar="[JSON]",
            help="Web pages that may use the server (CORS); those of localhost if not given.",
        ),
    ] = None,
    allowed_methods: Annotated[
        Any, typer.Option(parser=json_strings, metavar="[JSON]", help="Methods they may use.")
    ] = None,
    allowed_headers: Annotated[
        Any, typer.Option(parser=json_strings, metavar="[JSON]", help="Headers they may send.")
    ] = None,
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials/--no-allow-credentials", help="They may send cookies.")
    ] = False,
    stream_interval: Annotated[int, typer.Option(min=1, help="Least tokens in a chunk of a stream.")] = 1,
    sse_keep_alive_interval: Annotated[
        float, typer.Option(min=0, help="Seconds of silence after which a stream gets a comment; 0: never.")
    ] = 0.0,
    enable_force_include_usage: Annotated[
        bool,
        typer.Option(
            "--enable-force-include-usage/--no-enable-force-include-usage",
            help="End every stream with its usage.",
        ),
    ] = False,
    enable_request_id_headers: Annotated[
        bool,
        typer.Option(
            "--enable-request-id-headers/--no-enable-request-id-headers", help="Answer with X-Request-Id."
        ),
    ] = False,
    enable_server_load_tracking: Annotated[
        bool,
        typer.Option(
            "--enable-server-load-tracking/--no-enable-server-load-tracking",
            help="Count requests in progress at /load.",
        ),
    ] = False,
    enable_tokenizer_info_endpoint: Annotated[
        bool,
        typer.Option(
            "--enable-tokenizer-info-endpoint/--no-enable-tokenizer-info-endpoint",
            help="Serve /tokenizer_info.",
        ),
    ] = False,
    profiler_config: Annotated[
        Any,
        typer.Option(
            parser=json_object,
            metavar=OBJECT,
            help="Serve /start_profile and /stop_profile: {profiler: torch, torch_profiler_dir: FOLDER}.",
        ),
    ] = None,
    disable_fastapi_docs: Annotated[
        bool,
        typer.Option(
            "--disable-fastapi-docs/--no-disable-fastapi-docs", help="No /docs, /redoc and /openapi.json."
        ),
    ] = False,
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
    disable_access_log_for_endpoints: Annotated[
        Any,
        typer.Option(
            parser=comma_list,
            metavar="PATHS",
            help="No such line for these, in place of /health,/metrics,/load.",
        ),
    ] = None,
    disable_log_stats: Annotated[
        bool,
        typer.Option(
            "--disable-log-stats/--no-disable-log-stats", help="No statistics: no log line, no metrics."
        ),
    ] = False,
    log_stats_interval: Annotated[
        float,
        typer.Option(
            envvar="VLLM_LOG_STATS_INTERVAL",
            show_envvar=True,
            help="Seconds between two lines of statistics.",
        ),
    ] = 10.0,
    log_level: Annotated[
        str,
        typer.Option(
            envvar="VLLM_LOGGING_LEVEL",
            show_envvar=True,
            help="Least level of the server's own lines: critical, error, warning, info or debug.",
        ),
    ] = "info",
    http_timeout_keep_alive: Annotated[
        int,
        typer.Option(
            min=0,
            envvar="VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
            show_envvar=True,
            help="Seconds that an idle connection stays open; a proxy's pool needs more than its own limit.",
        ),
    ] = 5,
    http_max_request_body_size: Annotated[
        int,
        typer.Option(
            parser=human_int,
            metavar="BYTES",
            envvar="VLLM_HTTP_MAX_REQUEST_BODY_SIZE",
            show_envvar=True,
            help="Size of the largest request body.",
        ),
    ] = 16 << 20,
    shutdown_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that running requests get to finish after SIGTERM."),
    ] = 10.0,
) -> dict[str, Any]:
    """Fields of `ServerArgs`: how the server listens and what it offers. Raises `ConfigError`."""
    paths = disable_access_log_for_endpoints
    return {
        **({} if paths is None else {"disable_access_log_for_endpoints": paths}),
        "host": host,
        "port": port,
        "uds": uds,
        "root_path": root_path.rstrip("/"),
        "api_keys": (*(api_key or ()), *keys_of(api_key_file)),
        "allowed_hosts": allowed_hosts,
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
        "ssl_ca_certs": ssl_ca_certs,
        "ssl_cert_reqs": ssl_cert_reqs,
        "ssl_ciphers": ssl_ciphers,
        "enable_ssl_refresh": enable_ssl_refresh,
        "allowed_origins": allowed_origins,
        "allowed_methods": ("*",) if allowed_methods is None else allowed_methods,
        "allowed_headers": ("*",) if allowed_headers is None else allowed_headers,
        "allow_credentials": allow_credentials,
        "stream_interval": stream_interval,
        "sse_keep_alive_interval": sse_keep_alive_interval,
        "enable_force_include_usage": enable_force_include_usage,
        "enable_request_id_headers": enable_request_id_headers,
        "enable_server_load_tracking": enable_server_load_tracking,
        "enable_tokenizer_info_endpoint": enable_tokenizer_info_endpoint,
        "profiler": ProfilerConfig.read(profiler_config or {}),
        "disable_fastapi_docs": disable_fastapi_docs,
        "uvicorn_log_level": uvicorn_log_level,
        "disable_uvicorn_access_log": disable_uvicorn_access_log,
        "disable_log_stats": disable_log_stats,
        "stats_interval": log_stats_interval,
        "log_level": log_level.lower(),
        "http_timeout_keep_alive": http_timeout_keep_alive,
        "max_body_bytes": http_max_request_body_size,
        "shutdown_timeout": shutdown_timeout,
        "dev_mode": is_on("VLLM_SERVER_DEV_MODE"),
    }
