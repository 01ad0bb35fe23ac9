"""Headless Chromium, driven over a pipe by its DevTools protocol (chromedevtools.github.io)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

_LAST_S = 60.0


class Tab:
    """One page. Everything it requests, logs or throws is kept."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._number = write, read, b"", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **params: Any) -> Any:
        return self._call(method, **params)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        made = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Until an expression is true."""
        end = monotonic() + _LAST_S
        while not (found := self.run(condition)):
            assert monotonic() < end, f"never true: {condition}; {self.complaints}"
            sleep(0.05)
        return found

    def look(self, width: int, height: int, *, dark: bool, phone: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def press(self, key: str) -> None:
        text = {"Enter": "\r"}.get(key, "")
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "End": 35}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key], text=text)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._read, 1 << 16)
            assert got, "Chromium has ended"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\0")
        made: dict[str, Any] = json.loads(line)
        return made

    def _note(self, event: dict[str, Any]) -> None:
        kind, params = event["method"], event["params"]
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and params["entry"]["level"] == "error"):
            self.complaints.append(json.dumps(params)[:500])


@contextmanager
def chromium() -> Iterator[Tab]:
    """Skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium on this machine (apt-get install chromium)")
    (its_read, write), (read, its_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="moray-chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        shell = ["bash", "-c", f'exec 3<&{its_read} 4>&{its_write}; exec "$@"', "chromium", program, *options]
        process = subprocess.Popen(
            shell, pass_fds=(its_read, its_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(its_read)
        os.close(its_write)
        try:
            yield Tab(write, read)
        finally:
            process.terminate()
            process.wait(30)
            os.close(write)
            os.close(read)
