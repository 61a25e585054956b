"""Real clients of the proxy: OpenAI's client, curl, a WebSocket client."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import Seen, Upstream, proxy, run, until, upstream

pytestmark = pytest.mark.t1


def chat(up: Upstream, seen: Seen) -> bytes:
    body = json.loads(seen.body)
    base = {"id": "c1", "created": 1, "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": "hello there"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        data = json.dumps(base | {"object": "chat.completion", "choices": [choice]}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
    out = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    for word in ("hello", " there"):
        choice = {"index": 0, "delta": {"content": word}}
        event = b"data: %b\n\n" % json.dumps(base | {"object": "chat.completion.chunk", "choices": [choice]}).encode()
        out += b"%x\r\n%b\r\n" % (len(event), event)
    event = b"data: [DONE]\n\n"
    return out + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("retries", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_openai_client_waits_and_gets_its_answer(early, retries):
    import openai

    from plugin.proxy.settings import Settings

    async def talk(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(chat(up, seen))
        return True

    async def main():
        async with upstream(talk) as up, proxy(Settings(early_stream=early, early_comment_every_s=0.02)) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            messages = [{"role": "user", "content": "hi"}]
            async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="k", max_retries=retries) as client:
                whole = asyncio.create_task(client.chat.completions.create(model="m", messages=messages))

                async def streamed() -> str:
                    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
                    return "".join([event.choices[0].delta.content or "" async for event in stream])

                parts = asyncio.create_task(streamed())
                await until(lambda: rig.pool.held == 2)
                await asyncio.sleep(0.1)
                rig.restore("a")
                assert (await whole).choices[0].message.content == "hello there"
                assert await parts == "hello there"
                assert len(up.seen) == 2, "each was sent once"

                # a final start failure is an APIStatusError (or, in an early stream, an
                # APIError)
                rig.trackers["a"].to(Phase.FAILED, "gone")
                from plugin.proxy.errors import StartFailed

                rig.pool.start_failed(StartFailed("engine-died", "the engine ended", retry_after_s=0.1))
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(model="m", messages=messages)
                assert caught.value.status_code == 503 and caught.value.code == "engine-died"
                assert rig.server.stats.outcomes["engine-died"] == retries + 1

    run(main())


@pytest.mark.slow
def test_the_openai_client_reads_an_early_streams_error():
    import openai

    from plugin.proxy.errors import StartFailed
    from plugin.proxy.settings import Settings

    async def main():
        async with (
            proxy(Settings(early_stream=True)) as rig,
            openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="k", max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            await until(lambda: rig.pool.held == 1)
            rig.pool.start_failed(StartFailed("engine-died", "the engine ended"))
            with pytest.raises(openai.APIError, match="the engine ended") as caught:
                async for _ in stream:
                    pass
            assert caught.value.code == "engine-died"

    run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_its_answers():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)

            async def curl(*arguments: str) -> str:
                process = await asyncio.create_subprocess_exec(
                    "curl",
                    "-sS",
                    "-m",
                    "30",
                    *arguments,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )
                out, _ = await process.communicate()
                return out.decode()

            assert json.loads(await curl(f"{rig.url}/a"))["target"] == "/a"
            assert (
                json.loads(await curl(f"{rig.url}/b", "-d", "x" * 5000))["length"] == 5000
            )  # with Expect: 100-continue
            assert (
                json.loads(await curl(f"{rig.url}/b", "-H", "Transfer-Encoding: chunked", "-d", "abc"))["length"] == 3
            )
            assert (await curl("-N", f"{rig.url}/stream")).count("data: ") == 5
            assert "200 OK" in await curl("-I", f"{rig.url}/stream")
            assert json.loads(await curl("--http2", f"{rig.url}/c", "-d", "abc"))["length"] == 3
            assert json.loads(await curl("--http1.0", f"{rig.url}/c"))["target"] == "/c"
            # curl removes dots from a path unless --path-as-is is given
            assert "not-found" in await curl("--path-as-is", f"{rig.url}/x/../-/status")

    run(main())


def test_a_real_websocket_client_and_server():
    from websockets.asyncio import client as websockets
    from websockets.asyncio.server import serve

    async def main():
        async def echo(connection):
            async for message in connection:
                await connection.send(message)

        async with serve(echo, "127.0.0.1", 0, max_size=None) as server, proxy() as rig:
            rig.add("a", server.sockets[0].getsockname()[1], phase=Phase.IDLE)
            asyncio.get_running_loop().call_later(0.1, rig.restore, "a")
            async with websockets.connect(f"ws://127.0.0.1:{rig.port}/v1/realtime?model=m", max_size=None) as client:
                for message in ("hello", b"\0\1", "x" * 3_000_000):
                    await client.send(message)
                    assert await client.recv() == message
            await until(lambda: rig.server.stats.outcomes["tunnel"] == 1)

    run(main())
