"""TLS: certificates and their renewal, clients that must show one, handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_client import FakeClient
from http_tools import events, raw_exchange, real_server
from process_tools import PATIENCE_S

from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.transport.listen import refresh_certificate, tls_context
from microvllm.runtime.errors import ConfigError

COMPLETION = {"prompt": "hi", "max_tokens": 3, "ignore_eos": True}
TLS = Path(__file__).parent.parent / "data" / "tls"
CERT, KEY = TLS / "one.cert.pem", TLS / "one.key.pem"
HTTPS: dict[str, Any] = {"ssl_certfile": str(CERT), "ssl_keyfile": str(KEY)}


class TestTls:
    def test_a_client_that_trusts_the_certificate(self) -> None:
        context = tls_context(ServerArgs(ssl_certfile=str(CERT), ssl_keyfile=str(KEY)))
        assert context is not None and served_name(context) == "one"

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"ssl_certfile": "none.pem"}, "--ssl-certfile none.pem: No such file"),
            ({"ssl_certfile": str(KEY)}, "--ssl-certfile"),  # there is no certificate in it
            ({"ssl_certfile": str(CERT)}, "--ssl-certfile"),  # there is no key in it
            ({"ssl_certfile": str(CERT), "ssl_keyfile": str(TLS / "two.key.pem")}, "--ssl-keyfile"),
            ({**HTTPS, "ssl_ca_certs": "none.pem"}, "--ssl-ca-certs none.pem: No such file"),
            ({**HTTPS, "ssl_ca_certs": str(KEY)}, "--ssl-ca-certs"),
            ({**HTTPS, "ssl_ciphers": "XX"}, "--ssl-ciphers XX"),
            ({"ssl_certfile": "nul\0byte"}, "--ssl-certfile"),
        ],
    )
    def test_files_that_do_not_do(self, options: dict[str, Any], problem: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
            tls_context(ServerArgs(**options))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "options",
        [
            {"ssl_keyfile": "k"},
            {"ssl_cert_reqs": 1},
            {"enable_ssl_refresh": True},
            {"ssl_certfile": "c", "ssl_cert_reqs": 3},
            {"ssl_certfile": "c", "ssl_cert_reqs": 2},
        ],
    )
    def test_half_a_configuration_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="ssl"):
            ServerArgs(**options)

    def test_a_client_without_its_certificate_is_turned_away(self) -> None:
        args = ServerArgs(**HTTPS, ssl_ca_certs=str(CERT), ssl_cert_reqs=2)
        context = tls_context(args)
        assert context is not None
        with pytest.raises((ssl.SSLError, OSError)):
            served_name(context)
        assert served_name(context, own=(CERT, KEY)) == "one"

    async def test_a_renewed_certificate_is_taken_and_half_of_one_is_not(self, tmp_path: Path) -> None:
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        shutil.copy(CERT, cert)
        shutil.copy(KEY, key)
        args = ServerArgs(ssl_certfile=str(cert), ssl_keyfile=str(key))
        context = tls_context(args)
        assert context is not None
        refreshing = asyncio.ensure_future(refresh_certificate(context, args, 0.02))
        try:
            await asyncio.sleep(0)  # it has looked at the files once
            shutil.copyfile(TLS / "two.cert.pem", cert)  # which does not fit the old key
            await asyncio.sleep(0.2)
            assert served_name(context) == "one"
            shutil.copyfile(TLS / "two.key.pem", key)
            until = time.monotonic() + PATIENCE_S
            while served_name(context) != "two":
                assert time.monotonic() < until and not refreshing.done()
                await asyncio.sleep(0.05)
        finally:
            refreshing.cancel()

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_session_is_not_resumed_behind_a_renewal(
        self, tmp_path: Path, version: ssl.TLSVersion
    ) -> None:
        """A resumed session's certificate is not verified again, and its authority may be gone."""
        authority = tmp_path / "ca.pem"
        shutil.copyfile(CERT, authority)
        args = ServerArgs(**HTTPS, ssl_ca_certs=str(authority), ssl_cert_reqs=2)
        context = tls_context(args)
        assert context is not None
        asking = client_context((CERT, KEY))
        asking.maximum_version = version
        session = visit(context, asking)[1]
        assert session is not None and visit(context, asking, session=session)[0] == "one"
        refreshing = asyncio.ensure_future(refresh_certificate(context, args, 0.01))
        try:
            await asyncio.sleep(0)
            shutil.copyfile(TLS / "two.cert.pem", authority)
            until = time.monotonic() + PATIENCE_S
            while context.latest is None:
                assert time.monotonic() < until and not refreshing.done()
                await asyncio.sleep(0.02)
            with pytest.raises((ssl.SSLError, OSError)):
                visit(context, asking, session=session)
        finally:
            refreshing.cancel()

    async def test_an_authority_that_was_replaced_is_not_trusted(self, tmp_path: Path) -> None:
        """What is loaded into a context adds to those that it trusts."""
        authority = tmp_path / "ca.pem"
        shutil.copyfile(CERT, authority)
        args = ServerArgs(**HTTPS, ssl_ca_certs=str(authority), ssl_cert_reqs=2)
        context = tls_context(args)
        assert context is not None
        refreshing = asyncio.ensure_future(refresh_certificate(context, args, 0.01))
        own, other = (CERT, KEY), (TLS / "two.cert.pem", TLS / "two.key.pem")
        try:
            await asyncio.sleep(0)
            whole = other[0].read_bytes()
            for broken in (b"", whole[:300], whole[:-30], b"\0" * 2000, None):
                authority.unlink()
                if broken is not None:
                    authority.write_bytes(broken)
                await asyncio.sleep(0.05)
                assert served_name(context, own) == "one" and not refreshing.done()
            authority.write_bytes(whole)
            until = time.monotonic() + PATIENCE_S
            served = ""
            while not served:
                assert time.monotonic() < until and not refreshing.done()
                await asyncio.sleep(0.02)
                with contextlib.suppress(OSError):
                    served = served_name(context, other)
            for name in ("localhost", None):  # an address is no name, so clients send none with it
                assert served_name(context, other, name) == "one"
                with pytest.raises((ssl.SSLError, OSError)):
                    served_name(context, own, name)
        finally:
            refreshing.cancel()


def served_name(
    context: ssl.SSLContext, own: tuple[Path, Path] | None = None, name: str | None = "localhost"
) -> str:
    """The common name on the certificate that a client is shown; the client may have one of its `own`."""
    return visit(context, client_context(own, name), name)[0]


def client_context(own: tuple[Path, Path] | None = None, name: str | None = "localhost") -> ssl.SSLContext:
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname = name is not None
    for known in ("one", "two"):
        asking.load_verify_locations(TLS / f"{known}.cert.pem")
    if own is not None:
        asking.load_cert_chain(*own)
    return asking


def visit(
    context: ssl.SSLContext,
    asking: ssl.SSLContext,
    name: str | None = "localhost",
    session: ssl.SSLSession | None = None,
) -> tuple[str, ssl.SSLSession | None]:
    """The common name that a client is shown, and its session."""
    here, there = socket.socketpair()
    for end in (here, there):
        end.settimeout(PATIENCE_S)
    serving = threading.Thread(target=_answer, args=(context, there))
    serving.start()
    try:
        with asking.wrap_socket(here, server_hostname=name, session=session) as wrapped:
            # Whether the client's certificate was accepted shows only when data come.
            assert wrapped.recv(2) == b"ok"
            found: Any = wrapped.getpeercert()
            return str(found["subject"][0][0][1]), wrapped.session
    finally:
        serving.join(PATIENCE_S)


def _answer(context: ssl.SSLContext, sock: socket.socket) -> None:
    """Serve one connection as event loops do, which move the bytes themselves."""
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(received, sent, server_side=True)
    left: list[Callable[[], object]] = [tls.do_handshake, lambda: tls.write(b"ok")]
    with contextlib.suppress(OSError), sock:
        while left:
            try:
                left[0]()
                del left[0]
            except ssl.SSLWantReadError:
                sock.sendall(sent.read())
                received.write(sock.recv(1 << 16) or b"no TLS")
            except ssl.SSLError:
                sock.sendall(sent.read())  # says why
                raise
        sock.sendall(sent.read())


def test_https_end_to_end(tmp_path: Path) -> None:
    """Through our own HTTP protocol, as `microvllm serve` sets it up; plain HTTP gets no answer there."""
    context = tls_context(ServerArgs(**HTTPS))
    with real_server(FakeClient(), tls=context) as port:
        with httpx.Client(verify=ssl.create_default_context(cafile=str(CERT))) as http:
            answer = http.post(
                f"https://localhost:{port}/v1/completions", json={**COMPLETION, "stream": True}
            )
            assert len(events(answer.text)) == 3
            assert http.get(f"https://localhost:{port}/health").status_code == 200
        assert b"200" not in raw_exchange(port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")


def test_a_handshake_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never begins one holds a connection that counts nowhere."""
    monkeypatch.setattr(server, "HANDSHAKE_DEADLINE_S", 0.5)
    context = tls_context(ServerArgs(**HTTPS))
    with (
        real_server(FakeClient(), tls=context) as port,
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock,
    ):
        began = time.monotonic()
        assert sock.recv(1) == b""
        assert time.monotonic() - began < 20  # asyncio's own deadline is a minute
