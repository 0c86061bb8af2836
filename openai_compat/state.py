"""What the endpoints share: the engine's client, the options, who is being served."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

import microvllm
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.lifecycle import Lifecycle

if TYPE_CHECKING:
    from microvllm.runtime.client import EngineClient


@dataclass
class ServerState:
    """One server. `model_names` are the accepted names, the first of which is echoed."""

    client: EngineClient
    args: ServerArgs
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    created: int = field(default_factory=lambda: int(time.time()))
    model_names: tuple[str, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.model_names = self.args.served_model_names or (self.client.config.model,)
        # Same engine configuration, same fingerprint: what OpenAI's `system_fingerprint` promises.
        digest = hashlib.sha256(msgspec.json.encode(self.client.config)).hexdigest()
        self.fingerprint = f"microvllm-{microvllm.__version__}-{digest[:8]}"
