"""Members of a tar: the samples that webdataset finds, and a reason for everything else."""

import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pretrain.data import shards
from pretrain.data.samples import Bounds, Refused, decode
from pretrain.data.shards import (
    BLOCK,
    MemberBounds,
    RawSample,
    iter_members,
    printable,
    read_members,
    read_sample,
)
from pretrain.errors import DataError
from tests.support import faulty
from tests.unit.data.conftest import good, write_tar

BOUNDS = MemberBounds()
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Files = list[tuple[str, bytes]]


def tar(files: Files, kind: int = tarfile.GNU_FORMAT, mtime: float = 0, **options: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind, **options) as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            out.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def by_webdataset(data: bytes) -> list[RawSample]:
    files = tar_file_iterator(io.BytesIO(data))
    named = ({"fname": f["fname"], "data": f["data"], "__url__": "u"} for f in files)
    return [
        RawSample(s["__key__"], "u", {k: v for k, v in s.items() if k[:2] != "__"})
        for s in group_by_keys(named)
    ]


def reasons(data: bytes, bounds: MemberBounds = BOUNDS) -> dict[str, str]:
    return {r.key: r.reason for r in read_members("u", data, bounds)[1]}


names = st.lists(
    st.text("ab-é .", min_size=1, max_size=6).filter(lambda p: not p.startswith(".")),
    min_size=1,
    max_size=3,
).map("/".join)


@pytest.mark.parametrize("kind", FORMATS)
@given(
    st.lists(st.tuples(names, st.integers(0, 1100)), max_size=8, unique_by=lambda f: f[0]),
    st.sampled_from([0, 1.5]),
)
@settings(max_examples=60, deadline=None)
def test_samples_are_those_of_webdataset(
    kind: str, files: list[tuple[str, int]], mtime: float
) -> None:
    named: Files = sorted((f"{name}.JPG", bytes([i]) * n) for i, (name, n) in enumerate(files))
    data = tar(named, FORMATS[kind], mtime)
    try:
        expected = by_webdataset(data)
    except ValueError:
        return  # a file twice: it raises, we refuse and count
    samples, rejects = read_members("u", data, BOUNDS)
    if not rejects:  # else a key came back, and webdataset makes two samples of it
        assert samples == expected
    assert {r.reason for r in rejects} <= {"duplicate key"}


@pytest.mark.parametrize("kind", ["gnu", "pax"])
@pytest.mark.parametrize("length", [90, 101, 255, 300, 3_000])
def test_long_names_are_read_whole(kind: str, length: int) -> None:
    key = "/".join(["é" * 20] * 200)[:length]
    data = tar([(f"{key}.jpg", b"x"), (f"{key}.txt", b"y")], FORMATS[kind])
    assert read_members("u", data, BOUNDS) == (
        [RawSample(key, "u", {"jpg": b"x", "txt": b"y"})],
        [],
    )


def test_a_long_ustar_name_is_joined_from_its_two_fields() -> None:
    key = "folder" * 20 + "/" + "name" * 15
    data = tar([(f"{key}.jpg", b"x")], tarfile.USTAR_FORMAT)
    assert [s.key for s in read_members("u", data, BOUNDS)[0]] == [key]


def test_times_in_an_old_gnu_header_are_no_part_of_the_name() -> None:
    block = bytearray(tar([("a.jpg", b"x")], tarfile.GNU_FORMAT)[:BLOCK])
    block[345:357] = b"14567012345\0"  # `tar --incremental` writes the time of access here
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    data = bytes(block) + b"x".ljust(BLOCK, b"\0")
    assert [s.key for s in read_members("u", data, BOUNDS)[0]] == ["a"]


def test_global_fields_are_passed_over() -> None:
    data = tar(
        [("a.jpg", b"x"), ("a.txt", b"y")],
        tarfile.PAX_FORMAT,
        pax_headers={"comment": "c" * 700},
    )
    assert read_members("u", data, BOUNDS) == (
        [RawSample("a", "u", {"jpg": b"x", "txt": b"y"})],
        [],
    )


def test_a_file_above_8_gib_is_passed_by_its_size(tmp_path: Path) -> None:
    info = tarfile.TarInfo("large.bin")
    info.size = 9 << 30
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "0.tar"
        with path.open("wb") as out:
            out.write(tar([("a.jpg", b"x")], kind)[: 2 * BLOCK])
            out.write(info.tobuf(kind))
            out.seek(10 << 20, io.SEEK_CUR)  # cut long before its end
            out.write(b"\0")
        with path.open("rb") as stream, pytest.raises(DataError, match="cut short"):
            assert [m.name for m in iter_members(stream, BOUNDS, "u")] == ["a.jpg"]


def test_names_and_kinds_that_are_refused(tmp_path: Path) -> None:
    described = faulty.described
    members = [
        *good("a"),
        ("../x.png", b"x"),
        ("b/../../y.png", b"y"),
        ("b/..", b"y"),
        ("/z.png", b"z"),
        ("..\\w.png", b"w"),
        ("C:w.png", b"w"),
        described("c.png", tarfile.SYMTYPE),
        described("d.png", tarfile.LNKTYPE),
        described("f.png", tarfile.FIFOTYPE),
        described("g.png", tarfile.CHRTYPE),
        described("h.png", tarfile.BLKTYPE),
        described("i.png", b"V"),
        ("README", b""),
        described("folder", tarfile.DIRTYPE),
        described("../up", tarfile.DIRTYPE),
        (".hidden.png", b""),
        ("e/._e.png", b""),
        ("__meta__/x.png", b""),
        *good("e..e/..e"),
    ]
    url = write_tar(tmp_path / "0.tar", members)
    samples, rejects = read_members(url, Path(url).read_bytes(), BOUNDS)
    assert [s.key for s in samples] == ["a"]  # (`..e` is hidden too)
    assert {(r.key, r.reason) for r in rejects} == {
        *((n, "unsafe member name") for n in ("../x.png", "b/../../y.png", "b/..", "/z.png")),
        *((n, "unsafe member name") for n in ("..\\w.png", "C:w.png")),
        *((n, "link") for n in ("c.png", "d.png")),
        *((n, "not a file") for n in ("f.png", "g.png", "h.png", "i.png")),
        ("README", "no extension"),
    }
    assert {r.shard for r in rejects} == {url}


def test_a_pax_header_cannot_smuggle_a_name() -> None:
    for name in ("a\0b.jpg", "../a.jpg", "/a.jpg"):
        info = tarfile.TarInfo("fine.jpg")
        info.pax_headers = {"path": name}
        data = info.tobuf(tarfile.PAX_FORMAT)
        assert reasons(data) == {name: "unsafe member name"}


def test_names_that_are_not_utf8_are_refused_and_can_be_written() -> None:
    data = tar([("caf\udce9.jpg", b"x")], tarfile.GNU_FORMAT)
    (name,) = reasons(data)
    assert reasons(data)[name] == "unsafe member name" and name.encode() == b"caf\\udce9.jpg"
    assert printable("é") == "é"


def test_a_sparse_file_is_refused_and_what_follows_is_found() -> None:
    info = tarfile.TarInfo("sparse.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 100
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1  # two more blocks of its map
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    extended = [bytes(504) + bytes([more]) + bytes(7) for more in (1, 0)]
    data = bytes(block) + b"".join(extended) + bytes(BLOCK) + tar([("a.jpg", b"x")])
    samples, rejects = read_members("u", data, BOUNDS)
    assert [s.key for s in samples] == ["a"]
    assert [(r.key, r.reason) for r in rejects] == [("sparse.jpg", "not a file")]


def test_the_first_of_duplicates_stands() -> None:
    files = [("a.jpg", b"1"), ("a.txt", b"2"), ("a.JPG", b"3"), ("b.jpg", b"4"), ("a.cls", b"5")]
    files += [("b.txt", b"6"), ("a.cls", b"7")]
    samples, rejects = read_members("u", tar(files), BOUNDS)
    # (What is asked of a run of members: within it, `a.cls` of the shard's end is seen to be late.)
    assert samples == [
        RawSample("a", "u", {"jpg": b"1", "txt": b"2"}),
        RawSample("b", "u", {"jpg": b"4", "txt": b"6"}),
    ]
    assert [(r.key, r.reason) for r in rejects] == [
        ("a.JPG", "duplicate member"),
        ("a.cls", "duplicate key"),
        ("a.cls", "duplicate key"),
    ]


def test_bounds_on_bytes_and_members() -> None:
    data = tar([("a.jpg", b"x" * 100), ("a.txt", b"x" * 101), ("b.jpg", b""), ("b.txt", b"")])
    samples, _ = read_members("u", data, MemberBounds(max_member_bytes=100))
    assert [sorted(s.files) for s in samples] == [["jpg"], ["jpg", "txt"]]
    assert reasons(data, MemberBounds(max_member_bytes=100)) == {"a.txt": "too many bytes"}
    assert reasons(data, MemberBounds(max_members=1)) == {
        "a.txt": "too many members",
        "b.txt": "too many members",
    }


def test_a_refused_member_is_never_held() -> None:
    class Stream(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.largest = max(self.largest, len(data))
            return data

    stream = Stream(tar([("../a.jpg", bytes(5 << 20)), ("b.jpg", bytes(5 << 20))]))
    members = list(iter_members(stream, MemberBounds(max_member_bytes=4 << 20)))
    assert [m.refused for m in members] == ["unsafe member name", "too many bytes"]
    assert stream.largest <= 1 << 20


@pytest.mark.parametrize("kind", FORMATS)
def test_offsets_cut_out_each_sample(kind: str) -> None:
    long = "x" * (60 if kind == "ustar" else 150)
    files = [(f"{long}{n}.{e}", bytes([n]) * (n * 300)) for n in range(5) for e in ("jpg", "txt")]
    files.insert(4, ("../odd.jpg", b"x"))
    data = tar(files, FORMATS[kind], mtime=0.5)
    members = list(iter_members(io.BytesIO(data), BOUNDS))
    assert [m.name for m in members] == [name for name, _ in files]
    assert members[0].start == 0
    assert [m.start for m in members[1:]] == [m.end for m in members[:-1]]
    assert data[members[-1].end :].count(0) == len(data) - members[-1].end
    whole, _ = read_members("u", data, BOUNDS)
    firsts = [m.start for m in members if m.extension == "jpg" and not m.refused]
    for expected, start, end in zip(whole, firsts, [*firsts[1:], members[-1].end], strict=True):
        sample, rejects = read_sample("u", data[start:end], BOUNDS)
        assert sample == expected
        assert [r.reason for r in rejects] == ["unsafe member name"] * (expected.key == long + "1")


def test_in_a_samples_own_run_another_key_is_late() -> None:
    run = tar([("b.jpg", b"4"), ("a.cls", b"5"), ("b.txt", b"6"), ("a.jpg", b"7")])
    sample, rejects = read_sample("u", run, BOUNDS)
    assert sample == RawSample("b", "u", {"jpg": b"4", "txt": b"6"})
    assert sorted((r.key, r.reason) for r in rejects) == [
        ("a.cls", "duplicate key"),
        ("a.jpg", "duplicate key"),
    ]
    assert read_sample("u", tar([("../a.jpg", b"")]), BOUNDS)[0] is None


def test_a_run_needs_no_end_and_ends_at_it() -> None:
    data = tar([("a.jpg", b"x")])
    assert read_members("u", data[: 2 * BLOCK], BOUNDS) == read_members("u", data, BOUNDS)
    assert read_members("u", data + tar([("b.jpg", b"x")]), BOUNDS)[0][-1].key == "a"
    assert read_members("u", b"", BOUNDS) == ([], [])
    assert read_members("empty.tar", tar([]), BOUNDS) == ([], [])


def test_a_cut_run_is_an_error_with_its_name() -> None:
    data = tar([("a.jpg", b"x" * 700), ("é" * 80 + ".jpg", b"y")], tarfile.PAX_FORMAT)[: 7 * BLOCK]
    whole = {0, *(m.end for m in iter_members(io.BytesIO(data), BOUNDS))}
    assert whole == {0, 3 * BLOCK, 7 * BLOCK}
    for end in range(0, len(data), 37):
        if end not in whole:
            with pytest.raises(DataError, match=r"0\.tar.*not a whole tar"):
                read_members("0.tar", data[:end], BOUNDS)


def test_damage_in_the_middle_is_no_end() -> None:
    data = bytearray(tar([(f"{i}.jpg", b"x") for i in range(4)]))
    data[2 * BLOCK + 3] ^= 1
    with pytest.raises(DataError, match=r"byte 1,024 is no header"):
        read_members("u", bytes(data), BOUNDS)
    for foreign in (b"<!doctype html>" * 100, b"x", gzip.compress(bytes(data))):
        with pytest.raises(DataError, match="not a whole tar"):
            read_members("u", foreign, BOUNDS)


def test_a_damaged_compression_is_named() -> None:
    packed = gzip.compress(tar([("a.jpg", bytes(100_000))]))
    with (
        gzip.open(io.BytesIO(packed[: len(packed) // 2])) as stream,
        pytest.raises(DataError, match=r"0\.tar\.gz.*not a whole tar"),
    ):
        list(iter_members(stream, BOUNDS, "0.tar.gz"))


@pytest.mark.parametrize(
    ("field", "says"),
    [
        (b"-0000000010\0", "size below zero"),
        (b"\xff" * 12, "size below zero"),
        (b"\x80" + b"\xff" * 11, "cut short|too many"),
        (b"0000000x000\0", "no header"),
    ],
)
def test_a_size_that_is_none_is_an_error(field: bytes, says: str) -> None:
    block = bytearray(tar([("a.jpg", b"x")])[:BLOCK])
    block[124:136] = field
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    with pytest.raises(DataError, match=f"not a whole tar.*({says})"):
        read_members("u", bytes(block) + bytes(BLOCK), BOUNDS)


@pytest.mark.parametrize("record", [b"99 path=a\n", b"path=a\n", b"9 size=-1\n", b"11 size=1e3\n"])
def test_a_pax_header_that_is_none_is_an_error(record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0") + tar([("a.jpg", b"x")])
    with pytest.raises(DataError, match="pax header"):
        read_members("u", data, BOUNDS)


def test_endless_extension_headers_are_an_error() -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    once = info.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(BLOCK, b"\0")
    with pytest.raises(DataError, match="too long"):
        read_members("u", once * 200, BOUNDS)
    info.size = 1 << 40
    with pytest.raises(DataError, match="too long"):
        read_members("u", info.tobuf(tarfile.GNU_FORMAT), BOUNDS)


@given(st.binary(max_size=3), st.integers(0, 4095), st.integers(0, 4095))
@settings(max_examples=200, deadline=None)
def test_any_damage_is_samples_or_an_error(patch: bytes, place: int, end: int) -> None:
    data = bytearray(tar([("a.jpg", b"x"), ("é" * 70 + ".txt", b"y")], tarfile.PAX_FORMAT)[:4096])
    data[place : place + len(patch)] = patch
    try:
        read_members("u", bytes(data[:end]), BOUNDS)
    except DataError as error:
        assert "not a whole tar" in str(error)


def test_the_planted_corpus_has_its_exact_counts(tmp_path: Path) -> None:
    planted = faulty.plant(tmp_path)
    bounds = Bounds(faulty.MAX_BYTES, 64_000_000)
    found: Counter[str] = Counter()
    keys = set()
    for shard in planted.shards:
        data = Path(shard).read_bytes()
        if shard == planted.cut:
            with pytest.raises(DataError, match="not a whole tar"):
                read_members(shard, data, BOUNDS)
            data = data[: end_of_whole(shard)]
        samples, rejects = read_members(shard, data, BOUNDS)
        found.update(r.reason for r in rejects)
        for raw in samples:
            try:
                decode(raw, bounds, (32, 32))
                keys.add(raw.key)
            except Refused as refused:
                found[refused.reason] += 1
    assert found == planted.expected
    assert keys == planted.keys and len(keys) == planted.good
    assert len(faulty.faults()) >= 40 and len(found) == 16


def end_of_whole(shard: str) -> int:
    """Where the last whole member before a cut ends."""
    end = 0
    with open(shard, "rb") as stream, pytest.raises(DataError):
        for member in iter_members(stream, BOUNDS):
            end = member.end
    return end


@pytest.mark.parametrize("name", ["k.png", "a/b-c_d/k9.PNG", "k", ".k.png", "a.b/k.png", "k.a.png"])
@pytest.mark.parametrize("change", ["none", "cut", "sum", "twice", "other key", "small bound"])
def test_the_short_way_to_a_plain_sample_ends_where_the_long_way_does(
    name: str, change: str
) -> None:
    names = {"twice": [name, name], "other key": [name, "z.txt"]}.get(change, [name])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for each in names:
            info = tarfile.TarInfo(each)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(range(250)) * 2 + bytes(200)))
    data = bytearray(stream.getvalue()[: 1536 * len(names)])
    if change == "cut":
        del data[-513:]
    if change == "sum":
        data[110] ^= 1
    bounds = MemberBounds(600 if change == "small bound" else 1000, 4)

    def outcome(short: bool) -> object:
        with pytest.MonkeyPatch.context() as patch:
            if not short:
                patch.setattr(shards, "_plain_sample", lambda *_: None)
            try:
                return shards.read_sample("u", bytes(data), bounds)
            except DataError as error:
                return str(error)

    assert outcome(True) == outcome(False)
    plain = name in ("k.png", "a/b-c_d/k9.PNG") and change == "none"
    assert (shards._plain_sample("u", bytes(data), bounds) is not None) == plain
