"""`ServerArgs`: the options of the HTTP server, apart from the engine's own (`runtime/config.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from microvllm.openai_compat.api.reading import read_value
from microvllm.openai_compat.api.requests import EFFORTS, MAX_STOP_STRINGS, TemplateKwargs
from microvllm.openai_compat.errors import Fault
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.profiler import ProfilerConfig
from microvllm.runtime.text.content_format import AUTO, CONTENT_FORMATS

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
QUIET_PATHS = ("/health", "/metrics", "/load")  # what probes ask for all the time
FINGERPRINT_MODES = ("full", "hash", "custom", "none")


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """How the server listens, who may use it and what it reports; names as in `vllm serve`.

    `host` is 127.0.0.1 unless asked otherwise (vLLM listens on every interface). `uds` is the path of a
    unix socket to listen on instead of host and port. `served_model_names` are all accepted and the first is
    echoed; empty means the model as it was given. `api_keys` empty means no authentication.
    `chat_template` is the template's text, in place of the model's own, `default_chat_template_kwargs` what
    it gets unless a request says otherwise. It gets the contents of messages as a "string", as "openai" (a
    list of parts) or as it was written for ("auto"): `chat_template_content_format`. Of a reasoning effort
    it gets what `reasoning_effort_map` makes of it. A chunk of a stream has at least `stream_interval`
    tokens, the first and the last one excepted. A request may have `max_stop_strings` stop strings, and a
    body of `max_body_bytes`. `shutdown_timeout` is the time in
    seconds that running requests have to finish after SIGTERM or SIGINT, `stats_interval` the time between
    two lines of statistics, `http_timeout_keep_alive` the time that an idle connection stays open.
    `skip_model_name_validation` takes any model name in requests; the answer has the served one.

    The Host header of a request has to be one of `allowed_hosts`, localhost or a loopback address; ("*",)
    allows any. None checks only a server that listens on loopback without a key.

    `root_path` is the path prefix below which a proxy publishes the server. Web pages of `allowed_origins`
    may use it from a browser (CORS); None allows the pages that this machine serves. A stream that is silent
    for `sse_keep_alive_interval` seconds gets a comment; 0 is off. `ssl_certfile` turns plain HTTP into
    HTTPS; `ssl_cert_reqs` 0, 1 or 2 never, optionally or always asks the client for a certificate of
    `ssl_ca_certs`. `fingerprint_mode` says what answers carry as `system_fingerprint`: version and
    configuration (full, hash), `fingerprint_value` (custom) or null (none). `dev_mode` adds endpoints that
    tell or change what only an operator should; with a `profiler` its endpoints exist.

    Raises `ConfigError` with one line that names the option.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    chat_template: str | None = None
    chat_template_content_format: str = AUTO
    default_chat_template_kwargs: Mapping[str, bool | str] = field(default_factory=dict)
    reasoning_effort_map: Mapping[str, str] = field(default_factory=dict)
    response_role: str = "assistant"
    stream_interval: int = 1
    max_stop_strings: int = 4
    skip_model_name_validation: bool = False
    return_tokens_as_token_ids: bool = False
    max_body_bytes: int = 16 << 20
    uvicorn_log_level: str = "info"
    disable_uvicorn_access_log: bool = False
    disable_log_stats: bool = False
    stats_interval: float = 10.0
    log_level: str = "info"
    http_timeout_keep_alive: int = 5
    shutdown_timeout: float = 10.0
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_per_request_metrics: bool = False
    enable_server_load_tracking: bool = False
    root_path: str = ""
    allowed_origins: tuple[str, ...] | None = None
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    enable_request_id_headers: bool = False
    enable_log_requests: bool = False
    disable_access_log_for_endpoints: tuple[str, ...] = QUIET_PATHS
    sse_keep_alive_interval: float = 0.0
    disable_fastapi_docs: bool = False
    enable_tokenizer_info_endpoint: bool = False
    fingerprint_mode: str = "full"
    fingerprint_value: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    enable_ssl_refresh: bool = False
    dev_mode: bool = False
    profiler: ProfilerConfig | None = None
    exclude_tools_when_tool_choice_none: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port must be in [1, 65535], got {self.port}")
        if self.uvicorn_log_level not in LOG_LEVELS:
            raise ConfigError(
                f"--uvicorn-log-level must be one of {', '.join(LOG_LEVELS)}, got {self.uvicorn_log_level}"
            )
        if self.log_level not in LOG_LEVELS[:-1]:
            raise ConfigError(
                f"--log-level must be one of {', '.join(LOG_LEVELS[:-1])}, got {self.log_level}"
            )
        if any(not key for key in self.api_keys):
            raise ConfigError("--api-key must not be empty")
        if any(not host for host in self.allowed_hosts or ()):
            raise ConfigError("--allowed-hosts must not be empty")
        if any(not name for name in self.served_model_names):
            raise ConfigError("--served-model-name must not be empty")
        if self.chat_template_content_format not in CONTENT_FORMATS:
            raise ConfigError(
                f"--chat-template-content-format must be one of {', '.join(CONTENT_FORMATS)}, "
                f"got {self.chat_template_content_format}"
            )
        try:
            read_value(TemplateKwargs, self.default_chat_template_kwargs)
        except Fault as fault:
            raise ConfigError(f"--default-chat-template-kwargs: {fault.problem}") from None
        for effort, value in self.reasoning_effort_map.items():
            if effort not in EFFORTS or not isinstance(value, str):
                raise ConfigError(
                    f"--reasoning-effort-map: {effort}: must be a string for one of {', '.join(EFFORTS)}"
                )
        if self.stream_interval < 1:
            raise ConfigError(f"--stream-interval must be at least 1, got {self.stream_interval}")
        if not 1 <= self.max_stop_strings <= MAX_STOP_STRINGS:
            raise ConfigError(
                f"--max-stop-strings must be in [1, {MAX_STOP_STRINGS}], got {self.max_stop_strings}"
            )
        if self.enable_per_request_metrics and self.disable_log_stats:
            raise ConfigError("--enable-per-request-metrics needs statistics: leave out --disable-log-stats")
        if not self.response_role:
            raise ConfigError("--response-role must not be empty")
        if self.max_body_bytes < 1:
            raise ConfigError(
                f"--http-max-request-body-size must be at least 1 byte, got {self.max_body_bytes}"
            )
        if not (math.isfinite(self.shutdown_timeout) and self.shutdown_timeout >= 0):
            raise ConfigError(f"--shutdown-timeout must be at least 0 seconds, got {self.shutdown_timeout}")
        if not (math.isfinite(self.stats_interval) and self.stats_interval > 0):
            raise ConfigError(
                f"--log-stats-interval must be a positive number of seconds, got {self.stats_interval}"
            )
        if self.http_timeout_keep_alive < 0:
            raise ConfigError(
                f"--http-timeout-keep-alive must be at least 0 seconds, got {self.http_timeout_keep_alive}"
            )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(
                f"--root-path must begin with a slash and not end with one, got {self.root_path}"
            )
        if not (math.isfinite(self.sse_keep_alive_interval) and self.sse_keep_alive_interval >= 0):
            raise ConfigError(
                f"--sse-keep-alive-interval must be at least 0 seconds, got {self.sse_keep_alive_interval}"
            )
        if self.fingerprint_mode not in FINGERPRINT_MODES:
            raise ConfigError(
                f"--fingerprint-mode must be one of {', '.join(FINGERPRINT_MODES)}, "
                f"got {self.fingerprint_mode}"
            )
        if (self.fingerprint_mode == "custom") != (self.fingerprint_value is not None):
            raise ConfigError("--fingerprint-mode custom and --fingerprint-value belong together")
        self._check_tls()

    def _check_tls(self) -> None:
        """Half an encryption is none: every TLS option needs the certificate."""
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
