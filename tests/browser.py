"""Drives a headless Chromium through its DevTools protocol, over two pipes: no port, no further package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from process_tools import PATIENCE_S

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-default-apps", "--no-proxy-server", "--mute-audio"),
    *("--force-color-profile=srgb", "--remote-debugging-pipe"),
)
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
}


def chromium() -> str | None:
    """The path of an installed Chromium; `CHROMIUM` in the environment names another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running Chromium. Commands and events are JSON, each ended by a null byte."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands = commands
        self._events = events
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._answers: dict[int, Any] = {}
        self.listeners: dict[str, Callable[[str, Any], None]] = {}

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command and return its result; raises `RuntimeError` with Chromium's complaint."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while number not in self._answers:
            self._read()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> None:
        part = os.read(self._events, 1 << 20)
        if not part:
            raise RuntimeError("Chromium has ended")
        *messages, self._buffer = (self._buffer + part).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self.listeners:
                self.listeners[message["sessionId"]](message["method"], message["params"])

    def new_page(self) -> Page:
        """A new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.call("Page.bringToFront")  # a tab that is not in sight draws nothing
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return page


class Page:
    """A tab. `problems` are its uncaught errors, violations of its policy and dialogs that a script opens."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.problems: list[str] = []
        browser.listeners[session] = self._on_event
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def open(self, url: str, width: int = 1200, height: int = 800, *, dark: bool = False) -> None:
        """Go to an address, in a window of this size; a narrow one is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.media(scheme="dark" if dark else "light")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")
        self.problems.clear()

    def _on_event(self, method: str, params: Any) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"].get("exception", params).get("description")))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
        elif method == "Log.entryAdded" and params["entry"]["source"] in ("security", "violation"):
            self.problems.append(params["entry"]["text"])

    def evaluate(self, code: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{code}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, code: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + PATIENCE_S
        while not (value := self.evaluate(code)):
            if time.monotonic() > end:
                text = self.evaluate("document.body.innerText")
                raise AssertionError(f"waited in vain for {code}; {self.problems}; the page: {text[-1500:]}")
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """The text of the last element that fits, as it is shown."""
        found: str = self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).innerText")
        return found

    def count(self, selector: str) -> int:
        number: int = self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")
        return number

    def click(self, selector: str, text: str = "") -> None:
        """Click at the last element that fits and has the text, as a mouse does."""
        place = self.evaluate(
            f"""(() => {{
                const all = [...document.querySelectorAll({json.dumps(selector)})];
                const node = all.filter((e) => e.innerText.includes({json.dumps(text)})).at(-1);
                node.scrollIntoView({{ block: "nearest" }});
                const box = node.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left",
                      clickCount=0 if kind == "mouseMoved" else 1)  # fmt: skip

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        params = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **params)
        self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    def media(self, *, scheme: str, reduced_motion: bool = False) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, file: Path) -> None:
        """Write a picture of the window once everything is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A Chromium with an empty profile. It reads commands from its file 3 and writes events to its file 4."""
    commands_in, commands = os.pipe()
    events, events_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        # A shell moves the pipes to these numbers; a function run in the fork would not be safe with threads.
        redirect = f'exec "$@" 3<&{commands_in} 4>&{events_out}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", *command],
            pass_fds=(commands_in, events_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands_in)
        os.close(events_out)
        try:
            yield Browser(commands, events)
        finally:
            os.close(commands)
            os.close(events)
            try:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
