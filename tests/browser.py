"""Headless Chromium, driven by the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path


def find_chromium() -> tuple[str, str] | None:
    """The browser and its driver; None = not installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


class Browser:
    """One window.

    Args:
        folder: of its profile and log.
    """

    def __init__(self, chromium: str, driver: str, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        log = open(folder / "chromedriver.log", "w")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=log)
        for _ in range(300):
            try:
                self.ask("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1280,900",
        ]
        options = {"binary": chromium, "args": [*arguments, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.ask("POST", "/session", capabilities={"alwaysMatch": wanted})["sessionId"]
        self.url += f"/session/{session}"

    def ask(self, method: str, path: str, **body: object):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", script=script, args=[])

    def press(self, selector: str, key: str) -> None:
        element = self.ask("POST", "/element", using="css selector", value=selector)
        self.ask("POST", f"/element/{next(iter(element.values()))}/value", text=key)

    def click(self, selector: str) -> None:
        element = self.ask("POST", "/element", using="css selector", value=selector)
        self.ask("POST", f"/element/{next(iter(element.values()))}/click")

    def wait(self, script: str, seconds: float = 60):
        """What a script returns, as soon as that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def complaints(self) -> list[dict]:
        """Errors and warnings on the console since the last call."""
        return [m for m in self.ask("POST", "/se/log", type="browser") if m["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("GET", "/screenshot")))

    def close(self) -> None:
        try:
            self.ask("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(20)
