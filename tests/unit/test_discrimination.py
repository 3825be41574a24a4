"""Zero-shot and retrieval on a tiny model: what is embedded and when, what is kept, what is
refused."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pretrain.config import build
from pretrain.errors import ConfigError, DataError, NonFiniteError
from pretrain.evaluators import _embed, retrieval, zero_shot
from pretrain.evaluators._embed import embed_images, embed_texts
from pretrain.evaluators._sets import open_sets
from pretrain.evaluators.base import Kept, Result, Subject
from pretrain.stop import Stopped
from tests.support import subject as subjects
from tests.support.clipset import write_folder
from tests.support.subject import Counted

CLS = ["2", "0", "1", "1", "0", "2", "2"]
CAPTIONS = ["a red owl\nan owl in red", "a cat", "the dog\na dog", "green pear\nthe pear\na pear"]

COLOURS = ["red", "blue", "green", "white", "black", "pink"]
ANIMALS = ["cat", "dog", "owl", "fox", "bear", "horse", "sheep", "fish", "ant", "mouse"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subjects.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def subject(base: Subject, tmp_path: Path) -> Subject:
    heads = type(base.heads)(base.heads.model, base.heads.config)  # of this test, to be counted
    return dataclasses.replace(base, heads=heads, folder=tmp_path / "samples", kept=Kept())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return write_folder(tmp_path / "wds_pets", CLS)


def classify(subject: Subject, url: str, **fields: Any) -> Result:
    tree = {"sets": {"pets": url}, "steps": 1, "noises": 1, **fields}
    return zero_shot.build(build(zero_shot.Settings, tree)).run(subject)


def retrieve(subject: Subject, url: str, **fields: Any) -> Result:
    tree = {"sets": {"pets": url}, "steps": 1, "noises": 1, **fields}
    return retrieval.build(build(retrieval.Settings, tree)).run(subject)


def scores_of(result: Result) -> dict[str, float]:
    return {k: v for k, v in result.metrics.items() if not k.startswith("cost/")}


def test_what_zero_shot_says(subject: Subject, url: str) -> None:
    result = classify(subject, url, guidance=1.0, noises=2)
    m, d = result.metrics, result.details
    assert d is not None and d["set"] == "pets" and d["metric"] == "top1"
    assert m["zero_shot/pets/chance"] == pytest.approx(1 / 3) and m["zero_shot/pets/top5"] == 1.0
    assert m["cost/pets/passes_per_image"] == 4  # 1 step, 2 noises, with and without the image
    seconds, rate = m["cost/pets/seconds"], m["cost/pets/images_per_second"]
    assert seconds > 0 and rate * seconds == pytest.approx(7)
    right = sum(n for true, predicted, n in d["confusion"] if true == predicted)
    assert sum(n for _, _, n in d["confusion"]) == 7
    assert right == round(7 * m["zero_shot/pets/top1"])
    assert m["zero_shot/pets/mean_per_class"] == pytest.approx(sum(d["per_class"]) / 3)
    assert len(d["examples"]) == 7 and d["templates"][0] == "a photo of a {c}."
    for example in d["examples"]:
        with Image.open(io.BytesIO(base64.b64decode(example["png"]))) as image:
            assert image.size == (20, 16) and image.format == "PNG"
        assert sorted(example["predicted"]) == ["cat", "dog", "owl"]
        assert example["scores"] == sorted(example["scores"], reverse=True)
    worst = d["examples"][0]
    assert worst["predicted"][0] != worst["true"] or right == 7
    assert classify(subject, url, examples=2).details["examples"][1]["png"]  # type: ignore[index]


def test_a_class_is_the_mean_of_its_prompts(subject: Subject) -> None:
    templates = ("a photo of a {c}.", "the {}")
    prompts = zero_shot.prompts_of(["cat", "{c} dog"], templates)
    assert prompts == ["a photo of a cat.", "the cat", "a photo of a {c} dog.", "the {c} dog"]
    rows = embed_texts(subject, prompts, 2)
    each = embed_texts(subject, prompts)
    assert torch.allclose(each.norm(dim=1), torch.ones(4), atol=1e-6)
    mean = each.double().view(2, 2, -1).mean(1)
    torch.testing.assert_close(rows.double(), mean / mean.norm(dim=1, keepdim=True))


def test_templates_are_the_sets_own_unless_given(subject: Subject, url: str) -> None:
    def templates(**fields: Any) -> list[str]:
        details = classify(subject, url, **fields).details
        assert details is not None
        return list(details["templates"])

    assert templates() == ["a photo of a {c}.", "a drawing of the {c}."]
    assert templates(templates=["{}"]) == ["{}"]


def test_many_prompts_are_embedded_in_pieces(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{a} {b}" for a in COLOURS for b in ANIMALS]
    whole = embed_texts(subject, texts, 5)
    for piece in (7, 3, 1):  # 3 is less than a class has prompts
        monkeypatch.setattr(_embed, "TEXTS", piece)
        found = embed_texts(dataclasses.replace(subject, kept=Kept()), texts, 5)
        torch.testing.assert_close(found, whole)


def test_retrieval_with_several_captions(subject: Subject, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "wds", CAPTIONS, retrieval=True)
    result = retrieve(subject, folder, ks=[1, 3, 8], examples=8)
    m, d = result.metrics, result.details
    assert d is not None and m["retrieval/pets/text_to_image_r8"] == 1.0
    assert m["retrieval/pets/image_to_text_r8"] == 1.0
    sets = build(retrieval.Settings, {"sets": {"pets": folder}}).sets
    (data,) = open_sets(sets, subject.data, subject.pulse).values()
    texts = retrieval.texts_of(data)
    assert texts.group_T.tolist() == [0, 0, 1, 2, 2, 3, 3, 3]
    rows = embed_images(subject, data, retrieval.Settings(steps=1, noises=1)).rows_NE
    scores = rows @ embed_texts(subject, texts.texts).T
    first = [int(texts.group_T[i]) == n for n, i in enumerate(scores.argmax(1).tolist())]
    assert m["retrieval/pets/image_to_text_r1"] == sum(first) / 4
    assert [e["kind"] for e in d["examples"]] == ["text"] * 4 + ["image"] * 4
    for example in d["examples"]:
        assert [f["score"] for f in example["found"]] == sorted(
            (f["score"] for f in example["found"]), reverse=True
        )
        if example["kind"] == "image":
            assert all(f["right"] == (f["caption"] in example["truth"]) for f in example["found"])
        else:
            assert any(f["right"] for f in example["found"]) and len(example["truth"]) == 1


def test_retrieval_by_class_names(subject: Subject, url: str) -> None:
    """Images of one class share their text."""
    found = scores_of(retrieve(subject, url, ks=[3, 7]))
    assert found["retrieval/pets/image_to_text_r3"] == 1.0
    assert found["retrieval/pets/text_to_image_r7"] == 1.0


def test_the_same_images_are_embedded_once(subject: Subject, url: str) -> None:
    counted = Counted(subject.heads)
    classify(subject, url)
    retrieve(subject, url)
    classify(subject, url, templates=["{c}"])
    assert counted.batches == [7]
    classify(subject, url, noises=2)
    assert counted.batches == [7, 7]  # another chain is other rows


def stopped_after(subject: Subject, pieces: int) -> Subject:
    left = iter([False] * pieces + [True] * 99)
    return dataclasses.replace(subject, pulse=lambda: next(left), kept=Kept())


def test_a_stopped_evaluation_goes_on(
    subject: Subject, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_embed, "CHUNK", 2)
    expected = classify(subject, url)
    classify(subject, url)  # the set is open now, and asks for no pulse
    subject = dataclasses.replace(subject, scratch=tmp_path / "scratch", kept=Kept())
    counted = Counted(subject.heads)
    with pytest.raises(Stopped):
        classify(stopped_after(subject, 2), url)
    assert counted.batches == [2, 2]
    assert len(list((tmp_path / "scratch").rglob("*.npz"))) == 2
    assert not list((tmp_path / "scratch").rglob("*.tmp"))
    found = classify(subject, url)
    assert counted.batches == [2, 2, 2, 1]
    assert scores_of(found) == scores_of(expected) and found.details == expected.details
    other = dataclasses.replace(subject, kept=Kept())  # another process
    again = retrieve(other, url)
    assert counted.batches == [2, 2, 2, 1]
    for key in ("seconds", "images_per_second"):  # what it cost is remembered
        assert again.metrics[f"cost/pets/{key}"] == found.metrics[f"cost/pets/{key}"]


def test_scratch_is_of_these_weights_and_whole_or_made_anew(
    subject: Subject, url: str, tmp_path: Path
) -> None:
    subject = dataclasses.replace(subject, scratch=tmp_path)
    counted = Counted(subject.heads)
    expected = scores_of(classify(subject, url))
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-30])
    assert scores_of(classify(dataclasses.replace(subject, kept=Kept()), url)) == expected
    assert counted.batches == [7, 7]
    parameter = next(subject.heads.model.parameters())
    with torch.no_grad():
        parameter[0] += 1
    try:
        classify(dataclasses.replace(subject, kept=Kept()), url)
    finally:
        with torch.no_grad():
            parameter[0] -= 1
    assert counted.batches == [7, 7, 7]


def test_a_model_that_says_nan_is_said_so(
    subject: Subject, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = subject.heads.embed_images

    def some_nan(images: torch.Tensor, *arguments: Any) -> torch.Tensor:
        rows = inner(images, *arguments)
        rows[2] = torch.nan
        return rows

    monkeypatch.setattr(subject.heads, "embed_images", some_nan)
    for run in (classify, retrieve):
        with pytest.raises(NonFiniteError, match="'pets': 1 of 7 image embeddings are not finite"):
            run(subject, url)
    monkeypatch.setattr(
        subject.heads, "embed_tokens", lambda tokens, _: torch.full((len(tokens), 24), torch.nan)
    )
    with pytest.raises(NonFiniteError, match="texts such as 'cat' have embeddings"):
        embed_texts(subject, ["cat"])


@pytest.mark.parametrize("when", ["check", "run"])
def test_what_cannot_be_scored_is_refused(subject: Subject, tmp_path: Path, when: str) -> None:
    """Before training, and again by whoever evaluates."""
    counted = Counted(subject.heads)

    def refused(module: Any, url: str, error: type[Exception], said: str) -> None:
        tree = {"sets": {"pets": url}, "steps": 1, "noises": 1}
        evaluator = module.build(build(module.Settings, tree))
        with pytest.raises(error, match=said):
            evaluator.check(subject.data, lambda: None) if when == "check" else evaluator.run(
                subject
            )

    one_image = write_folder(tmp_path / "one_image", ["1"], shards=1)
    for module in (zero_shot, retrieval):
        said = r"'pets' at .*one_image/test has 1 image; a score needs"
        refused(module, one_image, DataError, said)
        refused(module, str(tmp_path / "none"), DataError, r"none/test/nshards.txt does not exist")
    one_class = write_folder(tmp_path / "one_class", ["0", "0"], classes=["cat"])
    said = "has one class, 'cat': every answer would be right"
    refused(zero_shot, one_class, DataError, said)
    refused(retrieval, one_class, DataError, "has one text, 'cat'")
    captions = write_folder(tmp_path / "captions", CAPTIONS, retrieval=True)
    said = r"sets\.pets: .*captions/test holds captions and no"
    refused(zero_shot, captions, ConfigError, said)
    flat = write_folder(tmp_path / "flat", CLS, templates=["a photo"])
    said = "'pets': template 'a photo' has no place for the class"
    refused(zero_shot, flat, DataError, said)
    assert not counted.batches


def test_what_no_set_could_mend_is_refused_when_it_is_written(url: str) -> None:
    def made(**fields: Any) -> zero_shot.Settings:
        return build(zero_shot.Settings, {"sets": {"a": url}, **fields})

    with pytest.raises(ConfigError, match=r"templates: template 'a photo' has no place"):
        made(templates=["{c}", "a photo"])
    with pytest.raises(ConfigError, match=r"templates: .*give at least one template"):
        made(templates=[])
    with pytest.raises(ConfigError, match=r"sets\.a\.urll='x': unknown field; did you mean 'url'"):
        made(sets={"a": {"urll": "x"}})


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "MOST_BYTES", 100)
    kept, made = Kept(), []

    def value(name: str) -> torch.Tensor:
        return kept.get(name, lambda: made.append(name) or torch.zeros(10))

    for name in ("a", "b", "a", "c", "a", "b"):
        assert len(value(name)) == 10
    assert made == ["a", "b", "c", "b"]
