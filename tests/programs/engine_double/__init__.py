"""A double of an engine that starts in a second. Everything around it that belongs to quickthaw is real.

It implements the part of SGLang's and vLLM's HTTP interface that quickthaw uses, in two processes (server and worker)
connected by a socket pair, as the engines have. What it generates is a function of the prompt and of the weights in
anonymous memory, so lost weights, or those of another model, change its answers. At a temperature it samples with
torch's generator. It "compiles" once for each cache folder and maps the result. On a "GPU" (ENGINE_DOUBLE_GPU=1) it
sleeps and wakes as the engines do: it refuses to generate while memory is released, and a redundant resume ends
SGLang's worker. With ENGINE_DOUBLE_GPU=2 the server holds a CUDA context, too.

Standard library, and the double of torch beside it. tests/kits/launch_rig.py installs it in an environment of its
own.
"""

import atexit
import os
import random
import signal
import socket
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

from .launch import GPU, hold_context, load_plugins, model_folder, options_of, use_folders
from .server import WorkerChannel, handler
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
    if seconds := os.environ.get("ENGINE_DOUBLE_ALARM_S"):
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
    use_folders()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        if GPU:
            hold_context()
        compiled = compile_once()
        Worker(engine, options).serve(theirs)
        del compiled
        os._exit(0)
    theirs.close()
    if GPU > 1:
        hold_context()
    load_plugins(engine)
    if "random-seed" in options or "seed" in options:
        random.seed(7)
    ask = WorkerChannel(ours)
    ask("facts")

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 2048  # as that of the engines

    with Server((options["host"], int(options["port"])), handler(engine, ask, options)) as server:
        server.serve_forever()
