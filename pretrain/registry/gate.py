"""The gate before an alias: what a version must score, alone and against the one it would replace.

Pure: numbers in, verdicts out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from pretrain import mlflow_env
from pretrain.config import Config


class RuleConfig(Config):
    """One metric's thresholds; at least one of them.

    Attributes:
        least, most: bounds of the value itself.
        drop, rise: how far it may fall below (of a metric where more is better) or rise above (of
            one where less is better) that of the version which holds the alias; 0 is "no worse".
    """

    least: float | None = None
    most: float | None = None
    drop: float | None = Field(None, ge=0)
    rise: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _asks_something(self) -> "RuleConfig":
        if self.least is self.most is self.drop is self.rise is None:
            raise ValueError("the rule asks nothing; give least, most, drop or rise")
        return self


class GateConfig(Config):
    """What `promote` asks for.

    Attributes:
        metrics: rules by the metric's name on the model card, as zero_shot/concepts/top1; null
            takes one of a base config out.
    """

    metrics: dict[str, RuleConfig | None] = Field(default_factory=dict)

    @property
    def rules(self) -> dict[str, RuleConfig]:
        """Those that are not null."""
        return {name: rule for name, rule in self.metrics.items() if rule is not None}


@dataclass(frozen=True)
class Verdict:
    """One threshold and what came of it.

    Attributes:
        passed: whether it holds.
        text: metric, value, threshold.
    """

    passed: bool
    text: str


def judge(
    gate: GateConfig, candidate: Mapping[str, float], champion: Mapping[str, float] | None
) -> list[Verdict]:
    """A verdict for each threshold. A metric that is missing or NaN fails.

    Args:
        candidate, champion: metrics by `mlflow_env.key` of their names; no champion: thresholds
            against it hold.
    """
    verdicts: list[Verdict] = []
    for name, rule in gate.rules.items():
        key = mlflow_env.key(name)
        if key not in candidate:
            verdicts.append(Verdict(False, f"{name} is not on the candidate's card: evaluate it"))
            continue
        value = candidate[key]
        bounds: Sequence[tuple[str, float | None, bool]] = (
            ("least", rule.least, rule.least is not None and value >= rule.least),
            ("most", rule.most, rule.most is not None and value <= rule.most),
        )
        verdicts += [
            Verdict(holds, f"{name}={value:.6g}, {word} {bound:g}")
            for word, bound, holds in bounds
            if bound is not None
        ]
        if champion is None or (rule.drop is None and rule.rise is None):
            continue
        if key not in champion:
            verdicts.append(
                Verdict(False, f"{name} is not known of the champion: score that version, too")
            )
            continue
        held = champion[key]
        if rule.drop is not None:
            text = f"{name}={value:.6g}, champion {held:.6g}, drop {rule.drop:g}"
            verdicts.append(Verdict(value >= held - rule.drop, text))
        if rule.rise is not None:
            text = f"{name}={value:.6g}, champion {held:.6g}, rise {rule.rise:g}"
            verdicts.append(Verdict(value <= held + rule.rise, text))
    return verdicts
