"""HTTPS: the certificate is read before the model loads, and read again when it is renewed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl

from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.errors import ConfigError

logger = logging.getLogger("microvllm.server")

REFRESH_INTERVAL_S = 10.0


def tls_context(args: ServerArgs) -> ssl.SSLContext | None:
    """The server's side of TLS, or None for plain HTTP. Raises `ConfigError` naming the option."""
    if args.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, _no_password)
    except (OSError, ValueError) as error:
        key = "" if args.ssl_keyfile is None else f" and --ssl-keyfile {args.ssl_keyfile}"
        raise ConfigError(f"--ssl-certfile {args.ssl_certfile}{key}: {_reason(error)}") from error
    context.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    if args.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(args.ssl_ca_certs)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--ssl-ca-certs {args.ssl_ca_certs}: {_reason(error)}") from error
    if args.ssl_ciphers is not None:
        try:
            context.set_ciphers(args.ssl_ciphers)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"--ssl-ciphers {args.ssl_ciphers}: {_reason(error)}") from error
    return context


async def refresh_certificate(
    context: ssl.SSLContext, args: ServerArgs, interval: float = REFRESH_INTERVAL_S
) -> None:
    """Gives new connections the certificate that now lies in the files, looking every `interval` seconds.

    What does not load (only one of two files was replaced so far) is tried again and changes nothing.
    """
    loaded = _stamps(args)
    while True:
        await asyncio.sleep(interval)
        found = _stamps(args)
        if found == loaded:
            continue
        try:
            # Into a context of its own first: a key that does not fit would spoil the one in use.
            fresh = tls_context(args)
        except ConfigError as error:
            logger.warning("The new certificate is not in use: %s", error)
            continue
        if fresh is not None and args.ssl_certfile is not None:
            context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, _no_password)
            if args.ssl_ca_certs is not None:
                context.load_verify_locations(args.ssl_ca_certs)
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


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
