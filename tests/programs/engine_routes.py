"""Print the routes of a real engine's application as JSON, built in its own interpreter without starting the engine.

`engine_routes.py vllm|sglang ARGUMENTS…`, with the environment and arguments of the launch. With OPERATORS_ONLY set,
prints the routes that SGLang reserves for its operators (admin key). Sockets and mounts are routes too;
`openapi.json` lists only some.
"""

import json
import os
import sys


def vllm(arguments):
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    return build_app(args, ("generate",))


def sglang(arguments):
    from sglang.srt.entrypoints.http_server import app

    return app


def flat(routes):
    """Return every route, including those of included routers (newer FastAPIs keep them as routers)."""
    for route in routes:
        if hasattr(route, "path"):
            yield route
        else:
            yield from flat(route.effective_candidates())


def main(engine, *arguments):
    app = {"vllm": vllm, "sglang": sglang}[engine](arguments)
    found = {
        (method, route.path)
        for route in flat(app.routes)
        if "OPERATORS_ONLY" not in os.environ or getattr(route.endpoint, "_auth_level", "normal") != "normal"
        for method in (getattr(route, "methods", None) or {type(route).__name__.upper()})
    }
    with os.fdopen(int(os.environ["ROUTES_FD"]), "w") as file:
        json.dump(sorted(found), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # engines leave blocked threads
