"""Scores of discrimination, from embeddings alone. Ties count against the model, and NaN too.

Similarities are made a chunk of rows at a time, so that 5,000 images and 25,000 captions need no
matrix of both. Legend: N images, K classes, Q queries, G items of the gallery, E width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1024  # of similarities at once


@dataclass(frozen=True)
class Classified:
    """Attributes:
    rank_N: int64, how many classes score as high as the true one or higher; 0 is a top-1 hit.
    predicted_N: int64, the class that is best, a tie being for the wrong one.
    margin_N: fp32, the true class's score less the best wrong one's.
    """

    rank_N: Tensor
    predicted_N: Tensor
    margin_N: Tensor


def classify(
    images_NE: Tensor, classes_KE: Tensor, labels_N: Tensor, rows: int = ROWS
) -> Classified:
    """Every image against every class by the inner product.

    Args:
        labels_N: int64, the true class of each image.
        rows: images whose scores are held at once.
    """
    ranks, predictions, margins = [], [], []
    for start in range(0, len(images_NE), rows):
        labels_n1 = labels_N[start : start + rows, None]
        scores_nK = images_NE[start : start + rows] @ classes_KE.T
        truth_n1 = scores_nK.gather(1, labels_n1)
        rank_n = (~(scores_nK < truth_n1)).sum(1) - 1  # so put, NaN counts against the model
        best_wrong = scores_nK.scatter(1, labels_n1, -torch.inf).max(1)
        ranks.append(rank_n)
        predictions.append(torch.where(rank_n == 0, labels_n1[:, 0], best_wrong.indices))
        margins.append(truth_n1[:, 0] - best_wrong.values)
    return Classified(torch.cat(ranks), torch.cat(predictions), torch.cat(margins))


def within(rank_N: Tensor, k: int) -> float:
    """Share of ranks below ``k``: top-k accuracy, recall at k."""
    return (rank_N < k).double().mean().item()


def per_class(hits_N: Tensor, labels_N: Tensor, classes: int) -> list[float | None]:
    """Share of each class's images that are hits; None of a class without images."""
    of_class = torch.bincount(labels_N, minlength=classes).tolist()
    hit = torch.bincount(labels_N[hits_N], minlength=classes).tolist()
    return [h / n if n else None for h, n in zip(hit, of_class, strict=True)]


def mean_per_class(hits_N: Tensor, labels_N: Tensor, classes: int) -> float:
    """Mean of `per_class` over the classes that have images (balanced accuracy)."""
    found = [a for a in per_class(hits_N, labels_N, classes) if a is not None]
    return sum(found) / len(found)


def confusion(labels_N: Tensor, predicted_N: Tensor, classes: int) -> list[list[int]]:
    """[true, predicted, count] of every pair that occurs."""
    pairs, counts = (labels_N * classes + predicted_N).unique(return_counts=True)
    return [
        [p // classes, p % classes, n] for p, n in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]


def ranks_of_best(
    queries_QE: Tensor,
    gallery_GE: Tensor,
    group_Q: Tensor,
    group_G: Tensor,
    rows: int = ROWS,
) -> Tensor:
    """How many irrelevant items score as high as a query's best relevant one or higher, int64 (Q,);
    -1 where no item is relevant.

    Args:
        group_Q, group_G: int64; an item is relevant to the queries of its own group.
        rows: queries whose scores are held at once: memory grows by 11 bytes x rows x G.
    """
    found = []
    for start in range(0, len(queries_QE), rows):
        relevant_qG = group_Q[start : start + rows, None] == group_G
        scores_qG = queries_QE[start : start + rows] @ gallery_GE.T
        # Written into the scores themselves, twice: they are the largest thing here.
        best_q1 = scores_qG.masked_fill(~relevant_qG, -torch.inf).amax(1, keepdim=True)
        scores_qG.masked_fill_(relevant_qG, -torch.inf)
        nan_q = best_q1[:, 0].isnan()
        better_q = (~(scores_qG < best_q1)).sum(1)  # so put, NaN counts against the model
        # What is relevant was set to -inf, which is below any best but -inf and NaN.
        relevant_q = relevant_qG.sum(1)
        better_q -= torch.where(nan_q | (best_q1[:, 0] == -torch.inf), relevant_q, 0)
        found.append(torch.where(relevant_q > 0, better_q, -1))
    return torch.cat(found)


def recall(ranks_Q: Tensor, k: int) -> float:
    """Recall at ``k`` as image-text retrieval means it: the share of queries with a relevant item
    among the ``k`` best. Queries that nothing is relevant to do not count."""
    return within(ranks_Q[ranks_Q >= 0], k)
