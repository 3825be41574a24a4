"""The page of a data set: true to the data, complete in itself, and safe whatever captions say."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pretrain import __main__ as cli
from pretrain.data import inspect as surveys
from pretrain.data import page
from pretrain.data.inspect import Survey, survey
from pretrain.data.manifest import ASPECTS, Manifest
from pretrain.data.samples import Bounds
from pretrain.data.tokenizer import Tokenizer
from pretrain.page import show
from tests.unit.data.conftest import Member, good, index, png, write_tar

BOUNDS = Bounds(1 << 20, 1 << 20)
ATTACK = "\"><img src=x onerror=alert(1)><script>alert(2)</script>'</figure>&lt;$title\x00\x1b[31m"


class Page(HTMLParser):
    """What a browser would make of a page: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def titled(key: str, caption: str, size: tuple[int, int] = (16, 16)) -> list[Member]:
    return [(f"{key}.png", png(size=size)), (f"{key}.txt", caption.encode("utf-8", "replace"))]


def assert_harmless(text: str) -> Page:
    """No script, no handler, nothing from elsewhere, every tag closed."""
    found = Page(text)
    assert found.open == []
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "a", "video"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "data", "srcset"):
                assert value is not None and value.startswith("data:image/"), (tag, value)
    assert re.search(r"url\(|@import|https?://", text) is None
    policy = [a for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and str(policy[0]["content"]).startswith("default-src 'none'")
    return found


def test_figures_are_those_of_the_data(tmp_path: Path) -> None:
    first = titled("a", "one two three", (32, 16)) + titled("b", "one two", (32, 16))
    second = titled("c", "x " * 9, (16, 32)) + good("d") + [("mute.png", png())]
    urls = [write_tar(tmp_path / "0.tar", first), write_tar(tmp_path / "1.tar", second)]
    found = survey(index(tmp_path, urls), bounds=BOUNDS)
    assert (found.samples, found.shards, found.read) == (5, 2, 5)
    assert sorted(found.caption_lengths.tolist()) == [1, 2, 3, 4, 9]
    assert sorted(found.captions_a_sample.tolist()) == [1, 1, 1, 2]
    assert found.sizes.tolist() == [[32, 16], [32, 16], [16, 32], [16, 16], [16, 16]]
    assert dict(zip(ASPECTS, found.aspects.tolist(), strict=True))[2.0] == 2
    assert found.bytes == sum(Path(url).stat().st_size for url in urls)
    assert [(r.reason, r.key, r.shard) for r in found.rejects] == [("no caption", "mute", urls[1])]
    assert [(f.url, f.samples, f.refused) for f in found.table] == [
        ("0.tar", 2, 0),
        ("1.tar", 3, 1),
    ]
    assert {p.key for p in found.pictures} == {"a", "b", "c", "d"}
    assert found.words[0] == ("x", 9) and found.distinct == 5
    text = assert_harmless(page.render(found)).text
    for expected in ("5 captioned pictures in 2 shards", "no caption", "20 %", "mute", "1.tar"):
        assert expected in text.replace("\n", " "), expected


def test_a_bounded_sample_is_read_the_same_for_a_seed(
    corpus: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = corpus([20, 0, 30, 10])
    reads: list[tuple[int, int]] = []
    real = surveys.ShardReader.read

    def counted(self: object, dataset: int, shard: int, index: int) -> object:
        reads.append((shard, index))
        return real(self, dataset, shard, index)  # type: ignore[arg-type]

    monkeypatch.setattr(surveys.ShardReader, "read", counted)
    first = survey(url, samples=15, pictures=6, bounds=BOUNDS, seed=3, parallel=3)
    assert len(reads) == len(set(reads)) == first.read == 15 and len(first.pictures) == 6
    again = survey(url, samples=15, pictures=6, bounds=BOUNDS, seed=3, parallel=1)
    assert page.render(first) == page.render(again)
    other = survey(url, samples=15, pictures=6, bounds=BOUNDS, seed=4)
    assert [p.key for p in other.pictures] != [p.key for p in first.pictures]
    assert len(first.sizes) == 60, "sizes come from the member table, for all samples"
    assert "15 samples drawn at random" in Page(page.render(first)).text


def test_every_sample_may_be_drawn_and_none_twice(corpus: Callable[..., str]) -> None:
    manifest = Manifest.load(corpus([3, 5, 2]))
    assert sorted(surveys._drawn(manifest, 10, 0).tolist()) == list(range(10))
    drawn = {n for seed in range(40) for n in surveys._drawn(manifest, 2, seed).tolist()}
    assert drawn == set(range(10))


def test_captions_cannot_leave_their_place(tmp_path: Path) -> None:
    shard = "0 <b>&\"'.tar"
    members = titled("k<i>&", ATTACK) + titled("m", "‮reversed and long " + "w" * 5000)
    members += [("bad<script>.png", b"x"), ("bad<script>.txt", ATTACK.encode())]
    url = index(tmp_path, [write_tar(tmp_path / shard, members)])
    found = survey(url, bounds=BOUNDS)
    assert len(found.rejects) == 1 and len(found.pictures) == 2
    found.words.append((ATTACK, 3))
    found.repeated.append((ATTACK, 3))
    text = page.render(found)
    shown = assert_harmless(text)
    assert {tag for tag, _ in shown.tags if tag in ("script", "b", "i")} <= {"b", "i"}
    expected = "".join(c if c.isprintable() else "\ufffd" for c in ATTACK)
    alts = {a["alt"] for a in shown.all("img")}
    assert expected in alts and expected in shown.text
    assert len(shown.all("img")) == 2 and "more characters" in shown.text
    assert "\x00" not in text and "\x1b" not in text
    text.encode()


@given(st.text(alphabet=st.characters(), max_size=40))
def test_escaped_text_is_text(text: str) -> None:
    assert "<" not in show.escape(text) and '"' not in show.escape(text)
    parsed = Page(f'<p title="{show.escape(text)}">{show.escape(text)}</p>')
    assert [tag for tag, _ in parsed.tags] == ["p"] and parsed.open == []
    kept = [c for c in text if c.isprintable() and not "\ud800" <= c <= "\udfff"]
    assert [c for c in parsed.text if c not in "\ufffd?\n\t"] == [
        c for c in kept if c not in "\ufffd?"
    ]


def test_pictures_are_small_and_have_their_caption_as_text(corpus: Callable[..., str]) -> None:
    found = survey(corpus([4]), bounds=BOUNDS, thumbnail=8)
    for picture in found.pictures:
        kind, _, data = picture.thumbnail.partition(",")
        assert kind == "data:image/webp;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 8
        assert (picture.width, picture.height) == (16, 16)
        assert picture.caption in picture.captions and len(picture.captions) == 2
    shown = Page(page.render(found))
    assert sorted(str(a["alt"]) for a in shown.all("img")) == sorted(
        p.caption for p in found.pictures
    )
    assert all(figure.get("tabindex") == "0" for figure in shown.all("figure"))


def test_captions_in_tokens_and_the_share_that_is_cut(
    corpus: Callable[..., str], small_tokenizer: str
) -> None:
    tokenizer = Tokenizer(small_tokenizer)
    found = survey(corpus([3]), bounds=BOUNDS, tokenizer=tokenizer, limit=8)
    lengths = sorted(
        len(tokenizer._processor.Encode(text)) + 2
        for i in range(3)
        for text in (f"s0-{i}", f"a drawing of s0-{i}")
    )
    assert sorted(found.caption_lengths.tolist()) == lengths
    share = 100 * sum(n > 8 for n in lengths) / 6
    assert f"cuts at 8 tokens: {share:.2g} % are longer" in Page(page.render(found)).text


def test_a_shard_that_cannot_be_read_is_told_and_the_rest_shown(
    tmp_path: Path, corpus: Callable[..., str]
) -> None:
    url = corpus([3, 4])
    (tmp_path / "0.tar").unlink()
    found = survey(url, bounds=BOUNDS)
    assert {r.reason for r in found.rejects} == {"unreadable shard"} and len(found.rejects) == 3
    assert len(found.pictures) == 4
    assert_harmless(page.render(found))


def test_thousands_of_shards_make_a_bounded_table(
    tmp_path: Path, corpus: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surveys, "TABLE_SHARDS", 8)
    url = corpus([5, 6, 1, 30, 6, 4, 12, 15, 18, 6, 6, 20])
    (tmp_path / "5.tar").unlink()
    found = survey(url, bounds=BOUNDS)
    assert len(found.table) <= 8 and found.table[0].url == "5.tar" and found.table[0].refused == 4
    assert {"2.tar", "3.tar"} <= {f.url for f in found.table}, "the smallest and the largest"
    assert "of 12: those with refusals" in Page(page.render(found)).text


def bars(chart: str) -> list[tuple[str, int]]:
    """(name, count) of each bar, from what it says when pointed at."""
    titles = re.findall(r"<title>(.*?): ([\d,]+) \w+ \(", chart)
    return [(name, int(count.replace(",", ""))) for name, count in titles]


@given(
    st.one_of(
        st.lists(st.integers(0, 40), min_size=2, max_size=200),
        st.lists(st.integers(1, 100_000), min_size=2, max_size=200),
        st.lists(st.integers(10_000, 10_100), min_size=2, max_size=50),
    )
)
def test_a_histogram_counts_every_value_once(values: list[int]) -> None:
    chart = show.histogram(np.array(values), "things", "units")
    if len(set(values)) == 1:
        assert "alike" in chart and "<svg" not in chart
        return
    assert sum(count for _, count in bars(chart)) == len(values)
    for number in re.findall(r'(?:x|y|x1|x2|y1|y2|width|height)="(-?[\d.]+)"', chart):
        assert 0 <= float(number) <= show.WIDTH, chart
    assert "things" in chart and "units" in chart and 'role="img"' in chart


def test_a_bar_stands_for_what_it_says() -> None:
    assert bars(show.histogram(np.array([1, 1, 2, 4]), "n", "u")) == [
        ("1 u", 2),
        ("2 u", 1),
        ("4 u", 1),
    ]
    sizes = np.array([1024, 1024, 1536, 4096]) / 1024
    assert bars(show.histogram(sizes, "n", "KiB", grain=0.5))[:2] == [("1 KiB", 2), ("1.5 KiB", 1)]
    wide = show.histogram(np.array([9] * 50 + [100_000] * 50), "n", "u")
    assert len(bars(wide)) == 2 and "median" in wide
    tail = np.array([*range(10)] * 200 + [10_000])
    assert bars(show.histogram(tail, "n", "u"))[-1][0].endswith("and more u")


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 << 30, "3 GiB")],
)
def test_sizes_in_words(bytes_: int, text: str) -> None:
    assert show.size(bytes_) == text


def test_an_empty_survey_still_makes_a_page() -> None:
    nothing = np.zeros((0, 2), np.int64)
    empty = Survey(
        "u", 1, 1, 512, 1, 0, nothing, np.array([512]), np.array([0] * 4 + [1] + [0] * 4)
    )
    assert "has a caption" in assert_harmless(page.render(empty)).text


def test_the_command_writes_the_page(
    tmp_path: Path, corpus: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["data", "inspect", corpus([3]), "--out", str(out), "--samples", "2"]) == 0
    assert "2 of 3 samples" in capsys.readouterr().out
    assert_harmless(out.read_text(encoding="utf-8"))
    assert cli.main(["data", "inspect", "x", "--out", str(out), "--samples", "0"]) == 2
