"""Features of a set's real pictures, which any number of entries share."""

from contextlib import suppress

import torch
from torch import Tensor

from pretrain import comm, storage
from pretrain.data.drawings import cache_folder
from pretrain.data.evalset import EvalSet
from pretrain.errors import DataError
from pretrain.evaluators._generated import in_rows
from pretrain.evaluators.base import Subject, share, together
from pretrain.features.base import Extractor, from_uint8, to_uint8

CHUNK = 64


def real_features(subject: Subject, data: EvalSet, extractor: Extractor) -> Tensor:
    """Features (N, D) of all pictures, on every rank; a chunk of pictures in memory at a time. Kept
    in the cache, and until all are made in the subject's scratch folder. Collective.

    Raises:
        Stopped: on every rank, if one was to stop.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    n, size = len(data), subject.data.size
    what = f"{data.images_sha256} {n} {size} {extractor.fingerprint}"
    name = storage.sha256_bytes(what.encode())[:32]
    path = cache_folder("features", f"{name}.safetensors")
    if comm.agree_all(path.is_file()):
        kept = load(path.read_bytes())["features"]
        if kept.shape != (n, extractor.width):
            raise DataError(
                f"{path}: features of set {data.name!r} have shape {tuple(kept.shape)}, not "
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
        held = subject.scratch and subject.scratch / "reals" / name / f"{k:06d}.safetensors"
        if held:
            with suppress(OSError, SafetensorError, KeyError):  # damaged: made anew
                rows[k] = load(held.read_bytes())["features"]
                continue
        # Rounded to whole pixels, as the generated ones are.
        rows[k] = in_rows(from_uint8(to_uint8(data.images(parts[k]))), extractor, device)
        if held:
            storage.write_bytes(str(held), save({"features": rows[k]}))
    found = {k: part for of_rank in together(rows, left) for k, part in of_rank.items()}
    joined = torch.cat([found[k] for k in range(len(parts))])
    if comm.local_rank() == 0:
        storage.write_bytes(str(path), save({"features": joined}))
    return joined
