"""The optimizer: which parameters it trains, in which groups, at what rate over samples seen."""

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat
from torch import nn

from pretrain.config import Config
from pretrain.errors import ConfigError


class OptimizerConfig(Config):
    """AdamW and its learning rate over samples seen.

    Attributes:
        lr: peak learning rate.
        betas, eps, weight_decay: AdamW's; norms, biases and scalars are not decayed.
        warmup_samples: linear warm-up from 0.
        schedule: after warm-up, "cosine" to ``lr × final`` at the end of training, or "constant".
        final: the last learning rate as a share of the peak.
        rate_scales: factor of the learning rate of parameters by the beginning of their names, such
            as {model.trunk.unet: 0.1} (DiffDis trains the U-Net at a tenth of the new modules'
            rate).
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_samples: int = Field(4000, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final: float = Field(0.02, ge=0, le=1)
    rate_scales: dict[str, PositiveFloat] = Field(default_factory=dict)

    def rate(self, samples: int, total_samples: int) -> float:
        """The learning rate of the step that starts after ``samples`` samples: a function of
        nothing else."""
        if samples < self.warmup_samples:
            return self.lr * (samples + 1) / (self.warmup_samples + 1)
        if self.schedule == "constant":
            return self.lr
        span = max(1, total_samples - self.warmup_samples)
        part = min(1.0, (samples - self.warmup_samples) / span)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * part)))


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by decay and by learning rate.

    Matrices are decayed; norms, biases and scalars are not. ``rate_scale`` of a group is the factor
    of the longest prefix in ``config.rate_scales`` that begins its parameters' names, else 1.

    Raises:
        ConfigError: a prefix begins no parameter's name.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    for prefix in config.rate_scales:
        if not any(name.startswith(prefix) for name, _ in named):
            tops = sorted({".".join(name.split(".")[:3]) for name, _ in named})
            raise ConfigError(
                f"optimizer.rate_scales names {prefix!r}, which begins no parameter; "
                f"there are: {', '.join(tops)}"
            )
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        fitting = [prefix for prefix in config.rate_scales if name.startswith(prefix)]
        scale = config.rate_scales[max(fitting, key=len)] if fitting else 1.0
        groups.setdefault((parameter.ndim > 1, scale), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "rate_scale": scale,
        }
        for (decayed, scale), parameters in groups.items()
    ]
