"""A headless Chromium, driven through the DevTools protocol on a websocket: open a page, read its text, click, type,
take screenshots.

Chromium is a system package (setup/test-packages.txt). `.ci/run` installs it, and fails if its tests are skipped.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.kits.proxy.rig import LIMIT_S, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]


class Page:
    """One browser tab."""

    def __init__(self, line: ClientConnection) -> None:
        self._line = line
        self._numbers = itertools.count(1)

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a protocol command and return its result."""
        number = next(self._numbers)
        await self._line.send(json.dumps({"id": number, "method": method, "params": params}))
        async with asyncio.timeout(LIMIT_S):
            while (message := json.loads(await self._line.recv())).get("id") != number:
                pass
        assert "error" not in message, message
        return dict(message["result"])

    async def run(self, script: str) -> Any:
        """Evaluate a JavaScript expression and return its value. Awaits a promise."""
        result = await self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def open(self, url: str) -> None:
        await self.command("Page.navigate", url=url)

    async def size(self, width: int, height: int = 900) -> None:
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def set_color_scheme(self, name: str) -> None:
        """Prefer `light` or `dark`, as an operating system tells a browser."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        await self.command("Emulation.setEmulatedMedia", features=features)

    async def text(self) -> str:
        """Return the visible text."""
        return str(await self.run("document.body?.innerText ?? ''"))

    async def wait_text(self, *words: str) -> str:
        """Wait until the page contains all `words`; return its text."""
        text = ""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not all(word in text for word in words):
                    text = await self.text()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            missing = [word for word in words if word not in text]
            raise AssertionError(f"the page never said {missing}; it says:\n{text}") from None
        return text

    async def type(self, text: str) -> None:
        """Type into the focused element."""
        await self.command("Input.insertText", text=text)

    async def enter(self) -> None:
        """Press the enter key."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        await self.command("Input.dispatchKeyEvent", type="keyDown", **key)
        await self.command("Input.dispatchKeyEvent", type="keyUp", **key)

    async def screenshot(self) -> bytes:
        """Return the whole page as a PNG."""
        size = (await self.command("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])


@asynccontextmanager
async def browser(profile: Path, url: str = "about:blank") -> AsyncIterator[Page]:
    """Start a Chromium with its profile in the empty folder `profile` and yield its one tab, opened at `url`."""
    assert CHROMIUM is not None, "install chromium (setup/test-packages.txt)"
    quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank", **quiet
    )
    try:
        place = profile / "DevToolsActivePort"
        await until(lambda: place.exists() and place.read_text().count("\n") == 1)
        port, path = place.read_text().split("\n")
        async with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as whole:
            targets = await Page(whole).command("Target.getTargets")
        tab = next(target["targetId"] for target in targets["targetInfos"] if target["type"] == "page")
        async with connect(f"ws://127.0.0.1:{port}/devtools/page/{tab}", max_size=None) as line:
            page = Page(line)
            await page.command("Page.enable")
            await page.open(url)
            yield page
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), LIMIT_S)
        except TimeoutError:
            process.kill()
            raise
