"""The coding agents: what to install, how they find the server, and how they run without a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scripted import CONTEXT, FILE, MODEL, NEW, OLD

TASK = f"Change {OLD} to {NEW} in {FILE}."


def nothing(url: str) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Agent:
    """One agent. `command` may hold {home}, {url}, {model}, {task}; `files` are put into its home folder.

    `title`: the heading of its section of docs/agents.md, in front of the version.
    """

    title: str
    command: tuple[str, ...]
    packages: tuple[str, ...]
    environment: Callable[[str], dict[str, str]] = nothing
    files: Callable[[str], dict[str, str]] = nothing
    npm: bool = True


def continue_files(url: str) -> dict[str, str]:
    config = {
        "name": "local",
        "version": "0.0.1",
        "schema": "v1",
        "models": [
            {
                "name": MODEL,
                "provider": "openai",
                "model": MODEL,
                "apiBase": f"{url}/v1",
                "apiKey": "none",
                "roles": ["chat"],
                "capabilities": ["tool_use"],
            }
        ],
    }
    return {"config.yaml": json.dumps(config)}  # which is YAML, too


def opencode_files(url: str) -> dict[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "local",
        "options": {"baseURL": f"{url}/v1"},
        "models": {MODEL: {"name": MODEL, "limit": {"context": CONTEXT, "output": 8192}}},
    }
    config = {
        "provider": {"local": provider},
        "model": f"local/{MODEL}",
        "small_model": f"local/{MODEL}",
        "permission": {"edit": "allow", "bash": "allow"},
        "autoupdate": False,
        "share": "disabled",
    }
    return {".config/opencode/opencode.json": json.dumps(config)}


def codex_files(url: str) -> dict[str, str]:
    return {
        ".codex/config.toml": f"""
model = "{MODEL}"
model_provider = "local"
model_context_window = {CONTEXT}
web_search = "disabled"

[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
"""
    }


def qwen_environment(url: str) -> dict[str, str]:
    return {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_MODEL": MODEL}


def mini_environment(url: str) -> dict[str, str]:
    return {"MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors", "OPENAI_API_KEY": "none"}


def claude_environment(url: str) -> dict[str, str]:
    kinds = ("DEFAULT_OPUS_", "DEFAULT_SONNET_", "DEFAULT_HAIKU_", "")
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(CONTEXT),
        **{f"ANTHROPIC_{kind}MODEL": MODEL for kind in kinds},
    }


AGENTS: Mapping[str, Agent] = {
    "continue": Agent(
        "Continue (cn ",
        ("cn", "--config", "{home}/config.yaml", "--auto", "-p", "{task}"),
        ("@continuedev/cli@latest",),
        files=continue_files,
    ),
    "mini-swe-agent": Agent(
        "mini-swe-agent (",
        (
            *(
                "mini",
                "-m",
                f"hosted_vllm/{MODEL}",
                "-c",
                "mini.yaml",
                "-c",
                "model.model_kwargs.api_base={url}/v1",
            ),
            *(
                "-c",
                "model.cost_tracking=ignore_errors",
                "-y",
                "--exit-immediately",
                "-l",
                "0",
                "-t",
                "{task}",
            ),
        ),
        ("mini-swe-agent",),
        environment=mini_environment,
        npm=False,
    ),
    "opencode": Agent(
        "OpenCode (",
        ("opencode", "run", "-m", "local/{model}", "{task}"),
        ("opencode-ai@latest",),
        files=opencode_files,
    ),
    "qwen-code": Agent(
        "Qwen Code (",
        ("qwen", "--yolo", "--auth-type", "openai", "-p", "{task}"),
        ("@qwen-code/qwen-code@latest",),
        environment=qwen_environment,
    ),
    "codex": Agent(
        "Codex (",
        ("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "{task}"),
        ("@openai/codex@latest",),
        files=codex_files,
    ),
    "claude-code": Agent(
        "Claude Code (",
        ("claude", "-p", "{task}", "--permission-mode", "acceptEdits"),
        ("@anthropic-ai/claude-code@latest",),
        environment=claude_environment,
    ),
}
