"""`dss serve`."""

import argparse
import os
import socket

from dss.cli.options import prepare_jax
from dss.errors import DssError, missing_package
from dss.paths import CONFIG_FILE

__all__ = ["add_arguments", "run"]

KEY = "DSS_API_KEY"
GRACE = 30  # seconds in which open requests are answered after SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "source",
        metavar="RUN|EXPORT",
        help="run directory, or folder of dss export (hf, ctranslate2)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (8000)")
    parser.add_argument("--name", help="model's name in requests (default: the folder's)")
    parser.add_argument(
        "--checkpoint", default="best", metavar="STEP", help="best (default), latest or a step"
    )
    parser.add_argument(
        "--key-env",
        metavar="VAR",
        help=f"environment variable with the API key that requests need, if it is set ({KEY})",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="most inputs of a batch (32)")
    parser.add_argument(
        "--wait", type=float, metavar="S", help="seconds that a batch waits for more inputs (0.005)"
    )
    parser.add_argument(
        "--queue", type=int, metavar="N", help="most inputs that wait; then status 429 (1024)"
    )
    parser.add_argument("--inputs", type=int, metavar="N", help="most inputs of a request (256)")
    parser.add_argument("--body", type=int, metavar="N", help="largest request, bytes (1048576)")


def run(args: argparse.Namespace) -> int:
    """Serves a student until a signal ends it."""
    folder = os.path.expanduser(args.source)
    if ":" not in args.source and not os.path.isfile(os.path.join(folder, CONFIG_FILE)):
        raise DssError(f"{args.source}: no run and no export: it has no {CONFIG_FILE}")
    if not 0 <= args.port < 2**16:
        raise DssError(f"--port {args.port}: give one from 0 to {2**16 - 1}")
    variable = args.key_env or KEY
    key = os.environ.get(variable, "").strip() or None
    if key is None and (args.key_env or variable in os.environ):
        raise DssError(f"{variable} has no API key; set it, or unset it to serve without a key")
    try:
        import uvicorn

        from dss.serving.app import Limits, make_app
    except ImportError as error:
        raise missing_package("a service", error.name, "serve") from None
    from dss.serving.model import open_model

    names = ("batch", "wait", "queue", "inputs", "body")
    given = {name: getattr(args, name) for name in names}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    prepare_jax(steps=False)
    with _listening(args.host, args.port) as listener:
        model = open_model(args.source, args.checkpoint, args.name)
        port = listener.getsockname()[1]

        def say(line: str) -> None:
            print(f"http://{args.host}:{port}: {line}", flush=True)

        app = make_app(model, limits=limits, key=key, say=say)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address.

    Raises:
      DssError: if the address is taken or is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DssError(f"--host {host} --port {port}: {reason}; give another") from None
    return listener
