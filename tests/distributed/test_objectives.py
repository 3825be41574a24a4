"""Every plug-in of pretrain/objectives under ZeRO-3 on two ranks, each parameter partitioned: it
does not hang, and losses and weights are those of a plain loop over the whole batch.

A new file there is run at its defaults, unedited; CASES has further settings. One start of the
processes runs all of them, one engine after the other.
"""

from typing import Any

import pytest
import torch

from pretrain import plugins
from pretrain.optim import OptimizerConfig, parameter_groups
from pretrain.task import PACKAGE, PretrainTask
from tests.support import ranks, tiny

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH = 2, 4
# (see test_engine.py for eps)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-5)

ENERGY = {"weight": 100.0, "dim": 8, "width": 16, "negatives": 3}
CODES = {
    "codes": 2,
    "values": 4,
    "encoder": {"width": 16, "layers": 1, "head_dim": 16, "patch": 4},
    "tokens": {"width": 16, "layers": 1, "head_dim": 16},
}
CASES: dict[str, list[dict[str, Any]]] = {
    "cdcd": [
        {"contrast": 0.05, "bound": "none", "count": 2},
        {"contrast": 0.05, "mechanism": "step", "bound": "info_nce"},
    ],
    "dcd": [
        ENERGY | {"levels": 2},
        ENERGY | {"against": "captions", "weight": 300.0},
        ENERGY | {"estimator": "one_step"},
        ENERGY | {"estimator": "cd", "langevin_steps": 2, "energy_l2": 0.1},
    ],
    "disco": [CODES | {"entropy_bonus": 0.5}],
}
NAMES = plugins.names(PACKAGE)
# (objective, which of its cases; 0 is its defaults)
EVERY = [(name, n) for name in NAMES for n in range(1 + len(CASES.get(name, [])))]
# The defaults of each always; the others are soak runs.
PARAMETERS = [
    pytest.param(case, id=f"{case[0]}-{case[1]}", marks=[pytest.mark.soak] if case[1] else [])
    for case in EVERY
]


def settings_of(name: str, case: int) -> dict[str, Any]:
    return [{}, *CASES.get(name, [])][case]


def recomputing(name: str, case: int) -> bool:
    """With activation checkpointing, unless the configuration refuses it."""
    settings = plugins.load(PACKAGE, name, "objectives").Settings(**settings_of(name, case))
    return not settings.further_passes


def task(name: str, case: int) -> PretrainTask:
    needed = plugins.load(PACKAGE, name, "objectives").Settings.needs
    # Alignment beside it shows that sharing the trunk's pass with another half does no harm.
    others: dict[str, Any] = {other: {} for other in sorted({"align", *needed} - {name})}
    return tiny.task(others | {name: settings_of(name, case)}, unet=tiny.ONE_LEVEL)


def train(cases: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs on each rank: losses (means over ranks) and gathered weights of each case."""
    from pretrain import comm
    from pretrain.engine import Engine, init_distributed
    from pretrain.engine_config import EngineConfig

    init_distributed()
    mine = GLOBAL_BATCH // comm.world_size()
    found = {}
    for case in cases:
        config = EngineConfig(
            micro_batch=mine,
            persist_parameters=0,
            live_parameters=0,
            activation_checkpointing=recomputing(*case),
        )
        engine = Engine(task(*case), config, OPTIMIZER, GLOBAL_BATCH)
        losses = []
        for step in range(STEPS):
            batch = tiny.batch(mine, start=step * GLOBAL_BATCH + comm.rank() * mine)
            output = engine.step(batch, OPTIMIZER.lr)
            metrics = {k: float(v) for k, v in output.metrics.items() if k.endswith("loss")}
            losses.append(comm.mean_over_ranks(metrics))
        found[case] = {"losses": losses, "state": engine.gather()}
    return found


def train_plainly(case: tuple[str, int]) -> dict[str, Any]:
    """The same steps in a plain loop: no engine, no process group."""
    from pretrain.engine_config import EngineConfig

    made, losses = task(*case), []
    groups = parameter_groups(made, OPTIMIZER)
    for group in groups:
        group["lr"] = OPTIMIZER.lr * group["rate_scale"]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    for step in range(STEPS):
        output = made(tiny.batch(GLOBAL_BATCH, start=step * GLOBAL_BATCH))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), EngineConfig().clip_norm)
        optimizer.step()
        losses.append({k: float(v) for k, v in output.metrics.items() if k.endswith("loss")})
    return {"losses": losses, "state": {n: p.detach() for n, p in made.named_parameters()}}


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest) -> list[dict[tuple[str, int], dict[str, Any]]]:
    """One start of two ranks for every case that was asked for."""
    here = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in here if isinstance(item, pytest.Function)]
    return ranks.run(f"{__name__}:train", 2, cases, timeout=280)


@pytest.mark.parametrize("case", PARAMETERS)
def test_two_ranks_follow_a_plain_loop(two_ranks, case) -> None:
    plain = train_plainly(case)
    # In the sum, a term's own rounding is multiplied by its weight.
    rounding = 1e-5 * max(1.0, settings_of(*case).get("weight", 1.0))
    for found in two_ranks:
        for mine, right in zip(found[case]["losses"], plain["losses"], strict=True):
            for key, value in right.items():
                most = rounding if key == "loss" else 1e-5
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=most), key
        state = found[case]["state"]
        assert state.keys() == plain["state"].keys()
        apart = max((state[n] - p).abs().max().item() for n, p in plain["state"].items())
        assert apart < 1e-4
    # The comparison could fail: what is the objective's own has moved, or else the trunk.
    start = dict(task(*case).named_parameters())
    own = f"objectives.{case[0]}."
    names = [n for n in start if n.startswith(own)] or [n for n in start if "trunk" in n]
    moved = max((plain["state"][n] - start[n].detach()).abs().max().item() for n in names)
    assert moved > 3e-4
