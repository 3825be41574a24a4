"""Codes in an exported model: tokens and prior come back, and draw what the run draws."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain import diffusers_folder, export
from pretrain.config import build
from pretrain.errors import ExportError
from pretrain.inference import Heads, Predictor
from pretrain.objectives import _disco_prior as stage2
from pretrain.objectives._disco_sampling import CodeGuidance, by_prior
from pretrain.objectives.base import Objective
from pretrain.objectives.disco import Disco, Settings
from pretrain.registry.version import in_process
from pretrain.task import PretrainTask, TaskConfig, check_objectives
from tests.support.exported import make_exported

CODES = {
    "codes": 3,
    "values": 4,
    "encoder": {"width": 16, "layers": 1, "head_dim": 8, "patch": 4},
    "tokens": {"width": 16, "layers": 1, "head_dim": 8},
}
PROMPTS = ["red apple", "blue car"]


def changed(module: torch.nn.Module) -> None:
    """Away from the zeros that new networks end in."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))


class Run:
    """An exported model, the codes it was trained with, and the run's folder."""

    def __init__(self, folder: Path, prior: bool) -> None:
        self.model, self.output = make_exported(folder / "model"), folder / "run"
        self.plain = Predictor.load(self.model)
        network = self.plain.model
        changed(network)
        self.weights()
        self.disco = Disco(build(Settings, CODES, "disco"), network).eval()
        changed(self.disco)
        self.prior: stage2.Prior | None = None
        if prior:
            width = network.config.text_encoder.width
            config = stage2.PriorConfig(width=16, layers=1, head_dim=8)
            self.prior = stage2.Prior(config, 3, 4, width).eval()
            changed(self.prior)
            facts = {"codes_of": self.disco.fingerprint()}
            stage2.save(self.prior, self.output / stage2.FOLDER, facts)

    def weights(self) -> None:
        from safetensors.torch import save_file

        state = {n: p.detach().clone() for n, p in self.plain.model.named_parameters()}
        save_file(state, self.model / "model.safetensors")

    def export(self) -> Predictor:
        assert self.disco.save_condition(self.model / "disco", self.output)
        tree = json.loads((self.model / "config.json").read_text()) | {"condition": "disco"}
        (self.model / "config.json").write_text(json.dumps(tree))
        return Predictor.load(self.model)


def drawn(heads: Heads, predictor: Predictor) -> Tensor:
    tokens, mask = predictor.tokenizer.encode(PROMPTS, predictor.length)
    return heads.generate_tokens(tokens, mask, [5, 6])


def test_the_export_draws_what_the_run_draws(tmp_path: Path) -> None:
    run = Run(tmp_path, prior=True)
    assert run.prior is not None
    loaded = run.export()
    guide = CodeGuidance(run.disco, run.plain.model, by_prior(run.prior))
    expected = drawn(Heads(run.plain.model, run.plain.heads.config, guide), run.plain)
    assert torch.equal(drawn(loaded.heads, loaded), expected)
    assert not torch.allclose(drawn(run.plain.heads, run.plain), expected, atol=1e-4)
    files = sorted(p.name for p in (run.model / "disco").iterdir())
    assert files == ["disco.json", "prior.json", "prior.safetensors", "tokens.safetensors"]


def test_without_a_prior_the_null_tokens_stand(tmp_path: Path) -> None:
    run = Run(tmp_path, prior=False)
    loaded = run.export()
    network = run.plain.model
    task = PretrainTask(network, check_objectives({"generate": {}}), TaskConfig(), 0)
    task.objectives["disco"] = run.disco
    expected = drawn(Heads(network, run.plain.heads.config, task.conditions), run.plain)
    assert torch.equal(drawn(loaded.heads, loaded), expected)


def test_a_prior_of_other_weights_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, prior=True)
    changed(run.disco.tokens)
    with pytest.raises(ExportError, match=r"codes of other weights.*disco prior --output"):
        run.export()


def test_missing_tokens_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, prior=False)
    run.export()
    (run.model / "disco" / "tokens.safetensors").unlink()
    with pytest.raises(ExportError, match=r"lacks the codes.*tokens\.safetensors"):
        Predictor.load(run.model)


def test_the_registrys_model_draws_with_codes(tmp_path: Path) -> None:
    run = Run(tmp_path, prior=True)
    rows = [{"task": "generate", "text": PROMPTS[0], "seed": 5}]
    plain = in_process(run.model)(rows, {})
    run.export()
    found = in_process(run.model)(rows, {})
    assert found[0]["image"] == in_process(run.model)(rows, {})[0]["image"] != plain[0]["image"]


def test_diffusers_has_no_place_for_codes(tmp_path: Path) -> None:
    run = Run(tmp_path, prior=False)
    run.export()
    with pytest.raises(ExportError, match="conditioned on more than captions"):
        diffusers_folder.write(run.model, tmp_path / "pipeline")


def test_an_objective_without_a_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, prior=False)
    task = PretrainTask(run.plain.model, check_objectives({"generate": {}}), TaskConfig(), 0)
    assert export._save_condition(task, tmp_path / "a", run.output) == {}
    task.objectives["disco"] = run.disco
    assert export._save_condition(task, tmp_path / "b", run.output) == {"condition": "disco"}
    monkeypatch.setattr(Disco, "save_condition", Objective.save_condition)
    with pytest.raises(ExportError, match=r"objectives\.disco adds to what generation"):
        export._save_condition(task, tmp_path / "c", run.output)
