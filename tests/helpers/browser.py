"""A headless Chromium, driven over two pipes by its debugging protocol: real keys, screenshots, the console."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36} | {
    f"Arrow{way}": 37 + i for i, way in enumerate(("Left", "Up", "Right", "Down"))
}


def find_chromium() -> str | None:
    """The path of an installed one: Debian's package is `chromium`."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """The one tab of a browser."""

    def __init__(self, to: int, from_: int) -> None:
        self._to, self._from, self._read, self._count = to, from_, b"", 0
        self.messages: list[str] = []  # of the console, and errors that nobody caught
        self.requests: list[str] = []  # addresses that were asked for
        self._session: str | None = None
        (target,) = [t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        call: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            call["sessionId"] = self._session
        os.write(self._to, json.dumps(call).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while b"\0" not in self._read:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError("the browser has said nothing for a minute")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._read += part
        message, self._read = self._read.split(b"\0", 1)
        found = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.messages.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file, and wait until it says that it is ready (`data-ready` on its root)."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 30
        while self.run("document.documentElement?.dataset.ready") != "true":
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path.name} is not ready after 30 s; the console says {self.messages}")
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript, in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "an exception"))
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press and release keys, one after the other."""
        for key in keys:
            text = {"Enter": "\r", " ": " "}.get(key, "")
            code = {" ": "Space"}.get(key, key)
            for kind in ("keyDown", "keyUp"):
                self._call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=KEYS[key],
                    **({"text": text} if kind == "keyDown" and text else {}),
                )  # fmt: skip

    def point(self, selector: str) -> None:
        """Move the mouse onto the first element of a selector, until the page knows that it is there.

        Before its first frame a page takes no notice of the mouse.
        """
        element, deadline = f"document.querySelector({selector!r})", time.monotonic() + 30
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())")
        while True:
            for place in ({"x": 1, "y": 1}, {"x": x, "y": y}):
                self._call("Input.dispatchMouseEvent", type="mouseMoved", **place)
            if self.run(f"{element}.matches(':hover')"):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the mouse does not reach {selector!r} at {x}, {y}")
            time.sleep(0.02)

    def accessibility(self) -> list[dict[str, Any]]:
        """What a screen reader is told: the nodes of the accessibility tree."""
        return self._call("Accessibility.getFullAXTree")["nodes"]

    def screenshot(self) -> bytes:
        """A PNG of what is in the window."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def open_browser(chromium: str) -> Iterator[Page]:
    """A browser with a profile of its own, which ends with the block."""
    with tempfile.TemporaryDirectory() as profile:
        read_by_it, to = os.pipe()
        from_, written_by_it = os.pipe()
        command = [
            chromium, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(
            # The protocol's pipes are the file descriptors 3 and 4.
            ["sh", "-c", f'exec "$@" 3</dev/fd/{read_by_it} 4>/dev/fd/{written_by_it}', "sh", *command],
            pass_fds=(read_by_it, written_by_it), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_by_it)
        os.close(written_by_it)
        try:
            yield Page(to, from_)
        finally:
            os.close(to)  # it ends when nobody can speak to it
            os.close(from_)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
