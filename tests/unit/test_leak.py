"""The leak test: a model that has learned to classify must fall to chance when images are shuffled.

A published re-implementation reports 91% because the label's own text entered as the condition.
"""

import torch

from pretrain.diffusion.path import StreamConfig
from pretrain.diffusion.schedule import EDMConfig
from pretrain.evaluators._metrics import classify, within
from pretrain.inference import Heads, InferenceConfig
from pretrain.types import Batch
from tests.support import tiny

COLOURS = torch.tensor(
    [
        [1, -1, -1],
        [-1, 1, -1],
        [-1, -1, 1],
        [1, 1, -1],
        [1, -1, 1],
        [-1, 1, 1],
        [1, 1, 1],
        [-1, -1, -1],
    ]
).float()
K = len(COLOURS)


def words(labels: torch.Tensor) -> torch.Tensor:
    """One word of its own for each class."""
    tokens = torch.zeros(len(labels), tiny.LENGTH, dtype=torch.long)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 2, labels + 10, 3
    return tokens


def pictures(n: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy square of the class's colour on grey, anywhere in the picture."""
    g = torch.Generator().manual_seed(start)
    labels = torch.arange(n) % K
    images = torch.zeros(n, 3, tiny.SIZE, tiny.SIZE) + 0.2 * torch.randn(
        n, 3, tiny.SIZE, tiny.SIZE, generator=g
    )
    for image, label in zip(images, labels, strict=True):
        y, x = torch.randint(0, tiny.SIZE - 8, (2,), generator=g).tolist()
        image[:, y : y + 8, x : x + 8] += COLOURS[label][:, None, None]
    return images.clamp(-1, 1), labels


def trained() -> Heads:
    """Ninety steps of both objectives on the coloured squares: seconds on one core."""
    path = StreamConfig(schedule=EDMConfig(), predict="edm")
    task = tiny.task({"generate": {}, "align": {}}, image_path=path)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for step in range(90):
        images, labels = pictures(3 * K, start=step)
        tokens = words(labels)
        positions = torch.arange(step * 3 * K, (step + 1) * 3 * K)
        loss = task(Batch(images, tokens, tokens != 0, positions)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Heads(task.model.eval(), InferenceConfig(align_steps=2, align_noises=2))


def test_accuracy_is_high_and_falls_to_chance_when_images_are_shuffled():
    heads = trained()
    images, labels = pictures(200, start=10_000)
    tokens = words(torch.arange(K))
    classes = heads.embed_tokens(tokens, tokens != 0)
    e0_hat = heads.embed_images(images)
    accuracy = within(classify(e0_hat, classes, labels).rank_N, 1)
    assert accuracy > 5 / K, "nothing was learned, so nothing could leak"

    other = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = within(classify(e0_hat[other], classes, labels).rank_N, 1)
    # Of 200 draws at 1/8 the standard deviation is 2.3 points: chance, and not one part in four
    # more.
    assert abs(shuffled - 1 / K) < 0.08


def test_an_embedding_does_not_depend_on_the_batch_it_is_made_in():
    heads = Heads(tiny.model().eval(), InferenceConfig(align_steps=2, align_noises=2))
    images, _ = pictures(6, start=0)
    alone = torch.cat([heads.embed_images(images[i : i + 1]) for i in range(6)])
    assert torch.allclose(heads.embed_images(images), alone, atol=1e-5)
