"""A page in headless Chromium, which tests drive by the DevTools protocol over two pipes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOUND = shutil.which("chromium") or shutil.which("google-chrome")
_SECONDS = 60  # the longest wait for an answer: the machine may be busy

# Chromium reads commands from descriptor 3 and answers on 4
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A browser tab, and the errors that its console reported."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._left, self._number = commands, answers, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._left:
            if not select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer within {_SECONDS} s")
            if not (read := os.read(self._answers, 1 << 20)):
                raise ConnectionError("Chromium has ended")
            self._left += read
        text, _, self._left = self._left.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.errors.append(json.dumps(params))
            case "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(params["args"]))
            case "Network.requestWillBeSent" if not params["request"]["url"].startswith(
                ("file:", "data:")
            ):
                self.errors.append(f"asks for {params['request']['url']}")
        return message

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def get(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Sets the size of the window in pixels, and the light or dark colour scheme."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **sizes, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the whole page to a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            code = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36}[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def point(self, selector: str, across: float, down: float, kind: str = "mouseMoved") -> None:
        """Sends a mouse event at a point of an element; the point is in fractions of its size."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.get(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.get(f"{element}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + across * box["width"], box["y"] + down * box["height"]
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.point(selector, 0.5, 0.5, kind)


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """Starts a browser with one tab; the browser keeps its profile in `folder`."""
    commands, answers = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-S", "-c", _START, str(commands[0]), str(answers[1]), str(FOUND)),
            *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--no-first-run", "--disable-extensions", "--disable-component-update"),
            *("--disable-background-networking", f"--user-data-dir={folder / 'profile'}"),
            *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"),
        ],
        pass_fds=(commands[0], answers[1]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (commands[0], answers[1]):
        os.close(end)
    try:
        yield Page(commands[1], answers[0])
    finally:
        for end in (commands[1], answers[0]):
            os.close(end)
        process.terminate()
        process.wait()
