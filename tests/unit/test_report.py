"""The report: true to the files, complete in itself, safe whatever a caption says, and nowhere
silently blank."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pretrain.__main__ import main
from pretrain.errors import DataError
from pretrain.report import charts, page, read, tables
from pretrain.results import Finished, Folder, Model, Scorecard
from tests.support import scored
from tests.unit.data.test_inspect import ATTACK, Page, assert_harmless


def png(colour: str = "red") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


CLASSES = ["apple", "owl", "car"]
CONFUSION = [[0, 0, 1], [0, 1, 3], [1, 1, 4], [2, 0, 1], [2, 2, 3]]


def zero_shot(classes: list[str]) -> dict[str, Any]:
    example = {"key": "k7", "true": classes[0], "predicted": classes[::-1], "scores": [0.9, 0.5]}
    return {
        "set": "vendor",
        "classes": classes,
        "confusion": CONFUSION,
        "per_class": [0.25, 1.0, None],
        "examples": [{**example, "png": png()}],
    }


def retrieval(text: str) -> dict[str, Any]:
    hit = {"caption": text, "png": png("green"), "right": True, "score": 0.75}
    miss = {"caption": "a miss", "png": None, "right": False, "score": 0.5}
    asked = {"query": text, "kind": "text", "truth": ["k1"], "found": [hit, miss]}
    return {"set": "vendor", "examples": [asked, {**asked, "query": png(), "kind": "image"}]}


def generation(prompt: str) -> dict[str, Any]:
    drawn = {"prompt": prompt, "png": png("blue")}
    samples = [{**drawn, "seed": 5}, {**drawn, "seed": 6}]
    return {"set": "vendor", "samples": samples, "notes": ["vendor: FID of 4 generated"]}


def score(run: Path, shift: float = 0.0, text: str = "apple", suite: str = "study") -> Path:
    """A scorecard of the three kinds of entries, in ``run``."""
    folder = Folder(run / "scorecard")
    sets = {"sets": {"vendor": {}}}
    made = [
        ("zs[noises=1]", "zero_shot", {"top1": 0.5 + shift, "chance": 0.01}, zero_shot),
        ("zs[noises=4]", "zero_shot", {"top1": 0.625 + shift, "chance": 0.01}, zero_shot),
        ("found", "retrieval", {"image_to_text_r1": 0.3, "text_to_image_r1": None}, retrieval),
        ("w1", "generation", {"kid": 0.04 - shift / 10, "fid": 70.0}, generation),
        ("w3", "generation", {"kid": 0.03 - shift / 10, "fid": 60.0}, generation),
    ]
    entries = []
    for name, evaluator, values, details in made:
        metrics: dict[str, float | None] = {f"{evaluator}/vendor/{k}": v for k, v in values.items()}
        metrics["cost/vendor/images_per_second"] = 10.0
        given: Any = [text, *CLASSES[1:]] if evaluator == "zero_shot" else text
        path = folder.files(name, "0" * 64) / "details.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(details(given)))
        kept = str(path.relative_to(folder.path))
        entries.append(Finished(name, evaluator, sets, "0" * 64, 2.5, 2, metrics, [], kept))
    model = Model("diffdis", str(run), "samples-000000000160", 160, "weights")
    folder.write(Scorecard(suite, model, tuple(entries)))
    return run


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored.make_run(tmp_path_factory.mktemp("runs") / "alpha")


@pytest.fixture
def alpha(unscored: Path, tmp_path: Path) -> Path:
    shutil.copytree(unscored, tmp_path / "alpha")
    return score(tmp_path / "alpha")


@pytest.fixture
def beta(unscored: Path, tmp_path: Path) -> Path:
    shutil.copytree(unscored, tmp_path / "beta")
    tree = json.loads((tmp_path / "beta/config.json").read_text())
    tree["seed"], tree["output"] = 7, "elsewhere"
    (tmp_path / "beta/config.json").write_text(json.dumps(tree))
    return score(tmp_path / "beta", shift=0.125)


def rendered(*runs: Path) -> tuple[str, Page]:
    text = page.render(read.load([str(run) for run in runs]))
    return text, assert_harmless(text)


def rows(text: str, title: str) -> list[list[str]]:
    """Cells of the first table after a heading, as text."""
    table = re.search(rf"<h[23]>{re.escape(title)}</h[23]>.*?<table>(.*?)</table>", text, re.S)
    assert table, title
    return [
        [Page(cell).text for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)]
        for row in re.findall(r"<tr>(.*?)</tr>", table.group(1), re.S)
    ]


def test_a_page_of_one_run(alpha: Path) -> None:
    text, found = rendered(alpha)
    (head, row) = rows(text, "Runs")
    cells = dict(zip(head, row, strict=True))
    assert cells["Run"] == "A alpha" and cells["Samples"] == "160" and cells["Suite"] == "study"
    assert cells["Training data"] == "data/emoji/train.json"
    assert cells["Weights"] == "weights" and cells["Objectives"] == "generate, align"
    parameters = sum(p.numel() for p in _task(alpha).parameters())
    assert cells["Parameters"] == charts.short(parameters)
    table = rows(text, "zero shot on vendor")
    assert table[0] == ["Entry", "top1", "chance"]
    assert table[1:] == [["zs[noises=1]", "50.0 %", "1.0 %"], ["zs[noises=4]", "62.5 %", "1.0 %"]]
    assert rows(text, "retrieval on vendor")[1] == ["found", "30.0 %", "–"]
    assert '<b class="best">62.5 %</b>' in text and '<b class="best">1.0 %</b>' not in text
    assert '<b class="best">0.03</b>' in text and '<b class="best">60</b>' in text
    assert "One run alone" in found.text and "missing" not in re.sub(
        "<style>.*?</style>", "", text, flags=re.S
    )


def _task(run: Path) -> Any:
    from pretrain.export import load_task

    return load_task(run)[0]


def test_several_runs_stand_side_by_side(alpha: Path, beta: Path) -> None:
    text, found = rendered(alpha, beta)
    assert [r[0] for r in rows(text, "Runs")] == ["Run", "A alpha", "B beta"]
    table = rows(text, "zero shot on vendor")
    order = ["A zs[noises=1]", "B zs[noises=1]", "A zs[noises=4]", "B zs[noises=4]"]
    assert [r[0] for r in table[1:]] == order
    assert text.count('<b class="best">75.0 %</b>') == 1 and '<b class="best">62.5' not in text
    different = rows(text, "Configuration")
    assert different == [["Field", "A alpha", "B beta"], ["seed", "0", "7"]]
    dots = re.findall(r'r="8"/>.*?<title>(.*?)</title>', text)
    assert sorted(dots) == [
        "A alpha: top-1 62.5 % (zs[noises=4]), KID 0.03 (w3)",
        "B beta: top-1 75 % (zs[noises=4]), KID 0.0175 (w3)",
    ]
    assert "B on vendor" in found.text  # whose the best figures are


def test_each_of_several_sets_has_its_pictures(alpha: Path, beta: Path) -> None:
    """Details hold one set's fields themselves, of several sets those of each by its name."""
    for entry in read.load([str(alpha)])[0].entries():
        path = alpha / "scorecard" / str(entry.details)
        one = json.loads(path.read_text())
        other = json.loads(path.read_text().replace('"apple"', '"a pear"'))
        path.write_text(json.dumps({"sets": {"vendor": one, "concepts": other}}))
    text, _ = rendered(alpha, beta)
    for name, run in [("vendor", "A"), ("concepts", "A"), ("vendor", "B")]:
        assert f"{run} · {name} · zs[noises=" in text
    assert "B · concepts" not in text
    assert "a pear → owl" in text and text.count("<b>3<small> of 4</small></b>") == 3
    worst, retrieval = (
        re.findall(rf"<h2>{title}</h2>(.*?)<h2>", text, re.S)[0]
        for title in ("Worst classes", "Retrieval")
    )
    titles = [Page(t).text for t in re.findall(r"<h3>(.*?)</h3>", worst)]
    assert [t.rsplit(" · ")[0] for t in titles] == ["A vendor", "B vendor", "A concepts"]
    assert "a pear 25 % right" in Page(worst).text
    titles = [Page(t).text for t in re.findall(r"<h3>(.*?)</h3>", retrieval)]
    assert titles == ["A vendor · found", "A concepts · found", "B vendor · found"]
    assert '<bdi class="asked" title="k1">a pear</bdi>' in retrieval
    cards = re.findall(r'<figure><div class="tiles">.*?<figcaption>(.*?)</figcaption>', text, re.S)
    shown = [Page(card).text for card in cards]
    assert shown == ["apple vendor, seed 5", "apple vendor, seed 6"]  # what all of them drew
    _, alone = rendered(alpha)
    assert "a pear concepts, seed 6" in alone.text and "apple vendor, seed 5" in alone.text
    assert alone.text.count("vendor: FID of 4 generated") == 1


def test_samples_of_the_same_prompt_and_seed_share_a_card(alpha: Path, beta: Path) -> None:
    text, _ = rendered(alpha, beta)
    cards = re.findall(r'<figure><div class="tiles">(.*?)</figure>', text, re.S)
    assert len(cards) == 2  # two seeds
    for card, seed in zip(cards, (5, 6), strict=True):
        told = re.findall(r'alt="(.*?)"', card)
        assert told == [
            f"{run}, {entry}: apple, seed {seed}"
            for run in ("alpha", "beta")
            for entry in ("w1", "w3")
        ]


def test_confusions_are_those_of_the_best_entry(alpha: Path) -> None:
    text, found = rendered(alpha)
    assert "A · vendor · zs[noises=4]" in text and "A · vendor · zs[noises=1]" not in text
    cells = re.findall(r'class="(right|wrong)"[^>]*><title>(.*?)</title>', text)
    assert ("wrong", "apple → owl: 3 of 4 pictures") in cells
    assert ("right", "owl → owl: 4 of 4 pictures") in cells and len(cells) == len(CONFUSION)
    assert "12 pictures of 3 classes; 66.7 % right." in found.text
    pairs = re.findall(r'<ol class="confused">(.*?)</ol>', text, re.S)[0]
    assert Page(pairs).text.startswith("apple → owl3 of 4")
    assert "apple 25 % right" in found.text


def test_500_classes_stay_readable(alpha: Path) -> None:
    n = 500
    tree = {
        "set": "vendor",
        "classes": [f"class {i:03d}" for i in range(n)],
        # Neighbours of a hidden order are confused; the numbers of the classes say nothing of it.
        "confusion": [[i * 7 % n, (i + d) * 7 % n, 5 - d] for i in range(n - 2) for d in (0, 1, 2)],
        "per_class": [0.4] * n,
        "examples": [],
    }
    entry = read.load([str(alpha)])[0].entries("zero_shot")[1]
    (alpha / "scorecard" / str(entry.details)).write_text(json.dumps(tree))
    text, found = rendered(alpha)
    matrix = re.findall(r'<svg class="matrix".*?</svg>', text, re.S)[0]
    assert 24 <= len(re.findall(r'class="(?:right|wrong)"', matrix)) <= 24 * 24
    assert "5,976 pictures of 500 classes in 24 groups" in found.text
    told = re.findall(r'class="(right|wrong)".*?: ([\d,]+) of', matrix)
    inside = sum(int(c.replace(",", "")) for kind, c in told if kind == "right")
    assert inside > 0.9 * 5976, "classes that are taken for each other do not stand together"
    assert "kept no examples" in found.text


def test_hostile_text_is_shown_and_nothing_else(unscored: Path, tmp_path: Path) -> None:
    """Captions, class names, prompts, suite and run names: the parser finds no tag of theirs."""
    run = tmp_path / "<b>run"
    shutil.copytree(unscored, run)
    score(run, text=ATTACK, suite=ATTACK)
    config = json.loads((run / "config.json").read_text())
    config["data"]["train"] = ATTACK
    (run / "config.json").write_text(json.dumps(config))
    text, found = rendered(run, run)
    assert "alert(1)" in found.text and "<script" not in text and "<img src=x" not in text
    assert "$title" in found.text  # the template's own marks are text too
    assert "\x1b" not in text and "\x00" not in text
    images = found.all("img")
    assert images and all(str(i["src"]).startswith("data:image/png;base64,iVBOR") for i in images)


@pytest.mark.parametrize("bad", ['"><script>', 'iVBORw0KGgo" onerror=x', "R0lGODlh", 7, None, ""])
def test_a_picture_that_is_none_says_so(alpha: Path, bad: Any) -> None:
    path = alpha / "scorecard" / str(read.load([str(alpha)])[0].entries("zero_shot")[1].details)
    tree = json.loads(path.read_text())
    tree["examples"][0]["png"] = bad
    path.write_text(json.dumps(tree))
    assert "no picture" in rendered(alpha)[1].text


def test_what_is_missing_is_named_with_its_command(unscored: Path, tmp_path: Path) -> None:
    run = tmp_path / "bare"
    shutil.copytree(unscored, run)
    (run / "evaluations.jsonl").unlink()
    journal = run / "journal/events.jsonl"
    kept = [x for x in journal.read_text().splitlines() if "validation/generate" not in x]
    journal.write_text("\n".join(kept) + "\n")
    _, found = rendered(run)
    command = f"python -m pretrain evaluate --output {run} --suite SUITE.yaml"
    for what in ("scorecard", "KID", "zero-shot accuracy", "confusions", "retrieval examples"):
        assert re.search(rf"bare has no {what}\. Make it with {re.escape(command)}", found.text), (
            what
        )
    assert "bare has no pictures of a generation entry" in found.text
    assert f"--output {run} --only validation" in found.text
    assert "No run has a scorecard" in found.text
    body = page.render(read.load([str(run)])).split("</main>")[0]
    for part in body.split("<h2>")[1:]:
        below = re.sub(r"^.*?</h2><p>.*?</p>", "", part, flags=re.S)
        assert len(Page(below).text) > 20 or "One run" in part


def test_curves_are_those_of_the_journal_and_the_evaluations(alpha: Path) -> None:
    text, _ = rendered(alpha)
    assert "A alpha, training: 0.333 at 96 samples" in text
    assert "A alpha, held-out: 0.5 at 160 samples" in text
    assert "A alpha, held-out: 1.5 at 160 samples" in text
    assert "scorecard/" not in text.split("<h2>Curves</h2>")[1].split("<h2>")[0]


def test_the_command_takes_folders_of_results_too(alpha: Path, tmp_path: Path, capsys: Any) -> None:
    other = alpha / "scorecard-ema"
    shutil.copytree(alpha / "scorecard", other)
    out = tmp_path / "report.html"
    assert main(["report", str(alpha), str(other), "--out", str(out)]) == 0
    text = out.read_text()
    assert [r[0] for r in rows(text, "Runs")][1:] == ["A alpha", "B alpha/scorecard-ema"]
    assert rows(text, "Runs")[2][1] == rows(text, "Runs")[1][1]  # its run is found beside it
    assert main(["report", str(tmp_path), "--out", str(out)]) == 2
    assert "neither config.json nor results.json" in capsys.readouterr().err


def test_a_file_that_is_gone_is_an_error_that_says_what_to_do(alpha: Path) -> None:
    shutil.rmtree(alpha / "scorecard/files/found")
    with pytest.raises(DataError, match="evaluate again"):
        rendered(alpha)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("zero_shot/x/top1", 1), ("retrieval/x/image_to_text_r10", 1), ("generation/x/kid", -1),
        ("generation/x/kid_std", 0), ("generation/x/agreement_independent", 1),
        ("zero_shot/x/chance", 0), ("cost/x/seconds", -1), ("cost/x/images_per_second", 1),
        ("validation/align/loss", -1), ("validation/align/logit_scale", 0),
        ("generation/x/recall", 1), ("cost/x/passes_per_image", -1),
    ],
)  # fmt: skip
def test_which_way_is_better(metric: str, expected: int) -> None:
    assert tables.direction(metric) == expected


def test_points_stay_in_the_picture() -> None:
    """Whatever the values: equal ones, one alone, tiny and huge, with gaps."""
    for values in ([1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 1e12], [1.0, float("nan")]):
        points = [(float(i * 1000), v) for i, v in enumerate(values)]
        svg = charts.lines([charts.Line("x", 0, points)], charts.Axis("s"), charts.Axis("y"), "s")
        placed = [float(v) for pair in re.findall(r'c[xy]="(.*?)"', svg) for v in [pair]]
        assert placed and all(0 <= v <= charts.WIDTH for v in placed)
        assert len(re.findall("<title>", svg)) == sum(v == v for v in values)
        assert "nan" not in svg and "inf" not in svg
    many = [(float(i), 1.0) for i in range(10_000)]
    svg = charts.lines([charts.Line("x", 0, many)], charts.Axis("s"), charts.Axis("y"), "s")
    assert svg.count("<title>") <= charts.MOST_POINTS
