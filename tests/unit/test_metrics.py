"""Rank metrics against cases by hand and a reference that sorts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.evaluators.retrieval import recall_at
from pretrain.evaluators.zero_shot import ranks_of_truth

# Few distinct values, so that ties are common; products of them are exact.
scores_of = st.integers(1, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(-2, 2), min_size=classes, max_size=classes), min_size=1, max_size=6
    )
)


def place_of_best(scores: list[float], relevant: list[bool]) -> int:
    """Position of the first relevant item, the sorting being against the model where scores tie."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))
    return next(place for place, i in enumerate(order) if relevant[i])


def test_ranks_by_hand() -> None:
    classes = torch.eye(3)
    e0_hat = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.2, 0.5, 0.5], [0.0, 0.0, 0.0]])
    ranks = ranks_of_truth(e0_hat, classes, torch.tensor([0, 2, 1, 0]))
    # first; last; tied for the first place and so second; all equal and so last
    assert ranks.tolist() == [0, 2, 1, 2]


@given(scores_of, st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_agree_with_sorting(scores: list[list[int]], data: st.DataObject) -> None:
    table = torch.tensor(scores).float()
    k = table.shape[1]
    labels = data.draw(st.lists(st.integers(0, k - 1), min_size=len(scores), max_size=len(scores)))
    # Against one-hot classes the score of class j is coordinate j.
    found = ranks_of_truth(table, torch.eye(k), torch.tensor(labels))
    expected = [
        place_of_best(row, [j == label for j in range(k)])
        for row, label in zip(scores, labels, strict=True)
    ]
    assert found.tolist() == expected


def test_a_model_that_says_the_same_of_everything_scores_nothing() -> None:
    same, classes = torch.ones(10, 4), torch.ones(5, 4)
    assert (ranks_of_truth(same, classes, torch.arange(10) % 5) == 4).all()
    assert recall_at(torch.ones(5, 5), torch.eye(5).bool(), 4) == 0.0
    assert recall_at(torch.ones(5, 5), torch.eye(5).bool(), 5) == 1.0


def test_a_model_that_says_nan_scores_nothing() -> None:
    nan = torch.full((3, 4), math.nan)
    assert (ranks_of_truth(nan, torch.eye(4), torch.tensor([0, 1, 2])) > 0).all()
    assert recall_at(nan, torch.eye(4)[:3].bool(), 1) == 0.0


def test_recall_by_hand() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [1, 1, 0, 0]])
    relevant = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    # first; third; tied for the first place and so second
    assert [recall_at(scores, relevant, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


@given(scores_of, st.integers(1, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_recall_agrees_with_sorting(scores: list[list[int]], k: int, data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=len(scores[0]), max_size=len(scores[0])).filter(any)
    relevant = data.draw(st.lists(row, min_size=len(scores), max_size=len(scores)))
    hits = [place_of_best(s, r) < k for s, r in zip(scores, relevant, strict=True)]
    found = recall_at(torch.tensor(scores).float(), torch.tensor(relevant), k)
    assert found == pytest.approx(sum(hits) / len(hits))


def test_recall_grows_with_k_and_the_transpose_is_the_other_way() -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(40, 8, generator=g), torch.arange(40) % 8
    relevant = labels[:, None] == torch.arange(8)
    by_image = [recall_at(scores, relevant, k) for k in range(1, 9)]
    by_text = [recall_at(scores.T, relevant.T, k) for k in range(1, 41)]
    assert by_image == sorted(by_image) and by_image[-1] == 1.0
    assert by_text == sorted(by_text) and by_text[-1] == 1.0
