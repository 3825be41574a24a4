"""What holds at the gate of an alias, and what does not."""

import math
from typing import Any

import pytest

from pretrain.config import build
from pretrain.errors import ConfigError
from pretrain.registry.gate import GateConfig, judge

HELD = {"zero_shot/a/top1": 0.5, "recall_at_5": 0.4, "loss": 1.0}


def failed(rules: dict[str, Any], candidate: dict[str, float], held: Any = HELD) -> list[str]:
    gate = build(GateConfig, {"metrics": rules}, "gate")
    return [verdict.text for verdict in judge(gate, candidate, held) if not verdict.passed]


@pytest.mark.parametrize(
    ("rules", "candidate"),
    [
        ({"loss": {"most": 1.0}}, {"loss": 1.0}),
        ({"zero_shot/a/top1": {"least": 0.4, "drop": 0.1}}, {"zero_shot/a/top1": 0.41}),
        ({"zero_shot/a/top1": {"drop": 0}}, {"zero_shot/a/top1": 0.5}),
        ({"loss": {"rise": 0.5}}, {"loss": 1.5}),
        ({"recall@5": {"drop": 0}}, {"recall_at_5": 0.4}),  # MLflow's characters
        ({"loss": None, "recall@5": {"least": 0}}, {"recall_at_5": 0.0}),
    ],
)
def test_what_passes(rules: dict[str, Any], candidate: dict[str, float]) -> None:
    assert failed(rules, candidate) == []


@pytest.mark.parametrize(
    ("rules", "candidate", "said"),
    [
        ({"loss": {"most": 1.0}}, {"loss": 1.01}, "loss=1.01, most 1"),
        ({"loss": {"most": 1.0}}, {"loss": math.nan}, "loss=nan, most 1"),
        ({"loss": {"rise": 0.1}}, {"loss": math.nan}, "champion 1, rise 0.1"),
        ({"loss": {"rise": 0.1}}, {"loss": 1.2}, "loss=1.2, champion 1, rise 0.1"),
        ({"recall@5": {"drop": 0.1}}, {"recall_at_5": 0.29}, "champion 0.4, drop 0.1"),
        ({"recall@5": {"least": 0.3}}, {}, "recall@5 is not on the candidate's card"),
        ({"kid": {"rise": 0}}, {"kid": 1.0}, "kid is not known of the champion"),
    ],
)
def test_what_fails(rules: dict[str, Any], candidate: dict[str, float], said: str) -> None:
    (text,) = failed(rules, candidate)
    assert said in text


def test_without_a_champion_only_the_bounds_are_asked() -> None:
    rules = {"loss": {"most": 2.0, "rise": 0.0}}
    assert failed(rules, {"loss": 1.9}, None) == []
    assert len(failed(rules, {"loss": 2.1}, None)) == 1
    assert len(failed(rules, {"loss": 2.1})) == 2  # every threshold is told, not the first alone


def test_a_rule_that_asks_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gate\.metrics\.loss: the rule asks nothing"):
        build(GateConfig, {"metrics": {"loss": {}}}, "gate")
