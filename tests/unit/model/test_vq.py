"""The VQ tokenizer, the token denoiser, and the commands that train them."""

import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from pretrain.__main__ import main
from pretrain.commands._vq import _files
from pretrain.errors import ConfigError
from pretrain.model.token_denoiser import TokenDenoiser, TokenDenoiserConfig
from pretrain.model.vq import Codebook, VQAutoencoder, VQConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_a_codebook_finds_the_clusters_and_gradients_pass_straight_through(kind: str) -> None:
    torch.manual_seed(0)
    config = VQConfig(codes=12, dim=2, codebook=kind, decay=0.8)
    book = Codebook(config)
    centres = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
    parameters = list(book.parameters())
    assert len(parameters) == (kind == "gradient")
    for _ in range(150):
        z = centres[torch.randint(4, (64,))] + 0.1 * torch.randn(64, 2)
        _, index, loss = book(z)
        if parameters:
            loss.backward()
            with torch.no_grad():
                for p in parameters:
                    p -= 0.5 * p.grad
                    p.grad = None
    distance = torch.cdist(centres, book.codes_VD.detach()).min(1).values
    assert distance.max() < 0.5 and len(set(book.nearest(centres).tolist())) == 4
    z = torch.randn(5, 2, requires_grad=True)
    book.eval()
    out, index, _ = book(z)
    assert torch.allclose(out, book.codes_VD[index])
    out.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_pictures_become_a_grid_of_tokens_and_back() -> None:
    torch.manual_seed(0)
    model = VQAutoencoder(VQConfig(codes=16, dim=4, width=8))
    x = torch.rand(3, 3, 16, 24) * 2 - 1
    out = model(x)
    assert out.images_BCHW.shape == x.shape and out.tokens_Bhw.shape == (3, 4, 6)
    assert 1 <= float(out.perplexity) <= 16 and torch.isfinite(out.loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    tokens = model.encode(x)
    assert model.decode(tokens).shape == x.shape
    assert torch.allclose(model(x).images_BCHW, model.decode(tokens), atol=1e-5)


def test_the_denoiser_reads_tokens_places_time_and_condition() -> None:
    torch.manual_seed(0)
    net = TokenDenoiser(TokenDenoiserConfig(width=16, layers=1, heads=2), 5, 6, 4, 10)
    x, t, c = torch.randint(0, 6, (2, 6)), torch.tensor([3, 3]), torch.randn(2, 3, 4)
    out = net(x, t, c)
    assert out.shape == (2, 6, 5)
    assert torch.allclose(out.exp().sum(-1), torch.ones(2, 6), atol=1e-5)
    for changed in (net(x.roll(1, 1), t, c), net(x, t + 5, c), net(x, t, c + 1)):
        assert not torch.allclose(changed, out)
    with pytest.raises(ValueError, match="heads=6; try 12"):
        TokenDenoiserConfig(width=20, heads=6)


def test_the_commands_train_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few updates of each on the shipped corpus's held-out part."""
    data = str(ROOT / "data/emoji/heldout-renderings.json")
    vq, model, picture = (str(tmp_path / name) for name in ("vq", "model", "out.png"))
    assert (
        main(
            f"vq train --data {data} --out {vq} --size 16 --samples 6 --updates 2 --batch 4 "
            "--set codes=8 --set dim=4 --set width=8".split()
        )
        == 0
    )
    small = (
        "--set denoiser={width:\\ 16,layers:\\ 1,heads:\\ 2} --set process.steps=6 "
        "--set text_encoder={width:\\ 16,query_dim:\\ 8,layers:\\ 1,heads:\\ 2,length:\\ 8} "
        "--set loss.contrast=0.01"
    )
    tokenizer = ROOT / "data/emoji/tokenizer.model"
    for negatives in ("intra", "inter"):
        assert (
            main(
                shlex.split(
                    f"vq denoise --data {data} --heldout {data} --vq {vq} --tokenizer {tokenizer} "
                    f"--out {model} --samples 6 --updates 2 --batch 4 "
                    f"--negatives {negatives} {small}"
                )
            )
            == 0
        )
    assert "held-out" in capsys.readouterr().out
    assert main(f"vq sample a b --model {model} --steps 3 --out {picture}".split()) == 0
    assert Image.open(picture).size == (32, 16)
    assert main(f"vq sample a --model {model} --steps 7 --out {picture}".split()) == 2
    assert "must lie in 1..6" in capsys.readouterr().err
    assert main(f"vq sample a --model {vq} --out {picture}".split()) == 2


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vq\.cods=.*codes"):
        _files.settings(VQConfig, ["cods=3"], "vq")
