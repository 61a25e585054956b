"""A double of an engine: the world's side of a launch, small enough to start in a second. Everything of ours around it is real.

Speaks as much of SGLang's and of vLLM's HTTP interface as quickthaw uses, in two processes (server and worker) that talk over a socket
pair, as the engines' do. What it generates is a function of the weights it holds in anonymous memory and of the prompt, so weights that
were dropped and not read again, or those of another model, show in its answers; at a temperature it samples with torch's generator. It
"compiles" once for each cache folder and maps what it compiled. On a "GPU" (ENGINE_DOUBLE_GPU=1) it sleeps and wakes as the engines do:
it refuses to generate while something is away, and a redundant resume ends SGLang's worker.

Standard library, and the double of torch beside it. tests/kits/launch_rig.py lays it out as an environment of its own.
"""

import atexit
import os
import random
import signal
import socket
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

from .launch import load_plugins, model_folder, options_of
from .server import Asking, handler
from .worker import Worker, compile_once


def main(engine):
    options = options_of(sys.argv[1:])
    model_folder(options["model"])
    if name := os.environ.get("ENGINE_DOUBLE_OPENS"):
        # A lock file that stays open, beside the model.
        held = open(Path(options["model"]).parent / name, "w")
        atexit.register(held.close)
    if os.environ.get("ENGINE_DOUBLE_STUBBORN") == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        compiled = compile_once()
        Worker(engine, options).serve(theirs)
        del compiled
        os._exit(0)
    theirs.close()
    load_plugins(engine)
    if "random-seed" in options or "seed" in options:
        random.seed(7)
    ask = Asking(ours)
    ask("facts")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server((options["host"], int(options["port"])), handler(engine, ask, options)) as server:
        server.serve_forever()
