"""The second stage's data: codes of the embedded corpus under a run's own objective."""

from itertools import islice
from pathlib import Path

import torch

from pretrain import config as configs
from pretrain.commands import _disco
from pretrain.data.tokenizer import Tokenizer
from pretrain.objectives import _disco_prior
from pretrain.objectives.disco import Disco
from pretrain.run_config import RunConfig
from pretrain.train import build_task
from tests.unit.objectives.test_disco import SMALL

ROOT = Path(__file__).resolve().parents[3]


def test_a_prior_is_trained_on_the_codes_of_the_runs_data() -> None:
    tree = configs.read_yaml(ROOT / "configs/debug.yaml")
    tree["data"] |= {k: str(ROOT / tree["data"][k]) for k in ("train", "tokenizer")}
    tree["data"] |= {"workers": 0}
    tree["objectives"] = {"generate": {}, "disco": SMALL}
    config = configs.build(RunConfig, tree)
    tokenizer = Tokenizer(config.data.tokenizer)
    task = build_task(config, tokenizer).eval()
    disco = task.objectives["disco"]
    assert isinstance(disco, Disco)
    prior_config, fit = _disco.settings(
        ["prior.width=16", "prior.layers=1", "prior.head_dim=8", "fit.samples=64"]
    )
    fit = fit.model_copy(update={"heldout": 0.25, "judge_every": 32})
    use = _disco.Use(disco)
    given = _disco.coded(task, config, tokenizer, disco, 16, 0, fit, use)
    codes, pooled, heldout = next(given)
    again = next(_disco.coded(task, config, tokenizer, disco, 16, 0, fit, _disco.Use(disco)))
    assert codes.shape == (16, 3) and codes.min() >= 0 and codes.max() < 4
    assert torch.equal(codes, again[0]) and torch.equal(heldout, again[2])
    assert pooled.shape == (16, config.model.text_encoder.width)
    prior = _disco.new_prior(task, disco, prior_config, 0)
    fitted = _disco_prior.fit(prior, islice(given, 4), fit)
    assert fitted.best_samples in (32, 64) and 0 < fitted.heldout_nats < 20
    perplexity = use.facts()["perplexity"]
    assert len(perplexity) == 3 and all(1 <= p <= 4.001 for p in perplexity)
