"""The chat page's files and headers; what it does in a browser is in test_page_browser.py."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from fake_client import FakeClient
from http_tools import in_process, raw_exchange, real_server

from microvllm.openai_compat.api.page import FILES, FOLDER

SCRIPTS = sorted(FOLDER.glob("*.js"))


def policy(answer: httpx.Response) -> dict[str, str]:
    parts = (part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split(";"))
    return dict(parts)


class TestFiles:
    def test_each_is_served(self) -> None:
        assert {FOLDER / name for name in FILES.values()} == set(FOLDER.iterdir())

    @pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
    def test_nothing_is_loaded_from_elsewhere(self, file: Path) -> None:
        text = file.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.findall(r"(?:https?:|[\"'(])//[\w.]", text)
        assert "@import" not in text and "url(" not in text
        # An address that begins with a slash would leave the path prefix of a proxy.
        assert not re.findall(r"(?:href|src|action)=[\"']/|(?:call|fetch|import|from)[ (]+[\"'`]/", text)

    @pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
    def test_text_is_never_made_markup_or_code(self, file: Path) -> None:
        ways = r"(inner|outer|set)HTML|insertAdjacent|document\.write|DOMParser|ContextualFragment|srcdoc"
        assert not re.findall(
            ways + r"|\beval\b|\bFunction\(|setTimeout\([\"'`]|\.src\b|\.cookie\b", file.read_text("utf-8")
        )

    @pytest.mark.parametrize(
        "file", [*SCRIPTS, FOLDER / "page.css", FOLDER / "index.html"], ids=lambda file: file.name
    )
    def test_it_can_be_read(self, file: Path) -> None:
        lines = file.read_text("utf-8").splitlines()
        assert len(lines) <= 500 and max(map(len, lines)) <= 120

    def test_nothing_stands_inline(self) -> None:
        text = (FOLDER / "index.html").read_text("utf-8")
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", text)

    def test_everything_has_a_name(self) -> None:
        """A screen reader announces a field by its label."""
        text = (FOLDER / "index.html").read_text("utf-8")
        labels = set(re.findall(r'<label for="([\w-]+)"', text))
        for attributes in re.findall(r"<(?:input|textarea|select)\b([^>]*)>", text):
            (name,) = re.findall(r'\bid="([\w-]+)"', attributes)
            assert name in labels or "aria-label=" in attributes, name

    def test_the_script_finds_what_it_looks_for(self) -> None:
        ids = set(re.findall(r'\bid="([\w-]+)"', (FOLDER / "index.html").read_text("utf-8")))
        named = {
            name for file in SCRIPTS for name in re.findall(r'\$\("([\w-]+)"\)', file.read_text("utf-8"))
        }
        assert named and named <= ids


class TestHeaders:
    async def test_every_file(self) -> None:
        async with in_process(FakeClient()) as http:
            answers = {path: await http.get(path) for path in FILES}
        for path, answer in answers.items():
            assert answer.status_code == 200 and answer.content == (FOLDER / FILES[path]).read_bytes()
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-cache"
            rules = policy(answer)
            assert rules["default-src"] == "'none'" and rules["script-src"] == rules["style-src"] == "'self'"
            assert rules["require-trusted-types-for"] == "'script'" and rules["frame-ancestors"] == "'none'"
            assert "unsafe" not in answer.headers["content-security-policy"]
        types = [answer.headers["content-type"].partition(";")[0] for answer in answers.values()]
        assert types == ["text/html", "text/css", "image/svg+xml", *["text/javascript"] * 4]

    @pytest.mark.parametrize("path", FILES)
    async def test_a_client_that_has_it_is_told_so(self, path: str) -> None:
        async with in_process(FakeClient()) as http:
            etag = (await http.get(path)).headers["etag"]
            assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
            for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
                answer = await http.get(path, headers={"if-none-match": known})
                assert answer.status_code == 304 and not answer.content, known
                assert answer.headers["etag"] == etag and answer.headers["cache-control"] == "no-cache"
            assert (await http.get(path, headers={"if-none-match": '"other"'})).status_code == 200

    def test_head(self) -> None:
        with real_server(FakeClient()) as port:
            head = raw_exchange(port, b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n")
        assert b"content-length: %d" % len((FOLDER / "index.html").read_bytes()) in head and b"etag:" in head


class TestAccess:
    async def test_the_page_is_open_and_what_it_shows_is_not(self) -> None:
        async with in_process(FakeClient(), api_keys=("k",)) as http:
            assert [(await http.get(path)).status_code for path in FILES] == [200] * len(FILES)
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.post("/v1/chat/completions", json={"messages": []})).status_code == 401
            assert (await http.get("/page/../v1/models")).status_code == 401

    async def test_only_hosts_that_are_served_here(self) -> None:
        async with in_process(FakeClient(), allowed_hosts=None) as http:
            assert (await http.get("/", headers={"host": "evil.example"})).status_code == 403
            assert (await http.get("/", headers={"host": "localhost:8000"})).status_code == 200

    async def test_below_the_prefix_of_a_proxy(self) -> None:
        async with in_process(FakeClient(), root_path="/llm") as http:
            for path in FILES:
                assert (await http.get(f"/llm{path}")).content == (await http.get(path)).content

    async def test_it_can_be_switched_off(self) -> None:
        async with in_process(FakeClient(), page=False) as http:
            assert [(await http.get(path)).status_code for path in FILES] == [404] * len(FILES)
            assert (await http.get("/docs")).status_code == 200

    async def test_no_other_file_and_no_other_method(self) -> None:
        async with in_process(FakeClient()) as http:
            for path in (
                "/page",
                "/page/",
                "/page/index.html",
                "/page/../api/page.py",
                "/page/%2e%2e/config.py",
            ):
                assert (await http.get(path)).status_code == 404, path
            assert (await http.post("/")).status_code == 405

    async def test_other_sites_may_not_read_it(self) -> None:
        async with in_process(FakeClient()) as http:
            answer = await http.get("/", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
