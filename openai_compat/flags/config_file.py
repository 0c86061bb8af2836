"""`--config FILE.yaml`: command-line options from a file, by vLLM's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microvllm.runtime.errors import ConfigError


def read_config(path: str) -> dict[str, Any]:
    """The options of a YAML file: names of flags without their dashes, and values.

    Raises `ConfigError` naming the file.
    """
    import yaml

    where = f"--config {path}"
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError(f"{where}: must be a .yaml or .yml file")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{where}: {reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML ({reason})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) and key for key in content):
        raise ConfigError(f"{where}: must hold names of options and their values")
    return content


def option_words(name: str, value: Any, takes_several: bool) -> list[str]:
    """What one entry would be on the command line. Raises `ConfigError` for an entry without a value.

    True and false are a switch and its `no-` form. A list becomes several values where the flag takes them,
    else JSON, as an object does.
    """
    if value is None:
        raise ConfigError("has no value")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list) and takes_several:
        return [f"--{name}={item}" for item in value]
    if isinstance(value, (dict, list)):
        try:
            return [f"--{name}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cannot be written as JSON ({error})") from error
    return [f"--{name}={value}"]
