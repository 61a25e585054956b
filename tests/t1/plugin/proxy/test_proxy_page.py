"""The admin page in a real headless Chromium: its text at both widths and in both colour schemes, while the proxy runs."""

from __future__ import annotations

import asyncio
import io
import os
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from plugin.proxy.errors import StartFailed
from plugin.proxy.http.address import tcp
from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.start_times import Kind
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase, PhaseTracker, Span
from tests.kits.browser_kit import Page, browser
from tests.kits.proxy.rig import proxy, run, until, upstream

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("browser")]

COLD = ((Phase.STARTING, 11.2), (Phase.LOADING, 4.6), (Phase.WARMING, 24.5))
RESTORED = ((Phase.RESTORING, 0.22), (Phase.WAKING, 0.04), (Phase.VERIFYING, 0.14))
QWEN = Facts("Qwen2.5-7B", "vllm 0.32.0", "vllm-qwen-3f9a1c2b7d", 17_900_000_000, ("NVIDIA H200", "NVIDIA H200"))
SMOL = Facts("SmolLM2-135M", "sglang 0.5.23", "sglang-smol-9e02d1aa40", 2_390_000_000)
TOO_SMALL = """[...document.querySelectorAll("body *")].filter(node => node.checkVisibility() && node.innerText
  && [...node.childNodes].some(child => child.nodeType === 3 && child.nodeValue.trim())
  && parseFloat(getComputedStyle(node).fontSize) < 12).map(node => node.innerText)"""
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


async def never() -> None:
    """A wake that runs until it is cancelled."""
    await asyncio.Event().wait()


def measured(pool: ReplicaPool, kind: Kind, phases: tuple[tuple[Phase, float], ...], times: int = 1) -> None:
    at, spans = 0.0, []
    for phase, took in phases:
        spans.append(Span(phase, at, took))
        at += took
    for _ in range(times):
        pool.history.record(kind, at, tuple(spans))


async def fits_a_phone(page: Page, *words: str) -> None:
    """Assert that the page contains `words` at 390 px, in letters of 12 px and more, and does not scroll sideways."""
    await page.size(390)
    await page.wait_text(*words)
    assert await page.run(TOO_SMALL) == [] and not await page.run(TOO_WIDE)
    await page.size(1280)


async def colours(page: Page) -> Counter[tuple[int, ...]]:
    from PIL import Image

    with Image.open(io.BytesIO(await page.screenshot())) as image:
        return Counter({colour: n for n, colour in image.convert("RGB").getcolors(1 << 22)})


def test_the_page_follows_one_engine_from_asleep_to_gone_and_back(tmp_path):
    """One page, never reloaded."""

    async def main():
        async with upstream() as up, browser(tmp_path / "profile") as page:
            async with proxy(wake=never, sleep_after_s=600) as rig:
                replica = rig.add("a", up.port, phase=Phase.ASLEEP)
                rig.pool.facts = lambda: QWEN
                measured(rig.pool, Kind.COLD, COLD)
                for phases in (RESTORED, ((Phase.RESTORING, 13.4),), RESTORED):
                    measured(rig.pool, Kind.RESTORED, phases)
                await page.open(f"{rig.url}/-/")
                asleep = "Asleep: the next request wakes it, usually 0.4 s"
                text = await page.wait_text(asleep, "Qwen2.5-7B", "vllm 0.32.0", "vllm-qwen-3f9a1c2b7d 18 GB", rig.url)
                assert "none: no engine runs" in text and "2 × NVIDIA H200, nothing held" in text, "what it costs"
                assert f"on {socket.gethostname()}" in text and "after 10 min without a request" in text
                assert "101 times faster" in text, "medians: the one slow restore does not count"
                await fits_a_phone(page, asleep)

                waiting = [asyncio.create_task(rig.get(f"/{n}")) for n in range(7)]
                for phase in (Phase.MOUNTING, Phase.RESTORING):
                    rig.trackers["a"].to(phase)
                text = await page.wait_text("Restoring: ", "so far, ", "7 requests wait for it", "held\n7", "now, ")
                assert "13.4" not in text.partition("so far")[2].partition(";")[0]
                await fits_a_phone(page, "the usual 0.4 s", "7 requests wait for it")
                assert (await colours(page))[0x16, 0x99, 0xB8] > 500, "the bar of the restore under way is painted"
                replica.engine_pid = os.getpid
                for phase in (Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                    rig.trackers["a"].to(phase)
                assert {(await task).status for task in waiting} == {200}
                text = await page.wait_text("Serving for ", "held\n0", "answered\n7", "B held", "forwarded 7")
                assert f"127.0.0.1:{up.port}, process {os.getpid()}" in text
                assert await page.run("document.getElementById('said').innerText") == "Qwen2.5-7B: serving"
                assert await page.run("document.getElementById('said').ariaLive") == "polite"
                assert "status\nmetrics" in text, "links"

                rig.trackers["a"].to(Phase.ASLEEP)
                rig.trackers["a"].to(Phase.MOUNTING)
                rig.trackers["a"].to(Phase.FAILED, "engine-died")
                await until(lambda: rig.pool.replicas["a"].tracker.phase is Phase.FAILED)
                rig.pool.waker.fail_elsewhere(
                    StartFailed("engine-died", "it exited with <b>code 3</b>", retry_after_s=25.0)
                )
                await page.wait_text(
                    "Failed: new requests are refused for ", "engine-died: it exited with <b>code 3</b>"
                )
                await fits_a_phone(page, "Failed: ")
                rig.restore("a")
                rig.trackers["a"].to(Phase.ASLEEP)
                assert "engine-died" not in await page.wait_text("Asleep: "), "a failure that is over"
                place = (("127.0.0.1", rig.port),)
            await page.wait_text("The proxy does not answer", "Its last answer came ")
            assert await page.run("parseFloat(getComputedStyle(document.querySelector('#gone h2')).fontSize)") >= 24
            assert await page.run("document.title") == "Gone · quickthaw"
            await fits_a_phone(page, "The proxy does not answer")
            server = ProxyServer(ReplicaPool(), Settings())
            await server.start(socket.create_server(*place))
            try:
                await page.run("tick()")
                text = await page.text()
                assert "does not answer" not in text and "no answer" not in text and "up " in text
            finally:
                await server.shutdown(0.02)
            assert not any(seen.target.startswith("/-") for seen in up.seen)

    run(main())


@asynccontextmanager
async def two_models() -> AsyncIterator[tuple[list[ReplicaPool], str]]:
    pools = [
        ReplicaPool(name="qwen", wake=never, sleep_after_s=600),
        ReplicaPool(name="smol", wake=never, sleep_after_s=600),
    ]

    class Both:
        def pools(self):
            return pools

    server = ProxyServer(Both(), Settings())
    sock = socket.create_server(("127.0.0.1", 0))
    await server.start(sock)
    try:
        yield pools, f"http://127.0.0.1:{sock.getsockname()[1]}/-/"
    finally:
        await server.shutdown(0.02)


def test_two_models_are_shown_side_by_side_with_place_and_costs(tmp_path):
    boxes = "[...document.querySelectorAll('.pool')].map(({ offsetLeft, offsetTop }) => [offsetLeft, offsetTop])"
    cards = "[...document.querySelectorAll('.pool')].map(card => card.innerText)"

    async def main():
        async with two_models() as (pools, url), browser(tmp_path / "profile") as page:
            for pool, facts, port, phase in zip(
                pools, (QWEN, SMOL), (8001, 8002), (Phase.SERVING, Phase.ASLEEP), strict=True
            ):
                replica = pool.add(pool.name, PhaseTracker(phase=phase), tcp("127.0.0.1", port))
                pool.facts = lambda facts=facts: facts
                replica.engine_pid = lambda serving=phase is Phase.SERVING: os.getpid() if serving else None
                measured(pool, Kind.COLD, COLD)
                measured(pool, Kind.RESTORED, RESTORED, 3)
            await page.size(1280)
            await page.open(url)
            await page.wait_text("Serving", "Asleep", "smol")
            qwen, smol = await page.run(cards)
            for text, facts, size, port in ((qwen, QWEN, "18 GB", 8001), (smol, SMOL, "2.4 GB", 8002)):
                assert facts.model in text and facts.engine in text and f"{facts.snapshot} {size}" in text
                assert f"127.0.0.1:{port}" in text and f"on {socket.gethostname()}" in text
                assert "0.40 s restore, median of 3" in text and "40.3 s cold start, measured once" in text
            assert "B held" in qwen and "2 × NVIDIA H200" in qwen
            assert "none: no engine runs" in smol and "GPU\nnone" in smol
            (left, top), (right, same) = await page.run(boxes)
            assert left < right and top == same
            assert (await colours(page))[0xE3, 0xAB, 0x3D] > 500, "the bars of loading are painted"
            if folder := os.environ.get("QUICKTHAW_TEST_PICTURES"):  # docs/page.png is made in this way
                (Path(folder) / "page.png").write_bytes(await page.screenshot())
            await fits_a_phone(page, "Serving", "Asleep")
            await page.size(390)
            (left, top), (same, below) = await page.run(boxes)
            assert left == same and top < below

    run(main())


def test_a_selection_survives_the_refresh(tmp_path):
    async def main():
        async with upstream() as up, proxy() as rig, browser(tmp_path / "profile") as page:
            rig.add("a", up.port)
            measured(rig.pool, Kind.RESTORED, RESTORED)
            await page.open(f"{rig.url}/-/")
            (before,) = re.findall(r"Serving for \d+ s", await page.wait_text("Serving for ", "restoring"))
            await page.run("window.kept = [...document.querySelectorAll('#pools *, #proxy *')], null")
            # From inside a text that changes every second to the end of a constant one.
            await page.run(
                "getSelection().setBaseAndExtent(document.querySelector('[data-text=say]').firstChild, 1,"
                " document.querySelector('[data-text=startsTitle]').firstChild, 4), null"
            )
            for n in range(3):
                await rig.get(f"/{n}")
            await page.wait_text("forwarded 3")
            await page.run("new Promise(done => setTimeout(done, 1100))")
            assert before not in await page.text()
            chosen = await page.run("getSelection().toString()")
            assert chosen.startswith("for ") and chosen.endswith("Last")
            assert await page.run("kept.every(node => node.isConnected)"), "changed in place"

    run(main())


def test_colour_schemes_and_content_security_policy(tmp_path):
    async def main():
        async with upstream() as up, proxy() as rig, browser(tmp_path / "profile") as page:
            rig.add("a", up.port)
            shades = {}
            for scheme in ("light", "dark"):
                await page.set_color_scheme(scheme)
                await page.open(f"{rig.url}/-/")
                await page.wait_text("Serving")
                ((shades[scheme], _),) = (await colours(page)).most_common(1)
            assert min(shades["light"]) > 200 and max(shades["dark"]) < 50
            assert await page.run("getComputedStyle(document.documentElement).colorScheme") == "light dark"
            loaded = await page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
            assert {name for name in loaded if not name.startswith("data:")} == {f"{rig.url}/-/status"}
            refused = "fetch('http://127.0.0.2:1/').catch(error => error.message)"
            assert "Content Security Policy" in await page.run(
                f"new Promise(done => {{ addEventListener('securitypolicyviolation', () => done('Content Security Policy')); {refused}; }})"
            )
            raw = await rig.get("/-/")
            assert raw.headers["content-security-policy"].startswith("default-src 'none'; style-src 'nonce-")
            assert "form-action 'none'" in raw.headers["content-security-policy"]
            text = raw.body.decode().replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text and "https://" not in text

    run(main())


def test_a_browser_signs_in_and_out(tmp_path, caplog):
    caplog.set_level("DEBUG", "quickthaw.proxy")

    async def main():
        settings = Settings(admin_token="s3cret", access_log=True)
        async with upstream() as up, proxy(settings) as rig, browser(tmp_path / "profile") as page:
            rig.add("a", up.port)
            await page.open(f"{rig.url}/-/?token=s3cret")
            await page.wait_text("Admin token")
            assert "Serving" not in await page.text(), "a token in the URL opens nothing"
            await page.open(f"{rig.url}/-/")
            await page.wait_text("Admin token")
            await fits_a_phone(page, "Sign in")
            await page.type("wrong")
            await page.enter()
            await page.wait_text("This is not the admin token.")
            await page.type("s3cret")
            await page.enter()
            text = await page.wait_text("Serving", "sign out")
            assert "Admin token" not in text
            assert await page.run("document.cookie") == "", "no script can read the session"
            assert await page.run("location.href") == f"{rig.url}/-/"
            (cookie,) = (await page.command("Network.getCookies", urls=[f"{rig.url}/-/"]))["cookies"]
            assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["path"] == "/-"
            session = f"Cookie: {cookie['name']}={cookie['value']}"
            assert (await rig.get("/-/status", session)).status == 200
            await page.run("document.getElementById('sign-out').click()")
            text = await page.wait_text("Admin token", "signed out")
            assert "Serving" not in text
            assert (await rig.get("/-/status", session)).status == 401, "the session ended on the server, too"

    run(main())
    assert "s3cret" not in caplog.text


def test_a_client_of_another_host_sees_why_it_is_refused(tmp_path):
    async def main():
        async with proxy() as rig, browser(tmp_path / "profile") as page:
            await page.command("Network.enable")
            await page.command("Network.setExtraHTTPHeaders", headers={"X-Forwarded-For": "10.0.0.9"})
            await page.open(f"{rig.url}/-/")
            await page.wait_text("This page is not for this client", "--admin-token")

    run(main())
