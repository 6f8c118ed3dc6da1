"""A headless Chromium for tests, spoken to in its own DevTools protocol.

with Browser() as browser:
    page = browser.open("file:///tmp/report.html", width=390, height=844)
    assert page.evaluate("document.title") == "..."
    page.screenshot(Path("report.png"))
"""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

SECONDS_TO_START = 60.0


def install_browser() -> None:
    """Sees to it that there is a Chromium, or fails with the reason why there is none."""
    script = Path(__file__).with_name("install_browser.sh")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no browser: {done.stderr or done.stdout}"


class Browser:
    """A process with a profile of its own; closed with the block."""

    def __enter__(self) -> Browser:
        program = shutil.which("chromium")
        assert program, "there is no chromium: bash tests/install_browser.sh"
        self.profile = tempfile.mkdtemp(prefix="browser")
        self.loop = asyncio.new_event_loop()
        self.pages: list[Page] = []
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={self.profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([program, *options], **quiet)
        port, since = Path(self.profile) / "DevToolsActivePort", time.monotonic()
        while not port.exists() or "\n" not in port.read_text():
            assert self.process.poll() is None, "chromium ended at its start"
            assert time.monotonic() - since < SECONDS_TO_START, "chromium did not start"
            time.sleep(0.1)
        self.address = "http://127.0.0.1:" + port.read_text().split("\n")[0]
        return self

    def open(self, url: str, width: int, height: int) -> Page:
        """A page of this size in CSS pixels; a phone's, with its own viewport rules, below 600."""
        page = self.loop.run_until_complete(Page.connect(self, width, height))
        self.pages.append(page)
        if url != "about:blank":
            page.go(url)
        return page

    def __exit__(self, *_: object) -> None:
        for page in self.pages:
            page.close()
        self.process.terminate()
        self.process.wait(20)
        self.loop.close()
        shutil.rmtree(self.profile, ignore_errors=True)


class Page:
    """One tab. `requested` has every URL that it asked for, `errors` what its scripts threw."""

    def __init__(self, browser: Browser, session: aiohttp.ClientSession, socket: Any) -> None:
        self.browser, self.session, self.socket = browser, session, socket
        self.number = 0
        self.requested: list[str] = []
        self.errors: list[str] = []

    @classmethod
    async def connect(cls, browser: Browser, width: int, height: int) -> Page:
        session = aiohttp.ClientSession()
        async with session.put(f"{browser.address}/json/new") as answer:
            target = await answer.json()
        socket = await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        page = cls(browser, session, socket)
        for domain in ("Page", "Runtime", "Network"):
            await page._call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await page._call("Emulation.setDeviceMetricsOverride", **size)
        return page

    def go(self, url: str) -> None:
        """Goes to an address, and waits until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def go_until(self, url: str, expression: str, seconds: float = 60.0) -> None:
        """Tries an address again and again until the page there is what is asked, as a server needs time to start."""
        since = time.monotonic()
        while True:
            self.call("Page.navigate", url=url)
            time.sleep(1)
            if self.evaluate(expression):
                return
            assert time.monotonic() - since < seconds, f"{url} is not there after {seconds} s"

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A call of the protocol."""
        return self.browser.loop.run_until_complete(self._call(method, **params))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which must be plain; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60.0) -> Any:
        """The value of an expression, once it is true; fails with what the page shows if it does not get so."""
        since = time.monotonic()
        while not (value := self.evaluate(expression)):
            if time.monotonic() - since > seconds:
                shown = self.evaluate("document.body ? document.body.innerText.slice(0, 2000) : ''")
                raise AssertionError(f"not true within {seconds} s: {expression}\nthe page shows: {shown}")
            time.sleep(0.2)
        return value

    def screenshot(self, file: Path) -> None:
        """What is in view, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Closes the tab's connection."""
        self.browser.loop.run_until_complete(self._close())

    async def _close(self) -> None:
        await self.socket.close()
        await self.session.close()

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            answer = await asyncio.wait_for(self.socket.receive_json(), 60)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(answer["params"]["exceptionDetails"]))
