"""What a text's query is made of: the end token's feature, or the mean over the text's tokens."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pretrain.data.tokenizer import Tokenizer
from pretrain.model.text_config import TextEncoderConfig
from pretrain.model.text_encoder import TextEncoder
from pretrain.pipeline_files.diffdis_text_encoder import DiffDisTextEncoder
from tests.conftest import ROOT

TOKENS = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 8, 5, 6, 4, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


def encoder(pool: Literal["end", "mean"]) -> TextEncoder:
    torch.manual_seed(0)
    config = TextEncoderConfig(width=16, query_dim=8, layers=1, heads=2, length=6, pool=pool)
    return TextEncoder(config, vocab_size=12).double()


def by_hand(module: TextEncoder, features_LD: Tensor) -> Tensor:
    e_E: Tensor = module.query.weight @ features_LD.mean(0)
    return (e_E / e_E.norm()).float()


def test_the_mean_is_over_the_text_and_not_its_padding() -> None:
    module = encoder("mean")
    found = module(TOKENS, MASK)
    lengths = MASK.sum(1).tolist()
    for row, length in enumerate(lengths):
        expected = by_hand(module, found.c_BLD[row, :length])
        torch.testing.assert_close(found.e_BE[row], expected, atol=1e-6, rtol=0)
    other = TOKENS.masked_fill(~MASK, 11)
    torch.testing.assert_close(module(other, MASK).e_BE, found.e_BE, atol=0, rtol=0)


def test_the_end_token_is_the_last_of_the_text() -> None:
    module = encoder("end")
    found = module(TOKENS, MASK)
    for row, last in enumerate((3, 5)):
        expected = by_hand(module, found.c_BLD[row, last : last + 1])
        torch.testing.assert_close(found.e_BE[row], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", ["end", "mean"])
def test_both_have_the_same_weights(pool: Literal["end", "mean"]) -> None:
    """So a run may be compared with one of the other kind from the same start."""
    state, plain = encoder(pool).state_dict(), encoder("end").state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in state)


@pytest.mark.parametrize("pool", ["end", "mean"])
def test_an_exported_pipelines_encoder_gives_the_same(pool: Literal["end", "mean"]) -> None:
    """The file that goes into the folder stands alone, so it says all this a second time."""
    tokenizer = Tokenizer(str(ROOT / "data/emoji/tokenizer.model"))
    texts = ["red apple", "a house with a garden and a very long name that is cut off", ""]
    torch.manual_seed(0)
    size: dict[str, Any] = {"width": 16, "query_dim": 8, "layers": 1, "heads": 2, "length": 8}
    ours = TextEncoder(TextEncoderConfig(**size, pool=pool), tokenizer.vocab_size)
    data = (ROOT / "data/emoji/tokenizer.model").read_bytes()
    vocab = tokenizer.vocab_size
    exported = DiffDisTextEncoder(vocab, tokenizer_bytes=len(data), **size, pool=pool)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    exported.load_state_dict({**ours.state_dict(), "tokenizer": raw})
    expected = ours(*tokenizer.encode(texts, size["length"]))
    c_BLD, e_BE = exported(texts)
    torch.testing.assert_close(e_BE, expected.e_BE)
    torch.testing.assert_close(c_BLD, expected.c_BLD)
