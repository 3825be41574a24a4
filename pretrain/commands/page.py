"""`page`: both heads of a model side by side, in a browser on this machine."""

import argparse

from pretrain.commands._options import add_model, opened_model

HELP = "show a model's two heads side by side on a web page"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8400, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from contextlib import suppress

    from pretrain import mlflow_env
    from pretrain.errors import ConfigError
    from pretrain.heads_page import HeadsServer
    from pretrain.registry import version

    mlflow_env.load()
    with opened_model(args) as folder:
        predict, card = version.in_process(folder), version.card(folder)
    try:
        server = HeadsServer((args.host, args.port), predict, card)
    except OSError as error:
        raise ConfigError(
            f"--port={args.port} on {args.host} cannot be used ({error.strerror}); give another"
        ) from None
    print(f"both heads of {card.get('name', args.model)}: {server.url} (Ctrl-C ends)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0
