"""The page for people in a real headless Chromium: what it says, what it paints, and that it follows a start while it
goes on.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import shutil
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from plugin.proxy.pool.start_times import Kind
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase, Span
from tests.kits.proxy_rig import proxy, run, until, upstream

pytestmark = pytest.mark.t1

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
    "--window-size=1180,1000",
]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_real_browser(tmp_path):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("first", up.port)
            rig.add("<b>second</b>", up.port, phase=Phase.ASLEEP)
            for kind, phases in (
                (Kind.COLD, [("starting", 11.2), ("loading", 4.6), ("warming", 24.5)]),
                (Kind.RESTORED, [("restoring", 0.29), ("waking", 0.11), ("verifying", 0.08)]),
            ):
                at, spans = 0.0, []
                for name, took in phases:
                    spans.append(Span(Phase(name), at, took))
                    at += took
                rig.pool.history.record(kind, at, tuple(spans))
            for n in range(7):
                await rig.get(f"/{n}")

            async def browse(*arguments: str) -> bytes:
                assert CHROMIUM is not None
                profile = tmp_path / f"profile{len(list(tmp_path.iterdir()))}"
                process = await asyncio.create_subprocess_exec(
                    CHROMIUM,
                    *FLAGS,
                    f"--user-data-dir={profile}",
                    "--virtual-time-budget=3000",
                    *arguments,
                    f"{rig.url}/-/",
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                async with asyncio.timeout(60):
                    return (await process.communicate())[0]

            dom = (await browse("--dump-dom")).decode()
            assert "84 times faster" in dom and "first" in dom and "<td>&lt;b&gt;second&lt;/b&gt;</td>" in dom
            assert dom.count("<rect ") == 6 and "40.3 s" in dom and "0.48 s" in dom
            assert ">up " in dom, "the page has heard from the proxy"
            shot = tmp_path / "page.png"
            await browse(f"--screenshot={shot}")
            from PIL import Image

            with Image.open(shot) as image:
                assert image.size == (1180, 1000)
                colours = {colour: n for n, colour in image.convert("RGB").getcolors(1 << 20)}
            # the bars of restoring and of loading are really painted
            assert colours.get((0x16, 0x99, 0xB8), 0) > 500 and colours.get((0xE3, 0xAB, 0x3D), 0) > 500
            assert not any(seen.target.startswith("/-") for seen in up.seen)
            raw = (await rig.get("/-/")).body.decode()
            assert "http://" not in raw.replace("http://www.w3.org/2000/svg", "") and "https://" not in raw

    run(main())


Command = Callable[..., Awaitable[dict[str, Any]]]


@asynccontextmanager
async def browsing(profile: Path, url: str) -> AsyncIterator[Command]:
    """A page opened at `url`; what is yielded sends a command of the DevTools protocol and returns its result."""
    from websockets.asyncio.client import connect

    assert CHROMIUM is not None
    arguments = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
    quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
    process = await asyncio.create_subprocess_exec(CHROMIUM, *arguments, **quiet)
    try:
        place = profile / "DevToolsActivePort"
        await until(lambda: place.exists() and place.read_text().count("\n") == 1)
        port = place.read_text().split("\n")[0]

        def targets() -> list[dict[str, str]]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                return [t for t in json.loads(answer.read()) if t["type"] == "page" and t["url"].startswith(url)]

        while not (found := await asyncio.to_thread(targets)):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
        async with connect(found[0]["webSocketDebuggerUrl"], max_size=None) as line:
            numbers = itertools.count(1)

            async def command(method: str, **params: Any) -> dict[str, Any]:
                number = next(numbers)
                await line.send(json.dumps({"id": number, "method": method, "params": params}))
                while (message := json.loads(await line.recv())).get("id") != number:
                    pass
                return message["result"]

            yield command
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_follows_a_start_while_it_goes_on(tmp_path):
    """One page, never loaded anew: asleep, restoring with who waits and its waterfall so far, serving, stopped."""

    async def main():
        async with upstream() as up, proxy(Settings(admin_token="s3cret")) as rig:
            rig.add("a", up.port, phase=Phase.ASLEEP)
            spans = (Span(Phase.STARTING, 0.0, 30.0), Span(Phase.WARMING, 30.0, 14.0))
            rig.pool.history.record(Kind.COLD, 44.0, spans)
            async with browsing(tmp_path / "profile", f"{rig.url}/-/?token=s3cret") as command:

                async def said() -> str:
                    result = await command("Runtime.evaluate", expression="document.body?.innerText ?? ''")
                    return str(result["result"]["value"])

                async def says(*words: str) -> str:
                    async with asyncio.timeout(30):
                        while True:
                            text = await said()
                            if all(word in text for word in words):
                                return text
                            await asyncio.sleep(0.02)

                await says("Asleep", "cold, 44.0 s")
                waiting = [asyncio.create_task(rig.get(f"/{n}")) for n in range(7)]
                for phase in (Phase.MOUNTING, Phase.RESTORING):
                    rig.trackers["a"].to(phase)
                text = await says("Restoring, ", "so far", "now", "7\nheld now")
                assert "times faster" not in text, "nothing is claimed of a start that is not over"
                shot = base64.b64decode((await command("Page.captureScreenshot"))["data"])
                for phase in (Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                    rig.trackers["a"].to(phase)
                assert {(await task).status for task in waiting} == {200}
                await says("Serving", "0\nheld now", "7\nanswered by replicas", "times faster", "restored, ")
                painted = await command("Runtime.evaluate", expression="document.querySelectorAll('svg rect').length")
                assert painted["result"]["value"] == 3  # what took no time is no bar
                await rig.server.shutdown(0.1)
                await says("no answer from the proxy")
            from PIL import Image

            with Image.open(io.BytesIO(shot)) as image:
                colours = {colour: n for n, colour in image.convert("RGB").getcolors(1 << 20)}
            assert colours.get((0x16, 0x99, 0xB8), 0) > 500, "the bar of the restore under way is painted"

    run(main())
