"""`ServerArgs`: the options of the HTTP server, apart from the engine's own (`runtime/config.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from microvllm.openai_compat.errors import Fault
from microvllm.openai_compat.schemas import template_kwargs
from microvllm.runtime.errors import ConfigError

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """How the server listens, who may use it and what it reports; names as in `vllm serve`.

    `host` is 127.0.0.1 unless asked otherwise (vLLM listens on every interface). `uds` is the path of a
    unix socket to listen on instead of host and port. `served_model_names` are all accepted and the first is
    echoed; empty means the model as it was given. `api_keys` empty means no authentication.
    `chat_template` is the template's text, in place of the model's own, `default_chat_template_kwargs` what
    it gets unless a request says otherwise. A chunk of a stream has at least `stream_interval` tokens, the
    first and the last one excepted. `max_body_bytes` bounds a request body. `shutdown_timeout` is the time
    in seconds that running requests have to finish after SIGTERM or SIGINT, `stats_interval` the time
    between two lines of statistics.

    Raises `ConfigError` with one line that names the option.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    chat_template: str | None = None
    default_chat_template_kwargs: Mapping[str, bool | str] = field(default_factory=dict)
    response_role: str = "assistant"
    stream_interval: int = 1
    return_tokens_as_token_ids: bool = False
    max_body_bytes: int = 16 << 20
    uvicorn_log_level: str = "info"
    disable_uvicorn_access_log: bool = False
    disable_log_stats: bool = False
    stats_interval: float = 10.0
    shutdown_timeout: float = 10.0
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_per_request_metrics: bool = False
    enable_server_load_tracking: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port must be in [1, 65535], got {self.port}")
        if self.uvicorn_log_level not in LOG_LEVELS:
            raise ConfigError(
                f"--uvicorn-log-level must be one of {', '.join(LOG_LEVELS)}, got {self.uvicorn_log_level}"
            )
        if any(not key for key in self.api_keys):
            raise ConfigError("--api-key must not be empty")
        if any(not name for name in self.served_model_names):
            raise ConfigError("--served-model-name must not be empty")
        try:
            template_kwargs(self.default_chat_template_kwargs)
        except Fault as fault:
            raise ConfigError(f"--default-chat-template-kwargs: {fault.problem}") from None
        if self.stream_interval < 1:
            raise ConfigError(f"--stream-interval must be at least 1, got {self.stream_interval}")
        if not self.response_role:
            raise ConfigError("--response-role must not be empty")
        if self.max_body_bytes < 1:
            raise ConfigError("max_body_bytes must be at least 1")
        if not (math.isfinite(self.shutdown_timeout) and self.shutdown_timeout >= 0):
            raise ConfigError(f"--shutdown-timeout must be at least 0 seconds, got {self.shutdown_timeout}")
        if not (math.isfinite(self.stats_interval) and self.stats_interval > 0):
            raise ConfigError("stats_interval must be a positive number of seconds")
