"""The optimizer: which parameters it trains, in which groups, at what rate over samples seen."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import nn

from pretrain.config import Config
from pretrain.errors import ConfigError


class OptimizerConfig(Config):
    """AdamW and its learning rate over samples seen.

    Attributes:
        lr: peak learning rate.
        betas, eps, weight_decay: AdamW's; norms, biases and scalars are not decayed.
        warmup_samples: linear warm-up from 0.
        schedule: after warm-up, "cosine" to ``lr × final`` at the end of training; "constant"; or
            "wsd" (warm-up, stable, decay: Hu et al. 2024, MiniCPM), constant but for the last
            ``decay_samples``, over which it falls linearly to ``lr × final``.
        decay_samples: of "wsd".
        final: the last learning rate as a share of the peak.
        rate_scales: factor of the learning rate of parameters by the beginning of their names, such
            as {model.trunk.unet: 0.1} (DiffDis trains the U-Net at a tenth of the new modules'
            rate). 1 undoes what a base configuration says.
        freeze: beginnings of the names of parameters that stay as they are.
        fused: whether AdamW is torch's one kernel, on CPU as on CUDA: on 5 M parameters 8 ms on one
            core, 45 ms otherwise. It is also what computes where the optimizer is offloaded.
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_samples: int = Field(4000, ge=0)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay_samples: int = Field(0, ge=0)
    final: float = Field(0.02, ge=0, le=1)
    rate_scales: dict[str, PositiveFloat] = Field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    fused: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        if self.schedule == "wsd" and not self.decay_samples:
            raise ValueError(
                "schedule='wsd' needs decay_samples, the samples at the end over which the rate "
                "falls; a tenth of training.samples is usual"
            )
        if self.schedule != "wsd" and self.decay_samples:
            raise ValueError(
                f"decay_samples={self.decay_samples} means nothing to "
                f"schedule={self.schedule!r}; use schedule: wsd, or remove it"
            )
        return self

    def check_length(self, total_samples: int) -> None:
        """That the parts of the schedule fit into training.

        Raises:
            ConfigError: warm-up and decay together are longer.
        """
        if self.warmup_samples + self.decay_samples > total_samples and self.schedule == "wsd":
            raise ConfigError(
                f"optimizer.warmup_samples={self.warmup_samples} and decay_samples="
                f"{self.decay_samples} are more than training.samples={total_samples}; shorten them"
            )

    def rate(self, samples: int, total_samples: int) -> float:
        """The learning rate of the step that starts after ``samples`` samples: a function of
        nothing else."""
        if samples < self.warmup_samples:
            return self.lr * (samples + 1) / (self.warmup_samples + 1)
        if self.schedule == "constant":
            return self.lr
        start = self.warmup_samples
        if self.schedule == "wsd":
            start = max(start, total_samples - self.decay_samples)
        span = max(1, total_samples - start)
        part = min(1.0, max(0, samples - start) / span)
        left = 1 - part if self.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * part))
        return self.lr * (self.final + (1 - self.final) * left)


def freeze(module: nn.Module, prefixes: Iterable[str]) -> None:
    """Stop the training of parameters whose names begin with one of ``prefixes``.

    Raises:
        ConfigError: a prefix begins no parameter's name, or nothing is left to train.
    """
    named = list(module.named_parameters())
    for prefix in prefixes:
        fitting = [parameter for name, parameter in named if name.startswith(prefix)]
        if not fitting:
            raise ConfigError(_unknown("optimizer.freeze", prefix, (name for name, _ in named)))
        for parameter in fitting:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise ConfigError(
            f"optimizer.freeze={list(prefixes)} leaves nothing to train; remove a prefix"
        )


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters by decay and by learning rate.

    Matrices are decayed; norms, biases and scalars are not. ``rate_scale`` of a group is the factor
    of the longest prefix in ``config.rate_scales`` that begins its parameters' names, else 1.

    Raises:
        ConfigError: a prefix begins no trained parameter's name, and its factor is not 1, which
            undoes one of a base configuration.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    for prefix, factor in config.rate_scales.items():
        if factor != 1 and not any(name.startswith(prefix) for name, _ in named):
            raise ConfigError(
                _unknown("optimizer.rate_scales", prefix, (name for name, _ in named), "trained ")
            )
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        fitting = [prefix for prefix in config.rate_scales if name.startswith(prefix)]
        scale = config.rate_scales[max(fitting, key=len)] if fitting else 1.0
        whole = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 may have cut it already
        groups.setdefault((len(whole) > 1, scale), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "rate_scale": scale,
        }
        for (decayed, scale), parameters in groups.items()
    ]


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of ``module``, once those that ``config.freeze`` names are
    frozen.

    Raises:
        ConfigError: a prefix of ``freeze`` or ``rate_scales`` names nothing.
    """
    freeze(module, config.freeze)
    return torch.optim.AdamW(
        parameter_groups(module, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=config.fused,
    )


def _unknown(field: str, prefix: str, names: Iterable[str], what: str = "") -> str:
    tops = sorted({".".join(name.split(".")[:3]) for name in names})
    return (
        f"{field} names {prefix!r}, which begins no {what}parameter; there are: {', '.join(tops)}"
    )
