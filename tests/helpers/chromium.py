"""A real Chromium that tests steer, over a pipe of its own: navigate, evaluate, press keys, look."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from report_in_a_browser import browser

_SEPARATOR = b"\0"
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowUp": 38, "ArrowRight": 39, "PageUp": 33, "PageDown": 34}
_WATCH = """
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) =>
        violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
    window.addEventListener("error", (event) => violations.push(`error ${event.message}`));
    window.addEventListener("unhandledrejection", (event) => violations.push(`rejected ${event.reason}`));
"""


class Chromium:
    """One tab. Requests and reports of its policy are noted."""

    def __init__(self, profile: Path) -> None:
        command = browser()
        assert command is not None, "no Chromium is installed"
        read_end, self._to_browser = os.pipe()
        self._from_browser, write_end = os.pipe()
        # Chromium reads its commands from descriptor 3 and answers on 4.
        script = f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}'
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", script, command, *options], pass_fds=(read_end, write_end), stderr=subprocess.DEVNULL
        )
        os.close(read_end)
        os.close(write_end)
        self._buffer, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        """Addresses of everything that was asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(10)
        os.close(self._to_browser)
        os.close(self._from_browser)

    def call(self, method: str, **parameters: Any) -> Any:
        """Return the result of a command of Chromium's protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + _SEPARATOR)
        for found in self._messages():
            if found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if found.get("id") == self._number:
                assert "error" not in found, found["error"]
                return found["result"]
        raise AssertionError("Chromium ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while _SEPARATOR not in self._buffer:
                data = os.read(self._from_browser, 1 << 16)
                assert data, "Chromium ended"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(_SEPARATOR)
            yield json.loads(line)

    def open(self, url: str) -> None:
        """Open the chat page and wait until it can be used."""
        self.call("Page.navigate", url=url)
        self.until("document.body?.dataset.ready === 'true'")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]["exception"]["description"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20.0) -> Any:
        """Return the first true value of an expression."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """Click an element that is there and can be seen."""
        self.until(
            f"document.querySelector({json.dumps(selector)})?.checkVisibility({{visibilityProperty: true}})"
        )
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, code: str = "", modifiers: int = 0) -> None:
        """Press a key. modifiers: 1 Alt, 2 Ctrl, 8 Shift."""
        number = _KEYS.get(key, ord(key[0].upper()))
        more: dict[str, Any] = {
            "key": key,
            "code": code or key,
            "modifiers": modifiers,
            "windowsVirtualKeyCode": number,
        }
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **more, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    def look(self, *, width: int, scheme: str = "light", height: int = 860) -> None:
        """Change the size of the window, and whether it is light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, file: Path) -> None:
        """Save what is seen."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
