"""The study's peers, by a plain loop: `python -m benchmarks._joint.peers KIND FOLDER CONFIG.json`.

Same loader and samples, optimizer, learning rates and clipping as the trainer's; no DeepSpeed.

two_tower   CLIP (Radford et al. 2021): the image tower is the alignment branch itself (encoder half
            of the U-Net and head) with a learned class token in the noisy query's place, so it
            differs from DiffDis by the diffusion alone; the text tower is the same text encoder.
plain_unet  diffusers' UNet2DConditionModel by its own forward pass, and the same text encoder; the
            same path, its noise drawn by torch's generator.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import config as configs
from pretrain.data.loader import Loader
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference import Heads, new_model
from pretrain.model.diffdis import DiffDis
from pretrain.optim import parameter_groups
from pretrain.rng import generator
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask, check_objectives
from pretrain.types import Batch

FINISHED = "_FINISHED"
STATE = "peer.pt"


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`, written out: symmetric cross-entropy over scaled cosines.

    open_clip_torch cannot be imported without torchvision. From its documentation: logits are
    exp(s) × image · text with s learned from ln(1 / 0.07), exp(s) at most 100, and the loss the
    mean of both directions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def forward(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """The loss of unit rows, row i of one belonging to row i of the other."""
        logits = self.log_scale.exp().clamp(max=100.0) * image_BE @ text_BE.T
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class TwoTower(nn.Module):
    """Two towers over a DiffDis's modules.

    The encoder's cross-attention needs some condition: a learned constant of the null prompt's
    shape stands there. The decoder is not built into it.
    """

    def __init__(self, model: DiffDis) -> None:
        super().__init__()
        text = model.config.text_encoder
        self._autoencoder, self._path = (model.autoencoder,), (model.image_path,)
        self.trunk, self.text_encoder, self.config = model.trunk, model.text_encoder, model.config
        unet: Any = self.trunk.unet
        for name in ("up_blocks", "conv_norm_out", "conv_out"):
            setattr(unet, name, nn.Identity())
        self.condition = nn.Parameter(torch.randn(1, text.length, text.width))
        self.class_token = nn.Parameter(torch.randn(1, text.query_dim) * text.query_dim**-0.5)
        self.clip = ClipLoss()
        self.register_buffer("null_tokens_L", model.null_tokens_L, persistent=False)

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit rows (B, E) of images in [-1, 1]."""
        z = self._autoencoder[0].encode(pixels_BCHW)
        n = len(z)
        clean = torch.zeros(n)
        encoded = self.trunk.encode(
            self._path[0].network_input(z, clean),
            clean,
            self.condition.expand(n, -1, -1),
            self.class_token.expand(n, -1),
            clean,
            torch.ones(n, dtype=torch.bool),
        )
        return F.normalize(self.trunk.predict_query(encoded), dim=-1)

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        text = self.text_encoder(batch.tokens_BL, batch.mask_BL)
        loss: Tensor = self.clip(self.embed_images(batch.pixels_BCHW), text.e_BE)
        return loss


class TowerHeads(Heads):
    """The towers in the place of the diffusion's heads, so that the same evaluators score both. An
    image is embedded in one pass: the chain's settings mean nothing."""

    def __init__(self, towers: TwoTower, config: Any) -> None:
        self.model: Any = towers
        self.config = config

    @torch.no_grad()
    def embed_tokens(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Unit rows."""
        e: Tensor = self.model.text_encoder(tokens_BL, mask_BL).e_BE
        return e

    @torch.no_grad()
    def embed_images(self, images_BCHW: Tensor, *_: Any, **__: Any) -> Tensor:
        """Unit rows."""
        rows: Tensor = self.model.embed_images(images_BCHW)
        return rows


class PlainUNet(nn.Module):
    """diffusers' U-Net under the image path of ``model``, whose initial weights it takes."""

    def __init__(self, model: DiffDis, caption_drop: float, seed: int) -> None:
        super().__init__()
        self.unet, self.text_encoder = model.trunk.unet, model.text_encoder
        self._model = (model,)  # for its path, its autoencoder and its null prompt
        self.caption_drop, self.seed = caption_drop, seed

    def forward(self, batch: Batch) -> Tensor:
        """The loss: the mean square error of the raw output, as L_IG."""
        model = self._model[0]
        path, draws = model.image_path, generator(self.seed, "plain", int(batch.positions_B[0]))
        z = model.autoencoder.encode(batch.pixels_BCHW)
        text, null_c = model.encode_text(batch.tokens_BL, batch.mask_BL)
        t = path.schedule.training_times(torch.rand(len(z), generator=draws))
        z_t = path.noised(z, torch.randn(z.shape, generator=draws), t)
        dropped = torch.rand(len(z), generator=draws) < self.caption_drop
        c = torch.where(dropped[:, None, None], null_c, text.c_BLD)
        times = path.schedule.embed(t)
        f = self.unet(path.network_input(z_t, t), times, encoder_hidden_states=c).sample
        return F.mse_loss(f, path.f_target(z, z_t, t))


def build(kind: str, config: RunConfig, tokenizer: Tokenizer) -> TwoTower | PlainUNet:
    """A peer of this kind, initialised from the run's seed, as the trainer's own model is."""
    torch.manual_seed(config.seed)
    model = new_model(config.model, tokenizer)
    if kind == "two_tower":
        return TwoTower(model)
    return PlainUNet(model, config.task.caption_drop, config.seed)


def load(kind: str, folder: Path, config: RunConfig, tokenizer: Tokenizer) -> nn.Module:
    """A trained peer: two towers as they are, a plain U-Net as the task whose image stream it is
    (diffusers' forward pass and ours agree to the bit: tests/parity/test_unet.py)."""
    state = torch.load(folder / STATE, weights_only=True)["module"]
    if kind == "two_tower":
        towers = build(kind, config, tokenizer)
        towers.load_state_dict(state)
        return towers.eval()
    model = new_model(config.model, tokenizer)
    peer = PlainUNet(model, config.task.caption_drop, config.seed)
    peer.load_state_dict(state)
    objectives = check_objectives({"generate": {}})
    return PretrainTask(model, objectives, config.task, config.seed).eval()


def train(kind: str, folder: Path, config: RunConfig) -> None:
    """Train to the end, or from the last state on; what is drawn depends on the sample's number
    alone."""
    folder.mkdir(parents=True, exist_ok=True)
    batch, total = config.training.global_batch, config.training.samples
    tokenizer = Tokenizer(config.data.tokenizer)
    module = build(kind, config, tokenizer)
    # The preset's names of parameters are those of a task.
    theirs = "unet" if kind == "plain_unet" else "trunk.unet"
    scales = {
        name.replace("model.trunk.unet", theirs): scale
        for name, scale in config.optimizer.rate_scales.items()
    }
    o = config.optimizer.model_copy(update={"rate_scales": scales})
    groups = parameter_groups(module, o)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=o.fused)
    samples, seconds = 0, 0.0
    if (folder / STATE).exists():
        saved = torch.load(folder / STATE, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        samples, seconds = saved["samples"], saved["seconds"]
    loader = iter(Loader(config.data, tokenizer, config.seed, batch, 0, 1, start=samples))
    while samples < total:
        began = time.perf_counter()
        loss = module(next(loader))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.engine.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = o.rate(samples, total) * group["rate_scale"]
        optimizer.step()
        before, samples = samples, samples + batch
        seconds += time.perf_counter() - began
        if (
            samples // config.training.log_every_samples
            > before // config.training.log_every_samples
        ):
            print(f"{samples:>9,} loss {loss.item():.4f} {samples / seconds:.1f} img/s", flush=True)
        if samples // config.checkpoint.every_samples > before // config.checkpoint.every_samples:
            _save(folder, module, optimizer, samples, seconds)
    _save(folder, module, optimizer, samples, seconds)
    (folder / "config.json").write_text(json.dumps(config.resolved(), indent=1))
    tree = {"samples": samples, "progress": {"samples": samples, "seconds": seconds}}
    (folder / FINISHED).write_text(json.dumps(tree))


def _save(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, samples: int, seconds: float
) -> None:
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "samples": samples,
        "seconds": seconds,
    }
    torch.save(state, folder / f"{STATE}.tmp")
    os.replace(folder / f"{STATE}.tmp", folder / STATE)


def main() -> None:
    """Train what the command line says."""
    torch.set_num_threads(1)
    kind, folder, path = sys.argv[1:]
    train(kind, Path(folder), configs.build(RunConfig, json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main()
