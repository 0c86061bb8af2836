"""Makes the listening socket and its TLS context, before the model loads so that a fault shows at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.errors import ConfigError, reason_of

logger = logging.getLogger("microvllm.server")

REFRESH_INTERVAL_S = 10.0
HANDSHAKE_DEADLINE_S = 30.0
TAKEN_REMEDY = "end what listens there, or choose another address with --port and --host"


def bind_socket(args: ServerArgs) -> socket.socket:
    """Return a bound socket. A TCP one does not listen yet: until the model is loaded, clients are refused.

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
        raise ConfigError(f"--host {args.host}: {reason_of(error)}") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {args.host} port {args.port}: {reason_of(error)}", remedy=TAKEN_REMEDY
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
        raise ConfigError(f"--uds {path}: {reason_of(error)}") from error
    return sock


def start_listening(sock: socket.socket, args: ServerArgs) -> None:
    """Listen. Raises `ConfigError` if another server that started at the same time was faster."""
    try:
        sock.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address_of(args)}: {reason_of(error)}", remedy=TAKEN_REMEDY
        ) from error


def release_socket(sock: socket.socket, args: ServerArgs) -> None:
    """Close the socket and remove a unix socket's file."""
    sock.close()
    if args.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(args.uds)


def address_of(args: ServerArgs) -> str:
    """Return the URL of the server, for people."""
    if args.uds is not None:
        return f"unix:{args.uds}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    scheme = "https" if args.ssl_certfile is not None else "http"
    return f"{scheme}://{host}:{args.port}"


class _Handshake(ssl.SSLObject):
    """One connection, counted until its handshake is complete or the event loop has dropped it."""

    counted: weakref.WeakKeyDictionary[_Handshake, float]

    def do_handshake(self) -> None:
        super().do_handshake()  # raises as long as the client has to send more
        self.counted.pop(self, None)


class RenewableContext(ssl.SSLContext):
    """The server's side of TLS. New connections are of the `latest` context, if there is one.

    A context of its own has no sessions of the one before: a resumed session is not verified again.
    A connection reaches the HTTP protocol, which counts it, only behind its handshake. So handshakes are
    counted here, and at most `room()` are in progress at once.
    """

    sslobject_class = _Handshake
    latest: RenewableContext | None = None
    room: Callable[[], int] | None = None

    def __init__(self, _: int) -> None:
        self._handshakes: weakref.WeakKeyDictionary[_Handshake, float] = weakref.WeakKeyDictionary()

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Begin a connection, as event loops do, which close it at once on an `OSError`."""
        if self.room is not None and len(self._handshakes) >= self.room():
            # Of one that failed asyncio itself keeps the objects, in a cycle, until garbage is looked for.
            ended = time.monotonic() - HANDSHAKE_DEADLINE_S
            for each in [each for each, begun_at in self._handshakes.items() if begun_at < ended]:
                del self._handshakes[each]
            if len(self._handshakes) >= self.room():
                raise ConnectionRefusedError("too many connections")
        begun: Any = (self.latest.wrap_bio if self.latest else super().wrap_bio)(*args, **kwargs)
        begun.counted = self._handshakes
        self._handshakes[begun] = time.monotonic()
        return begun  # type: ignore[no-any-return]


def tls_context(args: ServerArgs) -> RenewableContext | None:
    """Return the server's side of TLS, or None for plain HTTP. Raises `ConfigError` naming the option."""
    if args.ssl_certfile is None:
        return None
    context = RenewableContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    option = f"--ssl-certfile {args.ssl_certfile}"
    if args.ssl_keyfile is not None:
        option += f" and --ssl-keyfile {args.ssl_keyfile}"
    try:
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, _no_password)
        if args.ssl_ca_certs is not None:
            option = f"--ssl-ca-certs {args.ssl_ca_certs}"
            context.load_verify_locations(args.ssl_ca_certs)
        if args.ssl_ciphers is not None:
            option = f"--ssl-ciphers {args.ssl_ciphers}"
            context.set_ciphers(args.ssl_ciphers)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {reason_of(error)}") from error
    return context


async def refresh_certificate(
    context: RenewableContext, args: ServerArgs, interval: float = REFRESH_INTERVAL_S
) -> None:
    """Load a renewed certificate for new connections, looking at the files every `interval` seconds.

    Files that do not load (only one of two is replaced so far) are tried again and change nothing. New ones
    get a context of their own: what is loaded into the context in use adds to the authorities that it trusts,
    and spoils it if the files change at that moment.
    """
    loaded = _stamps(args)
    while True:
        await asyncio.sleep(interval)
        found = _stamps(args)
        if found == loaded:
            continue
        try:
            context.latest = tls_context(args)
        except ConfigError as error:
            logger.warning("The new certificate is not in use: %s", error)
            continue
        loaded = found
        logger.info("The certificate was read again.")


def _no_password() -> str:
    # Without it OpenSSL would ask at the terminal, and a server in the background would hang.
    raise ValueError("the key is encrypted")


def _stamps(args: ServerArgs) -> list[tuple[str, int]]:
    stamps = []
    for path in (args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs):
        if path is not None:
            with contextlib.suppress(OSError):
                stamps.append((path, os.stat(path).st_mtime_ns))
    return stamps
