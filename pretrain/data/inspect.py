"""What a data set looks like, from a bounded sample of it: read here, drawn by `page.py`."""

import base64
import io
import string
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from pretrain.data.manifest import Manifest
from pretrain.data.packed import is_packed
from pretrain.data.reader import MemberTable, ReadConfig, ShardReader
from pretrain.data.samples import Bounds, Refused, choose_caption, decode
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UnreadableShard
from pretrain.rng import derive_seed
from pretrain.types import Reject

# A compressed shard has to be fetched and unpacked whole for one sample.
PACKED_SHARDS = 16
TABLE_ROWS = 200_000  # of the member table that sizes are taken from
TABLE_SHARDS = 200  # rows of the page's table
CHUNK = 32  # samples a task
PUNCTUATION = string.punctuation + "\u201c\u201d\u2018\u2019\u2026\u2013\u2014"
Report = Callable[[int, int], None]  # samples read, of how many
Numbers = npt.NDArray[np.int64]
# Words that say nothing of what is in a picture.
COMMON = frozenset(
    [
        *("", "a", "an", "and", "are", "as", "at", "by", "for", "from", "has", "her", "his", "in"),
        *("into", "is", "it", "its", "of", "on", "or", "that", "the", "their", "this", "to"),
        *("was", "with"),
    ]
)


@dataclass(frozen=True)
class Picture:
    """One picture of the contact sheet.

    Attributes:
        caption: the one that stands under it, drawn as the trainer draws.
        captions: all.
        thumbnail: a data URI.
        width, height: of the picture as stored, in pixels.
    """

    key: str
    shard: str
    caption: str
    captions: tuple[str, ...]
    thumbnail: str
    width: int
    height: int


@dataclass(frozen=True)
class ShardFacts:
    """A row of the table of shards."""

    url: str
    samples: int
    bytes: int
    refused: int


@dataclass
class Survey:
    """What was found. Sizes are those of the member table, which knows them without reading a
    picture.

    Attributes:
        url: of the manifest.
        samples, shards, bytes: of the whole data set.
        read: samples that were read; ``seed`` chose them.
        sizes: (n, 2) width and height of pictures in pixels, of ``rows`` samples.
        sample_bytes: (n,) of the tar members of those samples.
        aspects: samples of the whole data set in each aspect bucket.
        caption_lengths: (m,) of every caption read, in ``caption_unit``.
        captions_a_sample: (k,) of every sample read.
        limit: length in tokens at which the trainer cuts, if a tokenizer was given.
        distinct: captions that differ.
        words, repeated: the most frequent words and whole captions.
        rejects: of the samples read.
        pictures: the contact sheet.
        table: shards, all of them or (for thousands) those that stand out.
    """

    url: str
    samples: int
    shards: int
    bytes: int
    read: int
    seed: int
    sizes: Numbers
    sample_bytes: Numbers
    aspects: Numbers
    fingerprint: str = ""
    caption_lengths: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    captions_a_sample: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    caption_unit: str = "words"
    limit: int | None = None
    distinct: int = 0
    words: list[tuple[str, int]] = field(default_factory=list)
    repeated: list[tuple[str, int]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    table: list[ShardFacts] = field(default_factory=list)


@dataclass(frozen=True)
class _Seen:
    """One sample, as read by a thread."""

    captions: tuple[str, ...]
    rejects: tuple[Reject, ...]
    picture: Picture | None


def survey(
    url: str,
    *,
    samples: int = 5000,
    pictures: int = 60,
    thumbnail: int = 192,
    seed: int = 0,
    bounds: Bounds,
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    read: ReadConfig | None = None,
    parallel: int = 4,
    report: Report = lambda done, total: None,
) -> Survey:
    """Read at most ``samples`` samples of a manifest, each with one ranged read, and its tables.

    Args:
        url: of the manifest.
        samples: drawn at random by ``seed``; all where there are fewer.
        pictures: of the contact sheet, the first of those drawn.
        thumbnail: largest side of a picture of the sheet, in pixels.
        bounds: larger pictures are refused, as the trainer would.
        tokenizer: captions are measured in its tokens; None counts words.
        limit: tokens at which the trainer cuts.
        read: how shards are reached; by default remote ones sample by sample.
        parallel: threads.
        report: called as samples are read.

    Raises:
        DataError: the manifest or its member table is missing or damaged.
    """
    config = read or ReadConfig(access="ranged")
    manifest = Manifest.load(url, config.retry)
    numbers = _drawn(manifest, samples, seed)
    seen = _read_all(manifest, config, bounds, numbers, pictures, thumbnail, seed, parallel, report)
    rejects = [r for one in seen for r in one.rejects]
    captions = [c for one in seen for c in one.captions]
    rows = _some_rows(manifest, config, seed)
    found = Survey(
        url=url,
        samples=manifest.num_samples,
        shards=len(manifest.shards),
        bytes=int(manifest.shards.columns["bytes"].sum()),
        read=len(numbers),
        seed=seed,
        sizes=np.stack([rows["width"], rows["height"]], axis=1).astype(np.int64),
        sample_bytes=rows["bytes"].astype(np.int64),
        aspects=np.asarray(manifest.shards.columns["aspects"]).sum(axis=0),
        fingerprint=manifest.fingerprint,
        captions_a_sample=np.array([len(o.captions) for o in seen if o.captions], np.int64),
        limit=limit if tokenizer else None,
        rejects=rejects,
        pictures=[one.picture for one in seen if one.picture],
        table=_table(manifest, rejects),
    )
    if tokenizer:
        found.caption_unit = "tokens"
        found.caption_lengths = _token_lengths(tokenizer, captions)
    else:
        found.caption_lengths = np.array([len(c.split()) for c in captions], np.int64)
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(w.strip(PUNCTUATION).lower() for w in caption.split())
    found.words = [(w, n) for w, n in words.most_common(60) if w not in COMMON][:10]
    counts = Counter(captions)
    found.repeated, found.distinct = counts.most_common(10), len(counts)
    return found


def _token_lengths(tokenizer: Tokenizer, captions: list[str]) -> Numbers:
    """Tokens of each caption, the first and last included, uncut."""
    longest = max((len(c.encode()) for c in captions), default=0) + 2  # no token is empty
    lengths = []
    for start in range(0, len(captions), 256):
        _, mask = tokenizer.encode(captions[start : start + 256], longest)
        lengths += mask.sum(1).tolist()
    return np.array(lengths, np.int64)


def _drawn(manifest: Manifest, samples: int, seed: int) -> Numbers:
    """Numbers of rows in the member table, in random order."""
    draw = np.random.default_rng(derive_seed(seed, "inspect"))
    packed = [i for i, u in enumerate(manifest.shards.columns["url"]) if is_packed(u)]
    if len(packed) > PACKED_SHARDS:
        # Fetching thousands of whole shards for a sample each is no sample any more.
        chosen = draw.permutation(np.flatnonzero(manifest.sizes))[:PACKED_SHARDS]
        rows = np.concatenate(
            [np.arange(manifest.starts[i], manifest.starts[i + 1]) for i in chosen]
        )
        return draw.permutation(rows)[:samples]
    total = manifest.num_samples
    if samples >= total:
        return draw.permutation(total)
    return draw.choice(total, samples, replace=False)


def _read_all(
    manifest: Manifest,
    config: ReadConfig,
    bounds: Bounds,
    numbers: Numbers,
    pictures: int,
    thumbnail: int,
    seed: int,
    parallel: int,
    report: Report,
) -> list[_Seen]:
    """What is in the samples of ``numbers``, in their order."""
    of_thread = threading.local()
    readers: list[ShardReader] = []

    def read(chunk: Numbers) -> list[tuple[int, _Seen]]:
        if not hasattr(of_thread, "reader"):
            of_thread.reader = ShardReader([manifest], config)
            readers.append(of_thread.reader)
        found = []
        for place in chunk.tolist():
            shown = thumbnail if place < pictures else 0
            number = int(numbers[place])
            found.append((place, _look(of_thread.reader, number, bounds, shown, seed)))
        return found

    # By shard and not as they were drawn: each file is opened once.
    places = np.argsort(numbers, kind="stable")
    chunks = [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]
    seen: dict[int, _Seen] = {}
    try:
        with ThreadPoolExecutor(parallel) as pool:
            for found in pool.map(read, chunks):
                seen.update(found)
                report(len(seen), len(numbers))
    finally:
        for reader in readers:
            reader.close()
    return [seen[place] for place in range(len(numbers))]


def _look(reader: ShardReader, number: int, bounds: Bounds, thumbnail: int, seed: int) -> _Seen:
    """Sample ``number`` of the data set, with a thumbnail of that many pixels if not 0."""
    manifest = reader.manifests[0]
    shard = int(np.searchsorted(manifest.starts, number, side="right")) - 1
    index = number - int(manifest.starts[shard])
    try:
        raw, odd = reader.read(0, shard, index)
    except UnreadableShard as error:
        return _Seen((), (Reject("unreadable shard", error.url, f"#{index}"),), None)
    if raw is None:
        return _Seen((), tuple(odd), None)
    side = thumbnail or 8  # without one it is decoded to see that it can be
    try:
        image, captions = decode(raw, bounds, (side, side))
    except Refused as refused:
        return _Seen((), (*odd, Reject(refused.reason, raw.shard, raw.key)), None)
    if not thumbnail:
        return _Seen(tuple(captions), tuple(odd), None)
    row = reader.tables[0].rows(shard)[index]
    image.thumbnail((thumbnail, thumbnail), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=82, method=4)
    data = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
    size = int(row["width"]), int(row["height"])
    shown = choose_caption(captions, seed, number)
    picture = Picture(raw.key, raw.shard, shown, tuple(captions), data, *size)
    return _Seen(tuple(captions), tuple(odd), picture)


def _some_rows(manifest: Manifest, config: ReadConfig, seed: int) -> npt.NDArray[np.void]:
    """Rows of the member table: all, or those of shards drawn at random."""
    table = MemberTable(manifest, config.retry)
    shards = np.flatnonzero(manifest.sizes)
    if manifest.num_samples > TABLE_ROWS:
        draw = np.random.default_rng(derive_seed(seed, "inspect rows"))
        shards = draw.permutation(shards)
        enough = int(np.searchsorted(np.cumsum(manifest.sizes[shards]), TABLE_ROWS)) + 1
        shards = shards[:enough]
    return np.concatenate([np.asarray(table.rows(int(shard))) for shard in shards])


def _table(manifest: Manifest, rejects: list[Reject]) -> list[ShardFacts]:
    """Every shard, or, of many, those with refusals, the smallest and the largest."""
    refused: Counter[str] = Counter()
    for url, _ in {(r.shard, r.key) for r in rejects}:
        refused[url] += 1
    number_of = {manifest.url(i): i for i in range(len(manifest.shards))} if refused else {}
    bad = Counter({number_of[url]: n for url, n in refused.items() if url in number_of})
    chosen = list(range(len(manifest.shards)))
    if len(chosen) > TABLE_SHARDS:
        by_size = np.argsort(manifest.shards.columns["bytes"], kind="stable").tolist()
        worst = [number for number, _ in bad.most_common(TABLE_SHARDS // 2)]
        ends = by_size[: TABLE_SHARDS // 4] + by_size[-TABLE_SHARDS // 4 :]
        chosen = list(dict.fromkeys(worst + ends))
    found = []
    for number in chosen:
        shard = manifest.shards[number]
        found.append(ShardFacts(shard.url, shard.samples, shard.bytes, bad[number]))
    return found
