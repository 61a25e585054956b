"""A small engine in a pod: `pod_engine.py ADDRESS PORT NAME SEEN [--start S] [--answer S]`. Standard library only.

It writes the id of each request (`x-request-id`) to SEEN before it answers it, one line each, so that a test sees which
were executed, where and how often. SIGTERM: it takes no new connection, ends its requests, and exits.
"""

import argparse
import asyncio
import json
import os
import signal


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("name")
    parser.add_argument("seen")
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--answer", type=float, default=0.0)
    given = parser.parse_args()
    await asyncio.sleep(given.start)
    seen = os.open(given.seen, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    busy, ending = 0, asyncio.Event()
    open_: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal busy
        open_.add(writer)
        try:
            while not ending.is_set():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
                fields = {key.lower(): value for key, value in fields.items()}
                busy += 1
                try:
                    asked = await reader.readexactly(int(fields.get("content-length", 0)))
                    path = head.split(" ")[1]
                    status = "200 OK"
                    if path.startswith("/-/"):
                        status = "404 Not Found"
                    elif path.startswith("/v1"):
                        os.write(seen, f"{fields.get('x-request-id', '?')} {given.name}\n".encode())
                        await asyncio.sleep(float(fields.get("x-answer", given.answer)))
                    body = json.dumps({"name": given.name, "pid": os.getpid()}).encode()
                    kind = "application/json"
                    if b"stream" in asked:
                        body, kind = b"data: " + body + b"\n\n", "text/event-stream"
                    writer.write(
                        f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                        + body
                    )
                    await writer.drain()
                finally:
                    busy -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            open_.discard(writer)
            writer.close()

    server = await asyncio.start_server(serve, given.address, given.port)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await ending.wait()
    server.close()
    while busy:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for writer in open_:
        writer.close()


asyncio.run(main())
