"""The real pictures of a set, and their features, which any number of entries share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain import comm, storage
from pretrain.data.drawings import cache_folder
from pretrain.data.evalset import load_labelled
from pretrain.errors import DataError
from pretrain.evaluators._generated import in_rows
from pretrain.evaluators.base import Subject, share, together
from pretrain.features.base import Extractor, from_uint8, to_uint8

CHUNK = 32


@dataclass(frozen=True)
class Reals:
    """The real pictures of a set.

    Attributes:
        images: fp32 in [-1, 1], (n, 3, size, size), of the pictures with these numbers.
        captions: of each.
        fingerprint: of the set.
    """

    images: Callable[[Sequence[int]], Tensor]
    captions: tuple[str, ...]
    fingerprint: str


def load_reals(name: str, manifest: str, subject: Subject) -> Reals:
    """The set as the model's size shows it."""
    data = load_labelled(manifest, subject.data)
    return Reals(
        lambda numbers: data.images_NCHW[list(numbers)], data.captions, storage.sha256(manifest)
    )


def real_features(subject: Subject, name: str, reals: Reals, extractor: Extractor) -> Tensor:
    """Features (N, D) of the real pictures, on every rank; kept in the cache. Collective.

    Raises:
        Stopped: on every rank, if one was to stop.
    """
    from safetensors.torch import load, save

    n, size = len(reals.captions), subject.heads.model.config.image_size
    what = f"{reals.fingerprint} {n} {size} {extractor.fingerprint}"
    path = cache_folder("features", f"{storage.sha256_bytes(what.encode())[:32]}.safetensors")
    if comm.agree_all(path.is_file()):
        kept = load(path.read_bytes())["features"]
        if kept.shape != (n, extractor.width):
            raise DataError(
                f"{path}: features of set {name!r} have shape {tuple(kept.shape)}, not "
                f"({n}, {extractor.width}); delete it"
            )
        return kept
    device = subject.heads.model.null_tokens_L.device
    parts = [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]
    rows: dict[int, Tensor] = {}
    left = False
    for k in share(len(parts), subject.rank, subject.world):
        left = subject.pulse()
        if left:
            break
        # Rounded to whole pixels, as the generated ones are.
        images = from_uint8(to_uint8(reals.images(parts[k])))
        rows[k] = in_rows(images, extractor, device)
    found = {k: part for of_rank in together(rows, left) for k, part in of_rank.items()}
    joined = torch.cat([found[k] for k in range(len(parts))])
    if comm.local_rank() == 0:
        storage.write_bytes(str(path), save({"features": joined}))
    return joined
