"""Print the sections `data` and `model` of a run that starts from Stable Diffusion 1.x or 2.x, a
folder in diffusers' layout or a name of the hub: put them into a configuration."""

import argparse

HELP = "print the settings of a run that starts from a diffusers folder"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("folder", help="folder in diffusers' layout, or OWNER/NAME of the hub")


def run(args: argparse.Namespace) -> int:
    """Print them as YAML."""
    import yaml

    from pretrain.describe import describe

    print(yaml.safe_dump(describe(args.folder), sort_keys=False, default_flow_style=None), end="")
    return 0
