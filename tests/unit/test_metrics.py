"""Scores of discrimination against cases by hand, a float64 reference, torchmetrics, and the
definitions of clip-benchmark.

clip-benchmark's package needs torchvision, which is not for this environment: what it computes is
restated here (clip_benchmark 1.6.2, metrics/zeroshot_classification.py and zeroshot_retrieval.py).
Ranks are integers and are compared exactly; their means within 1e-12, the rounding of a float64 sum
of a thousand; torchmetrics' means within 1e-6, for it sums in float32.
"""

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.evaluators._metrics import (
    classify,
    confusion,
    mean_per_class,
    per_class,
    ranks_of_best,
    recall,
    within,
)

EXACT = 1e-12
FLOAT32 = 1e-6
# Few distinct values, so that ties are common; products of them are exact.
scores_of = st.integers(2, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(-2, 2), min_size=classes, max_size=classes), min_size=1, max_size=6
    )
)


def unit(rows: int, seed: int, width: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=g), dim=-1)


def place_of_best(scores: list[float], relevant: list[bool]) -> int:
    """Position of the first relevant item, the sorting being against the model where scores tie."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))
    return next(place for place, i in enumerate(order) if relevant[i])


def test_ranks_by_hand() -> None:
    rows = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.2, 0.5, 0.5], [0.0, 0.0, 0.0]])
    found = classify(rows, torch.eye(3), torch.tensor([0, 2, 1, 0]))
    # first; last; tied for the first place and so second; all equal and so last
    assert found.rank_N.tolist() == [0, 2, 1, 2]
    assert found.predicted_N.tolist() == [0, 0, 2, 1]  # of a tie, the wrong one
    assert found.margin_N.tolist() == pytest.approx([0.8, -0.9, 0.0, 0.0])


@given(scores_of, st.data(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_ranks_agree_with_sorting(scores: list[list[int]], data: st.DataObject, rows: int) -> None:
    table = torch.tensor(scores).float()
    k = table.shape[1]
    labels = data.draw(st.lists(st.integers(0, k - 1), min_size=len(scores), max_size=len(scores)))
    # Against one-hot classes the score of class j is coordinate j.
    found = classify(table, torch.eye(k), torch.tensor(labels), rows)
    expected = [
        place_of_best(row, [j == label for j in range(k)])
        for row, label in zip(scores, labels, strict=True)
    ]
    assert found.rank_N.tolist() == expected
    hits = [p == y for p, y in zip(found.predicted_N.tolist(), labels, strict=True)]
    assert hits == [rank == 0 for rank in expected]  # the confusion matrix says what top-1 says


@given(scores_of, st.data(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_retrieval_agrees_with_sorting(
    scores: list[list[int]], data: st.DataObject, rows: int
) -> None:
    table = torch.tensor(scores).float()
    q, g = table.shape
    group = st.integers(0, 2)
    group_q = data.draw(st.lists(group, min_size=q, max_size=q))
    group_g = data.draw(st.lists(group, min_size=g, max_size=g))
    found = ranks_of_best(table, torch.eye(g), torch.tensor(group_q), torch.tensor(group_g), rows)
    for row, own, place in zip(scores, group_q, found.tolist(), strict=True):
        relevant = [other == own for other in group_g]
        assert place == (place_of_best(row, relevant) if any(relevant) else -1)


def test_a_model_that_says_the_same_of_everything_scores_nothing() -> None:
    same, classes = torch.ones(10, 4), torch.ones(5, 4)
    assert (classify(same, classes, torch.arange(10) % 5).rank_N == 4).all()
    ranks = ranks_of_best(same, classes, torch.arange(10) % 5, torch.arange(5))
    assert recall(ranks, 4) == 0.0 and recall(ranks, 5) == 1.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_model_that_says_nan_scores_nothing(value: float) -> None:
    bad = torch.full((3, 4), value)
    labels = torch.tensor([0, 1, 2])
    assert (classify(bad, torch.eye(4), labels).rank_N > 0).all()
    assert recall(ranks_of_best(bad, torch.eye(4), labels, torch.arange(4)), 1) == 0.0
    many = unit(5, 0)
    many[1] = value  # one bad caption among an image's own
    own = torch.tensor([0, 0, 1, 1, 1])
    if value != value:
        assert ranks_of_best(unit(1, 1), many, own[:1], own).item() == 3


def test_a_query_that_nothing_answers_does_not_count() -> None:
    ranks = ranks_of_best(
        torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1, 7]), torch.tensor([0, 1])
    )
    assert ranks.tolist() == [0, 0, -1]
    assert recall(torch.tensor([0, 3, -1]), 1) == 0.5


def reference(
    images: Tensor, classes: Tensor, labels: Tensor
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranks and predictions in float64."""
    scores = images.double().numpy() @ classes.double().numpy().T
    truth = np.take_along_axis(scores, labels.numpy()[:, None], 1)
    return (scores >= truth).sum(1) - 1, scores.argmax(1)


def test_classification_agrees_with_float64_and_torchmetrics() -> None:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
    )

    n, k = 1000, 23
    labels = torch.arange(n) ** 2 % k  # some classes have no image
    classes = unit(k, 1)
    images = torch.nn.functional.normalize(classes[labels] + 1.8 * unit(n, 2), dim=-1)
    found = classify(images, classes, labels, rows=97)
    ranks, predicted = reference(images, classes, labels)
    assert (found.rank_N.numpy() == ranks).all() and (found.predicted_N.numpy() == predicted).all()
    assert 0.3 < within(found.rank_N, 1) < 0.95
    scores = images @ classes.T
    for top in (1, 5):
        theirs = multiclass_accuracy(scores, labels, k, average="micro", top_k=top).item()
        assert within(found.rank_N, top) == pytest.approx((ranks < top).mean(), abs=EXACT)
        assert within(found.rank_N, top) == pytest.approx(theirs, abs=FLOAT32)
    hits = found.rank_N < 1
    # clip-benchmark: balanced_accuracy_score of scikit-learn, the mean over classes that have
    # images of the share of them that is right.
    y = labels.numpy()
    balanced = np.mean([(predicted[y == c] == c).mean() for c in np.unique(y)])
    assert mean_per_class(hits, labels, k) == pytest.approx(balanced, abs=EXACT)
    table = multiclass_confusion_matrix(scores, labels, k)
    ours = torch.zeros_like(table)
    for true, guess, count in confusion(labels, found.predicted_N, k):
        ours[true, guess] = count
    assert torch.equal(ours, table)
    theirs = multiclass_accuracy(scores, labels, k, average="none")
    for c, value in enumerate(per_class(hits, labels, k)):
        if value is None:
            assert not (labels == c).any()
        else:
            assert value == pytest.approx(theirs[c].item(), abs=FLOAT32)


def clip_benchmark_recall(
    scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], k: int
) -> float:
    """Among the k best of each row, is there a positive one (its `recall_at_k(...) > 0`)."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(positive, best, 1).any(1).mean())


def test_retrieval_agrees_with_float64_torchmetrics_and_clip_benchmark() -> None:
    from torchmetrics.retrieval import RetrievalHitRate

    n, each = 60, 5
    owner = torch.arange(n).repeat_interleave(each)[: n * each - 3]  # one image has two
    images = unit(n, 3)
    texts = torch.nn.functional.normalize(images[owner] + 1.8 * unit(len(owner), 4), dim=-1)
    scores = texts.double().numpy() @ images.double().numpy().T
    positive = owner.numpy()[:, None] == np.arange(n)
    both = [
        (ranks_of_best(texts, images, owner, torch.arange(n), 7), scores, positive),
        (ranks_of_best(images, texts, torch.arange(n), owner, 7), scores.T, positive.T),
    ]
    for ranks, table, right in both:
        best = np.where(right, table, -np.inf).max(1, keepdims=True)
        assert (ranks.numpy() == ((table >= best) & ~right).sum(1)).all()
        rows = torch.arange(len(table))[:, None].expand(table.shape)
        for k in (1, 5, 10):
            assert recall(ranks, k) == pytest.approx(
                clip_benchmark_recall(table, right, k), abs=EXACT
            )
            metric = RetrievalHitRate(top_k=k)
            metric.update(
                torch.from_numpy(np.ascontiguousarray(table)).float().flatten(),
                torch.from_numpy(np.ascontiguousarray(right)).flatten(),
                rows.flatten(),
            )
            assert recall(ranks, k) == pytest.approx(metric.compute().item(), abs=FLOAT32)
        assert 0.2 < recall(ranks, 1) < recall(ranks, 10)


LARGE = """
import resource, torch
from pretrain.evaluators._metrics import ranks_of_best
g = torch.Generator().manual_seed(0)
images, texts = torch.randn(1280, 16, generator=g), torch.randn(25000, 16, generator=g)
owner = torch.arange(25000) % 1280
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ranks_of_best(images, texts, torch.arange(1280), owner, 256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_chunk() -> None:
    """256 of 1,280 images against 25,000 captions at a time: at once they would need 350 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) / 1024 < 120  # MB; 256 rows x 25,000 x 11 bytes are 70
