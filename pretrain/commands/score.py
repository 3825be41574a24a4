"""`score`: a registered model on a labelled set, through mlflow.pyfunc alone, as any user of it
would."""

import argparse

HELP = "classify a labelled set, and draw a grid, with a registered model (models:/NAME@ALIAS)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--uri", help="MLflow tracking URI (default: MLFLOW_TRACKING_URI)")
    parser.add_argument(
        "--manifest", required=True, help="labelled set, such as data/emoji/heldout-renderings.json"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="also generate this; may be repeated"
    )
    parser.add_argument("--grid", default="grid.png", help="PNG to write when there are prompts")
    parser.add_argument(
        "--noises", type=int, default=0, help="chains that are averaged (0: the model's default)"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="steps of a chain (0: the model's default)"
    )


def run(args: argparse.Namespace) -> int:
    """Score, and print JSON."""
    import base64
    import io
    import json
    import sys

    from pretrain import mlflow_env

    uri = mlflow_env.resolve_uri(args.uri, "")
    import mlflow
    import numpy as np
    import pandas as pd
    from PIL import Image

    from pretrain.data.evalset import read_pictures
    from pretrain.evaluators.samples import grid

    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(args.model)
    pictures = read_pictures(args.manifest)
    classes = sorted({p.name for p in pictures})
    rows = [
        {"task": "classify", "image": base64.b64encode(p.png).decode(), "labels": classes}
        for p in pictures
    ]
    params = {"noises": args.noises, "steps": args.steps}
    answers = model.predict(pd.DataFrame(rows), params=params)
    scores = np.array(answers["probabilities"].tolist())
    truth = np.array([classes.index(p.name) for p in pictures])
    own = scores[np.arange(len(truth)), truth][:, None]
    rank = (~(scores < own)).sum(1) - 1  # ties and NaN count against the model
    report = {
        "model": args.model,
        "pictures": len(pictures),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "chance": 1 / len(classes),
    }
    if args.prompt:
        drawn = model.predict(pd.DataFrame([{"task": "generate", "text": p} for p in args.prompt]))
        images = [Image.open(io.BytesIO(base64.b64decode(x))) for x in drawn["image"]]
        grid(images, args.prompt, 8, 96).save(args.grid)
        report["grid"] = args.grid
    report["deepspeed_imported"] = "deepspeed" in sys.modules
    print(json.dumps(report))
    return 0
