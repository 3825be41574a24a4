"""What it saves to encode pictures and captions beforehand: the same steps of one network that
starts from a folder in Stable Diffusion's layout, online and on encoded shards, in turn.

    python benchmarks/latents.py [--steps 8] [--size 128] [--batch 8] [--precision bf16]

The folder holds random networks of Stable Diffusion 1.5's structure at a quarter of its widths. One
process, one thread; the pictures are 255 of the embedded corpus. Processor seconds are told too:
other jobs on the machine change them less.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CHANNELS = (80, 160, 320, 320)  # Stable Diffusion's 320, 640, 1280, 1280
WARM = 2  # steps that are not counted


def make_folder(folder: Path) -> None:
    """Random networks in the layout that `describe` and the trainer read."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.support.stable_diffusion import SCHEDULE, tokenizer_folder

    torch.manual_seed(0)
    tokenizer_folder(folder / "tokenizer")
    UNet2DConditionModel(
        block_out_channels=CHANNELS, cross_attention_dim=192, norm_num_groups=16
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=16,
    ).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=12, num_attention_heads=3
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")


def settings(folder: Path, args: argparse.Namespace) -> list[str]:
    """Overrides of configs/debug.yaml."""
    from pretrain.describe import describe

    tree = describe(str(folder))
    tree["model"]["image_size"] = tree["data"]["size"] = args.size
    for part in ("autoencoder", "text_encoder"):
        tree["model"][part]["precision"] = args.precision
    tree["model"]["text_stream"] = {"head_layers": 6, "head_width": 192, "head_dim": 64}
    return [
        *(f"{name}={json.dumps(fields)}" for name, fields in tree.items()),
        f"data.train={ROOT}/data/emoji/heldout-renderings.json",
        *("data.jitter=0", "data.flip=0", "optimizer.rate_scales={}"),
        *(f"training.global_batch={args.batch}", f"engine.micro_batch={args.batch}"),
        *(f"evaluators.{e}=null" for e in ("validation", "zero_shot", "retrieval", "samples")),
    ]


class Side:
    """One way to train: its own loader, network and optimizer; times of its steps."""

    def __init__(self, config: Any) -> None:
        from pretrain.data.loader import Loader
        from pretrain.data.tokenizer import Tokenizer
        from pretrain.encoders import check_encodings
        from pretrain.engine import Engine
        from pretrain.pretrained import Pretrained
        from pretrain.train import build_task

        tokenizer = Tokenizer(config.data.tokenizer)
        task = build_task(config, tokenizer, storage=False)
        engine = config.engine.model_copy(update={"zero_stage": 0})
        batch = config.training.global_batch
        loads = Pretrained(config.model)
        self.engine = Engine(task, engine, config.optimizer, batch, pretrained=loads)
        loader = Loader(config.data, tokenizer, config.seed, batch, 0, 1)
        check_encodings(task.model, loader.encodings)
        self.batches = iter(loader)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.engine.step(next(self.batches), 1e-4)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    import torch

    from pretrain import config
    from pretrain.encode import encode
    from pretrain.encoders import Options
    from pretrain.engine import init_distributed
    from pretrain.run_config import RunConfig

    torch.set_num_threads(1)
    init_distributed()
    with tempfile.TemporaryDirectory(prefix="latents-") as scratch:
        folder, shards = Path(scratch) / "sd", Path(scratch) / "shards"
        make_folder(folder)
        given = settings(folder, args)
        online = config.load(RunConfig, ROOT / "configs/debug.yaml", given)
        began = time.perf_counter(), time.process_time()
        made = encode(online, str(shards), Options(batch=args.batch, text=True))
        seconds = (time.perf_counter() - began[0], time.process_time() - began[1])
        encoded = [f"data.train={made.manifests[0]}", "data.encoded=true", "data.encoded_text=true"]
        before = config.load(RunConfig, ROOT / "configs/debug.yaml", [*given, *encoded])
        sides = {"online": Side(online), "encoded": Side(before)}
        for _ in range(WARM + args.steps):
            for side in sides.values():
                side.step()
        print(
            f"encoding: {made.samples} samples, {made.samples / seconds[1]:.1f} a processor second"
        )
        rates = {}
        for name, side in sides.items():
            cpu, wall = (statistics.median(x[WARM:]) for x in (side.cpu, side.wall))
            rates[name] = args.batch / cpu
            print(
                f"{name:<8} {args.batch / cpu:8.2f} samples a processor second, "
                f"{args.batch / wall:8.2f} a second of the clock (medians of {args.steps} steps)"
            )
        print(f"encoded beforehand: {rates['encoded'] / rates['online']:.2f} times as fast")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
