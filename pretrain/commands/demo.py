"""`demo`: the main job end to end, each step a process of its own, as a user would start it."""

import argparse

from pretrain.commands._options import add_overrides

HELP = (
    "train the quickstart, score it, register it, and use the registered model from a fresh process"
)
PROMPTS = (
    "red apple",
    "green apple",
    "blue car",
    "sunflower",
    "tiger",
    "pizza",
    "penguin",
    "house",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--config", default="configs/quickstart.yaml", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    add_overrides(parser)
    parser.add_argument(
        "--alias", default="champion", help="alias of the registered version (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run every step; the first that fails ends the demo with its own code."""
    import json
    import os
    import subprocess
    import sys
    import time

    from pretrain import config, summary
    from pretrain.run_config import RunConfig, check_evaluators
    from pretrain.tracking import recorded_run

    settings = config.load(RunConfig, args.config, args.overrides)
    settings.check_ranks(args.ranks)
    output, began = settings.output, time.monotonic()
    overrides = [part for text in args.overrides for part in ("--set", text)]

    def step(title: str, *arguments: str, capture: bool = False) -> str:
        print(f"\n== {title}\n   $ python {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"error: this step ended with code {done.returncode}", file=sys.stderr)
            raise SystemExit(done.returncode)
        return done.stdout or ""

    train = (
        "-m",
        "launcher",
        "local",
        "--config",
        args.config,
        "--ranks",
        str(args.ranks),
        *overrides,
    )
    step("train on this machine, through the deepspeed launcher", *train)
    name, folder = settings.name, f"{output}/model"
    step(
        "export the last checkpoint", "-m", "pretrain", "export", "--output", output, "--to", folder
    )
    step(
        "register it in MLflow",
        *("-m", "pretrain", "register", "--model", folder, "--output", output),
    )
    tracked = recorded_run(output)
    step(
        f"make it the {args.alias}, if it passes the gate of the configuration",
        *("-m", "pretrain", "promote", f"models:/{name}@candidate", "--to", args.alias),
        *("--config", args.config, *overrides, "--uri", tracked.uri),
    )
    model = f"models:/{name}@{args.alias}"
    zero_shot = check_evaluators(settings.evaluators).get("zero_shot")
    sets = zero_shot.model_dump()["sets"].values() if zero_shot else ()
    manifest = next((one["manifest"] for one in sets if one["manifest"]), None)
    extra = {"MLflow run": f"{tracked.run_id}  ({tracked.uri})", "registered": model}
    if manifest:
        grid = f"{output}/samples/registered.png"
        prompts = [part for p in PROMPTS for part in ("--prompt", p)]
        printed = step(
            "pull it in a fresh process, classify and generate",
            *(
                "-m",
                "pretrain",
                "score",
                model,
                "--uri",
                tracked.uri,
                "--manifest",
                manifest,
                "--grid",
                grid,
                *prompts,
            ),
            capture=True,
        )
        score = json.loads(printed.strip().splitlines()[-1])
        extra["from registry"] = (
            f"top-1 {score['top1']:.1%}, top-5 {score['top5']:.1%}; grid {score['grid']}"
        )
    print(f"\n== summary ({(time.monotonic() - began) / 60:.1f} min)")
    print(summary.render(summary.read(output), extra))
    print(f"\nlook: mlflow ui --backend-store-uri {tracked.uri}   ({os.path.abspath(output)})")
    return 0
