"""A headless Chromium driven over DevTools, through a pipe: no driver program, no further package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT = 60  # seconds; a busy machine starts a browser slowly

# The browser reads commands from descriptor 3 and answers on 4. The pipes' own numbers may be these, so copy them first.
_START = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The program named by EM3_BROWSER, else the first Chromium on the path."""
    names = [os.environ["EM3_BROWSER"]] if "EM3_BROWSER" in os.environ else ["chromium", "chromium-browser",
                                                                             "google-chrome", "chrome"]  # fmt: skip
    return next(filter(None, map(shutil.which, names)), None)


@dataclass
class Page:
    """What came of opening a page."""

    width: int  # of the document, CSS pixels
    text: str  # as a reader sees it
    scripts: int
    errors: list[str] = field(default_factory=list)  # of the console, and exceptions
    requests: list[str] = field(default_factory=list)  # addresses beside the page's own and data:
    screenshot: bytes = b""  # PNG of the whole page


class Browser:
    """One browser process; ``with Browser(find_browser()) as browser: browser.open(path, 390)``."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="em3-browser-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs_in), str(theirs_out),
             program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--hide-scrollbars", "--disable-background-networking", "--remote-debugging-pipe",
             f"--user-data-dir={self._profile.name}"],
            pass_fds=(theirs_in, theirs_out), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number = b"", 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own helpers too
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> Page:
        """Loads a file in a fresh tab of that size, under 640 pixels as a phone does, and unfolds what is folded."""
        target = self._send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._events.clear()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable", {}, session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
        self._send("Emulation.setDeviceMetricsOverride", size, session)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("Emulation.setEmulatedMedia", {"features": scheme}, session)
        self._send("Page.navigate", {"url": path.as_uri()}, session)
        self._wait_for("Page.loadEventFired", session)

        def value(expression: str) -> Any:
            return self._send("Runtime.evaluate", {"expression": expression}, session)["result"].get("value")

        value("for (const details of document.querySelectorAll('details')) details.open = true")
        page = Page(value("document.documentElement.scrollWidth"), value("document.body.innerText"),
                    value("document.scripts.length"))  # fmt: skip
        shot = self._send("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": {
            "x": 0, "y": 0, "width": width, "height": value("document.documentElement.scrollHeight"), "scale": 1,
        }}, session)  # fmt: skip
        page.screenshot = base64.b64decode(shot["data"])
        self._sort(page, path.as_uri())
        self._send("Target.closeTarget", {"targetId": target})
        return page

    def _sort(self, page: Page, own: str) -> None:
        for event in self._events:
            what = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                page.errors.append(json.dumps(what["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                page.errors.append(json.dumps(what["args"]))
            elif event["method"] == "Log.entryAdded":
                page.errors.append(what["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = what["request"]["url"]
                if url != own and not url.startswith("data:"):
                    page.requests.append(url)

    def _send(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        until = time.monotonic() + TIMEOUT
        while True:
            answer = self._receive(until, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _wait_for(self, method: str, session: str) -> None:
        until = time.monotonic() + TIMEOUT
        while not any(e["method"] == method and e.get("sessionId") == session for e in self._events):
            self._events.append(self._receive(until, method))

    def _receive(self, until: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing about {waiting_for} for {TIMEOUT} s")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended before {waiting_for}, exit status {self._process.wait()}")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer
