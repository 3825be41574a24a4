"""The tokenizer: the same texts give the same bytes, and another one is refused."""

import io
import pickle
from pathlib import Path

import pytest
import sentencepiece

from pretrain.__main__ import main
from pretrain.data import tokenizer
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import DataError, TokenizerMismatch
from tests.unit.data.conftest import ROOT


@pytest.fixture(scope="module")
def committed() -> Tokenizer:
    return Tokenizer(str(ROOT / "data/emoji/tokenizer.model"))


def test_the_command_rebuilds_the_committed_bytes(tmp_path: Path, committed: Tokenizer) -> None:
    out = tmp_path / "again.model"
    data = str(ROOT / "data/emoji/train.json")
    assert main(["tokenizer", "train", "--data", data, "--out", str(out)]) == 0
    assert Tokenizer(str(out)).sha256 == committed.sha256


def test_the_committed_vocabulary(committed: Tokenizer) -> None:
    assert committed.vocab_size == 1536


def test_a_text_is_framed_padded_and_lower_cased(committed: Tokenizer) -> None:
    tokens, mask = committed.encode(["Red Apple", "red apple", ""], 12)
    assert tokens.shape == mask.shape == (3, 12)
    assert tokens[0].tolist() == tokens[1].tolist()
    assert tokens[0, 0] == tokenizer.BEGIN
    length = int(mask[0].sum())
    assert tokens[0, length - 1] == tokenizer.END
    assert tokens[0, length:].tolist() == [tokenizer.PAD] * (12 - length)
    assert tokens[2].tolist() == [tokenizer.BEGIN, tokenizer.END] + [tokenizer.PAD] * 10
    assert mask[2].sum() == 2


def test_a_long_text_is_cut_and_keeps_its_end(committed: Tokenizer) -> None:
    tokens, mask = committed.encode(["a red apple and a green pear " * 9], 8)
    assert bool(mask.all())
    assert tokens[0, -1] == tokenizer.END


def test_a_caption_survives_a_round_trip(committed: Tokenizer) -> None:
    tokens, mask = committed.encode(["a twemoji drawing of a red apple"], 24)
    assert committed.decode(tokens[0][mask[0]].tolist()) == "a twemoji drawing of a red apple"


def test_no_official_name_of_the_corpus_has_an_unknown_piece(committed: Tokenizer) -> None:
    tokens, _ = committed.encode(["piñata", "eight o'clock", "jack-o-lantern", "T-Rex"], 24)
    assert not bool((tokens == tokenizer.UNKNOWN).any())


def test_another_tokenizer_is_refused_with_both_hashes(
    committed: Tokenizer, small_tokenizer: str
) -> None:
    small = Tokenizer(small_tokenizer)
    small.check(small.sha256)
    with pytest.raises(TokenizerMismatch) as caught:
        small.check(committed.sha256)
    assert small.sha256[:16] in str(caught.value) and committed.sha256[:16] in str(caught.value)


def test_it_travels_to_workers(small_tokenizer: str) -> None:
    small = Tokenizer(small_tokenizer)
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode(["red"], 8)[0].tolist() == small.encode(["red"], 8)[0].tolist()
    assert copy.sha256 == small.sha256


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer train"):
        Tokenizer(str(tmp_path / "none.model"))
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(str(foreign))


def test_too_large_a_vocabulary_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab_size=9000.*lower it"):
        tokenizer.train(["red apple"] * 9, tmp_path / "x.model", 9000)


def test_the_same_texts_give_the_same_bytes_and_other_texts_do_not(tmp_path: Path) -> None:
    texts = [f"a drawing of s{i}-{j} red apple" for i in range(9) for j in range(9)]
    first, second = tmp_path / "1.model", tmp_path / "2.model"
    assert tokenizer.train(texts, first, 36) == tokenizer.train(texts, second, 36)
    assert first.read_bytes() == second.read_bytes()
    other = tokenizer.train([*texts, "blue plum"], tmp_path / "3.model", 36)
    assert other != Tokenizer(str(first)).sha256


def test_the_shortest_length_still_frames_a_text(committed: Tokenizer) -> None:
    tokens, _ = committed.encode(["red apple", ""], 3)
    assert tokens[0, [0, 2]].tolist() == [tokenizer.BEGIN, tokenizer.END]
    assert tokens[1].tolist() == [tokenizer.BEGIN, tokenizer.END, tokenizer.PAD]


def test_a_model_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(  # sentencepiece's own defaults: unk 0, bos 1, eos 2
        sentence_iterator=iter(["red apple green pear"] * 9),
        model_writer=stream,
        vocab_size=14,
        minloglevel=2,
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="special ids"):
        Tokenizer(str(path))
