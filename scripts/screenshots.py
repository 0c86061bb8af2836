#!/usr/bin/env python
"""Takes pictures of the chat page with a headless Chromium: wide and a phone's width, light and dark.

    python scripts/screenshots.py --out /tmp/pictures [--url http://127.0.0.1:8000]

Without a URL a server plays recorded answers, so that the pictures show reasoning, code, a table and a tool.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import Page, browser, chromium  # noqa: E402
from http_tools import real_server  # noqa: E402
from page_case import ScriptedClient  # noqa: E402

SIZES = {"wide": (1100, 800), "phone": (360, 740)}
QUESTION = "How do I reverse a string in Python?"
THOUGHT = "A slice is the shortest way. I should also name reversed(), which works for any sequence."
ANSWER = """A **slice** with a step of `-1` is the shortest way:

```python
def reverse(text: str) -> str:
    return text[::-1]
```

1. It copies the string, so the original stays as it is.
2. For other sequences there is `reversed`:

| | works for | returns |
|:--|:--|:--|
| `text[::-1]` | strings, lists, tuples | the same type |
| `reversed(x)` | any sequence | an iterator |

More is in [the documentation](https://docs.python.org/3/library/functions.html#reversed).
"""
CALL = '<tool_call>\n{"name": "run_python", "arguments": {"code": "\'abc\'[::-1]"}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "run_python"}}]'
IDLE = "document.getElementById('send').getAttribute('aria-label') === 'Send'"


@contextmanager
def recorded() -> Iterator[str]:
    """The address of a server that plays the recorded answer."""
    client = ScriptedClient(f"<think>{THOUGHT}</think>{ANSWER}{CALL}")
    client.delay = 0.002
    names, parsers = ("smollm2-135m-instruct",), {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with real_server(client, served_model_names=names, **parsers) as port:
        yield f"http://127.0.0.1:{port}"


def pictures(page: Page, url: str, name: str, out: Path, settings: str) -> Iterator[Path]:
    """Take the pictures of one window: the empty page, a conversation from its beginning, the settings."""
    width, height = SIZES[name]
    for dark in (False, True):
        page.open(f"{url}page/icon.svg")  # the page itself would keep its conversation when it is left
        page.evaluate(
            f"sessionStorage.clear(); sessionStorage.setItem('microvllm.settings', {json.dumps(settings)})"
        )
        page.open(url, width, height, dark=dark)
        page.wait("document.getElementById('load').textContent && document.getElementById('model').value")
        for step in ("empty", "chat", "settings"):
            if step == "chat":
                page.evaluate("document.getElementById('prompt').focus()")
                page.type(QUESTION)
                page.press("Enter")
                page.wait(f"document.querySelector('.assistant') !== null && {IDLE}")
                page.evaluate("document.getElementById('chat').scrollTop = 0")
            elif step == "settings":
                page.evaluate("document.getElementById('open-settings').click()")
            file = out / f"{name}-{'dark' if dark else 'light'}-{step}.png"
            page.screenshot(file)
            yield file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--url", help="address of a running server; recorded answers if not given")
    args = parser.parse_args()
    program = chromium()
    if program is None:
        parser.error("no Chromium is installed: apt-get install chromium, or CHROMIUM=its path")
    settings = json.dumps({"temperature": 0} if args.url else {"tools": TOOLS})
    args.out.mkdir(parents=True, exist_ok=True)
    with nullcontext(args.url) if args.url else recorded() as url, browser(program) as running:
        page = running.new_page()
        for name in SIZES:
            for file in pictures(page, url + "/", name, args.out, settings):
                print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
