"""What a run trained with `dcd` can do: classify by energy, and sample queries."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from pretrain.diffusion import sampler
from pretrain.diffusion.langevin import Slope, annealed_langevin
from pretrain.errors import ConfigError
from pretrain.model.diffdis import DiffDis
from pretrain.objectives.dcd import DCD, Unit
from pretrain.rng import generator


def energy_of(objectives: Iterable[tuple[str, nn.Module]]) -> DCD:
    """The energy among a task's objectives (``task.objectives.items()``).

    Raises:
        ConfigError: there is none.
    """
    found = dict(objectives)
    if "dcd" not in found:
        raise ConfigError(
            f"objectives={sorted(found)}: none is an energy to classify or sample by; train with "
            "objectives.dcd.weight > 0"
        )
    return cast(DCD, found["dcd"])


@torch.no_grad()
def tokens(model: DiffDis, images_BCHW: Tensor, seed: int, noises: int) -> list[Tensor]:
    """The final text token (B, W) for images in [-1, 1], once for each of ``noises`` noisy queries
    at t_max, where nothing of a caption is left: it tells of the image alone.

    The draws are the same for every image, as `Heads.embed_images` has them.
    """
    device = images_BCHW.device
    z = model.autoencoder.encode(images_BCHW)
    null_c = model.encode_text(model.null_tokens_L[None], model.null_mask_L[None])[1]
    t_B = torch.full((len(z),), model.text_path.schedule.t_max, device=device)
    found = []
    for k in range(noises):
        width = model.config.text_encoder.query_dim
        eps = torch.randn(width, generator=generator(seed, "align", k)).to(device)
        e_t = sampler.start(model.text_path, eps.expand(len(z), width))
        found.append(model.read_query(e_t, t_B, z, null_c)[1])
    return found


@torch.no_grad()
def class_energies(
    model: DiffDis,
    dcd: DCD,
    images_BCHW: Tensor,
    e_CE: Tensor,
    seed: int = 0,
    noises: int = 4,
) -> Tensor:
    """E(e_c | z) of each image and class, fp32, (B, C): argmin classifies. One encoder pass an
    image and noise, whatever the number of classes; energies are means over noises.

    Args:
        e_CE: class queries, unit rows.
    """
    b, c = len(images_BCHW), len(e_CE)
    level_B = torch.zeros(b, dtype=torch.int64, device=images_BCHW.device)
    x_CD = dcd.project(e_CE.to(images_BCHW.device))
    rows_ND = x_CD.repeat_interleave(b, 0)  # row c B + b
    total_CB = torch.zeros(c, b, device=images_BCHW.device)
    for token_BW in tokens(model, images_BCHW, seed, noises):
        total_CB += dcd.head(token_BW, rows_ND, level_B)[0].view(c, b)
    return total_CB.T / noises


@torch.no_grad()
def sample_points(
    model: DiffDis,
    dcd: DCD,
    images_BCHW: Tensor,
    e_NE: Tensor,
    seed: int = 0,
    steps: int = 50,
    rate: float = 0.05,
) -> Tensor:
    """Points (projected queries) drawn from exp(-E(e | z)) by annealed Langevin, (B, D); the
    nearest of ``dcd.project(e_NE)`` tells what one means. One pass of the trunk, then the head
    alone. With one level (``levels`` 1) the steps are plain Langevin's.

    Args:
        e_NE: queries of captions such as were trained on; their spread is the unit of noise.
    """
    (token_BW,) = tokens(model, images_BCHW, seed, 1)
    unit = Unit.of(dcd.project(e_NE.to(images_BCHW.device)))
    b, device = len(images_BCHW), images_BCHW.device

    def slope_at(level: int) -> Slope:
        level_B = torch.full((b,), level, dtype=torch.int64, device=device)
        return dcd.slope(token_BW, level_B, unit)

    g = generator(seed, "dcd/sample")

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=g).to(device)

    every = dcd.levels.sigmas
    sigmas = every[:-1] if len(every) > 2 else every[1:]
    start = every[-1] * noise(torch.empty(b, dcd.settings.dim))
    return unit.leave(annealed_langevin(slope_at, start, sigmas, steps, rate, noise))
