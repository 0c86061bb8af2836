"""The listening socket, bound before the model loads so that a taken port is known at once."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.errors import ConfigError

TAKEN_REMEDY = "end what listens there, or choose another address with --port and --host"


def bind_socket(args: ServerArgs) -> socket.socket:
    """A bound socket. A TCP one does not listen yet: until the model is loaded, clients are refused.

    Raises `ConfigError` with one line when the address is taken, not ours or not allowed.
    """
    if args.uds is not None:
        return _bind_unix(Path(args.uds))
    try:
        found = socket.getaddrinfo(
            args.host or None, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {args.host}: {_reason(error)}") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {args.host} port {args.port}: {_reason(error)}", remedy=TAKEN_REMEDY
        ) from error
    return sock


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise ConfigError(f"--uds {path}: exists and is not a socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise ConfigError(f"--uds {path}: another server listens there")
            path.unlink()  # left behind by a server that was killed
        sock.bind(str(path))
        sock.listen()  # at once, or the probe above would take this socket for a dead one
    except (ConfigError, OSError) as error:
        sock.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--uds {path}: {_reason(error)}") from error
    return sock


def start_listening(sock: socket.socket, args: ServerArgs) -> None:
    """Raises `ConfigError` if another server that started at the same time was faster."""
    try:
        sock.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address_of(args)}: {_reason(error)}", remedy=TAKEN_REMEDY
        ) from error


def release_socket(sock: socket.socket, args: ServerArgs) -> None:
    """Closes the socket; a unix socket's file goes, too."""
    sock.close()
    if args.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(args.uds)


def address_of(args: ServerArgs) -> str:
    """Where to reach the server, for people."""
    if args.uds is not None:
        return f"unix:{args.uds}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    scheme = "https" if args.ssl_certfile is not None else "http"
    return f"{scheme}://{host}:{args.port}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
