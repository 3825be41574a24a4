"""Encoded data against the pictures it was made of: the same losses on the same numbers, and no
training on what other encoders made."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain import config as configs
from pretrain.commands._data import encode as command
from pretrain.data import encoded, index
from pretrain.data import tokenizer as tokenizers
from pretrain.data.loader import Loader
from pretrain.data.manifest import Manifest
from pretrain.data.samples import augment
from pretrain.data.shards import RawSample
from pretrain.data.tokenizer import Tokenizer
from pretrain.encode import encode, shard_names
from pretrain.encoders import Options, check_encodings
from pretrain.errors import ConfigError, DataError
from pretrain.inference import Predictor, new_model
from pretrain.model.autoencoder import Diffusers, DiffusersConfig
from pretrain.model.identity import autoencoder_sha256
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask, check_objectives
from pretrain.types import Batch, TextFeatures
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
SIZES = (5, 0, 9)  # samples of the shards; the last is compressed
BATCH = 4


def picture(number: int) -> bytes:
    """Noise of a size of its own, in colours of its own: no two pictures have like latents."""
    draw = np.random.default_rng(number)
    height, width = 12 + number % 7, 12 + number * 3 % 11
    pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, damaged: int = -1) -> str:
    """The manifest of 14 samples of 1 to 3 captions; sample number ``damaged`` is no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    urls, number = [], 0
    for shard, size in enumerate(SIZES):
        packed = shard == len(SIZES) - 1
        path = folder / f"train-{shard}.tar{'.gz' if packed else ''}"
        with tarfile.open(path, "w:gz" if packed else "w") as tar:
            for _ in range(size):
                captions = [f"red apple {number}", "a drawing of an apple", "green pear"]
                fields = {"name": f"apple {number}", "captions": captions[: 1 + number % 3]}
                data = b"no picture" if number == damaged else picture(number)
                for name, content in (("json", json.dumps(fields).encode()), ("png", data)):
                    info = tarfile.TarInfo(f"sample-{number:02d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
        urls.append(str(path))
    index.build(urls, str(folder / "train.json"))
    return str(folder / "train.json")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "t.model")
    texts = [f"red apple {i}, a drawing of a green pear" for i in range(99)]
    tokenizers.train(texts, path, 36)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def make_config(pictures, tokenizer_path):
    """``make_config("data.flip=0.5")``: the debug configuration on the pictures above."""

    def make(*overrides: str) -> RunConfig:
        base = (
            f"data.train={pictures}",
            f"data.tokenizer={tokenizer_path}",
            "data.jitter=0",
            "data.flip=0",
        )
        tree = configs.read_yaml(ROOT / "configs/debug.yaml")
        tree["evaluators"] = {}
        for text in (*base, *overrides):
            tree = configs.merge(tree, configs.parse_override(text))
        return configs.build(RunConfig, tree)

    return make


@pytest.fixture(scope="module")
def export(tmp_path_factory, make_config) -> str:
    """An exported model whose weights are random."""
    return write_export(tmp_path_factory.mktemp("export"), make_config(), seed=5)


def write_export(folder: Path, config: RunConfig, seed: int) -> str:
    """A model folder as `pretrain.export` writes it."""
    from safetensors.torch import save_file

    tokenizer = Tokenizer(config.data.tokenizer)
    torch.manual_seed(seed)
    definition, weights = new_model(config.model, tokenizer).portable()
    tree = {
        "model": definition.model_dump(mode="json"),
        "inference": config.inference.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer.sha256,
        "logit_scale": 100.0,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "tokenizer.model").write_bytes(Path(config.data.tokenizer).read_bytes())
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def make_task(config: RunConfig) -> PretrainTask:
    torch.manual_seed(config.seed)
    model = new_model(config.model, Tokenizer(config.data.tokenizer))
    return PretrainTask(model, check_objectives(config.objectives), config.task, config.seed)


def losses(config: RunConfig, steps: int = 9) -> tuple[list[float], list[str]]:
    """Losses of optimizer steps from sample 0, more than two epochs of them, and the keys seen."""
    task = make_task(config)
    loader = Loader(config.data, Tokenizer(config.data.tokenizer), config.seed, BATCH, 0, 1)
    check_encodings(task.model, loader.encodings)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    found, keys = [], []
    for _, batch in zip(range(steps), loader, strict=False):
        loss = task(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
        keys += batch.keys
        assert not batch.rejects
    return found, keys


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def quiet(line: str) -> None:
    pass


# --- the same losses


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_fp32_latents_give_the_losses_of_the_pictures_to_the_bit(make_config, tmp_path, flip):
    config = make_config(f"data.flip={flip}")
    made = encode(config, str(tmp_path), Options(dtype="fp32", mirrored=flip > 0))
    assert (made.samples, made.rejects.total()) == (14, 0)
    train = (f"data.train={made.manifests[0]}", "data.encoded=true")
    assert losses(make_config(f"data.flip={flip}", *train)) == losses(config)


def test_fp16_latents_change_losses_by_little(make_config, tmp_path):
    config = make_config()
    made = encode(config, str(tmp_path), Options())
    ours, keys = losses(make_config(f"data.train={made.manifests[0]}", "data.encoded=true"))
    theirs, their_keys = losses(config)
    assert keys == their_keys
    off = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    # fp16 rounds a latent by up to 2**-11 of itself; measured here: a loss by 4e-5 at most.
    assert 0 < max(off) < 2e-4


def test_encoded_text_gives_the_losses_of_encoding_it(make_config, export, tmp_path):
    frozen = f"model.text_encoder.frozen_from={export}"
    config = make_config(frozen)
    made = encode(config, str(tmp_path), Options(dtype="fp32", text=True))
    train = (frozen, f"data.train={made.manifests[0]}", "data.encoded=true")
    theirs, keys = losses(config)
    ours, our_keys = losses(make_config(*train, "data.encoded_text=true"))
    assert our_keys == keys
    # (Equal to the bit here; matrix products of another batch may sum in another order elsewhere.)
    assert ours == pytest.approx(theirs, rel=1e-5)
    # The same shards without their text features: the captions are encoded, exactly as above.
    assert losses(make_config(*train))[0] == theirs


def test_the_features_are_those_of_the_chosen_caption(make_config, export, tmp_path):
    config = make_config(f"model.text_encoder.frozen_from={export}")
    made = encode(config, str(tmp_path), Options(text=True))
    train = (f"data.train={made.manifests[0]}", "data.encoded=true", "data.encoded_text=true")
    config = make_config(f"model.text_encoder.frozen_from={export}", *train)
    model = make_task(config).model
    loader = Loader(config.data, Tokenizer(config.data.tokenizer), 0, 14, 0, 1)
    for _, batch in zip(range(3), loader, strict=False):
        expected, _ = model.encode_text(batch.tokens_BL, batch.mask_BL)
        assert torch.allclose(batch.text.e_BE, expected.e_BE, atol=1e-5)
        assert torch.allclose(batch.text.c_BLD.float(), expected.c_BLD, atol=4e-3)
        assert batch.text.c_BLD.dtype == torch.float16
        assert len(set(batch.captions)) > 5


def test_masks_are_the_tokenizers(make_config, export, tmp_path):
    made = encode(make_config(), str(tmp_path), Options(model=export, text=True))
    tokenizer = Tokenizer(make_config().data.tokenizer)
    with tarfile.open(tmp_path / "train-0.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    fields = json.loads(files["sample-02.json"])
    assert fields["name"] == "apple 2" and len(fields["captions"]) == 3
    _, mask = tokenizer.encode(fields["captions"], make_config().data.tokens)
    assert np.array_equal(np.load(io.BytesIO(files["sample-02.mask.npy"])), mask.numpy())
    assert made.samples == 14


def test_mirrored_is_what_augment_draws():
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    for number in range(60):
        turned = not torch.equal(augment(image, 0.4, 0, 7, number), image)
        assert turned == encoded.is_mirrored(0.4, 7, number)


# --- shards


def test_shards_keep_number_order_and_names(make_config, pictures, tmp_path):
    made = encode(make_config(), str(tmp_path), Options())
    old, new = Manifest.load(pictures), Manifest.load(made.manifests[0])
    assert [s.url for s in new.shards] == ["train-0.tar", "train-1.tar", "train-2.tar"]
    assert new.sizes.tolist() == old.sizes.tolist() == list(SIZES)


def test_names_of_shards_elsewhere():
    def names(*urls: str) -> list[str]:
        shards = index.Shards(index.Shard(u, 1, 1, "") for u in urls)
        return shard_names(Manifest(shards, "folder"))

    assert names("/a/x.tar", "s3://b/y.tar.gz", "c/z.tgz") == ["x.tar", "y.tar", "c/z.tar"]
    assert names("/a/x.tar", "/b/x.tar") == ["00000-x.tar", "00001-x.tar"]


def test_parts_and_killed_runs_give_the_bytes_of_one_run(make_config, tmp_path):
    config, options = make_config(), Options(batch=4, mirrored=True)
    encode(config, str(tmp_path / "one"), options)

    for part in (1, 0):
        made = encode(config, str(tmp_path / "parts"), replace(options, part=(part, 2)))
        assert made.manifests == []
        assert not (tmp_path / "parts" / "manifest.json").exists()
    made = encode(config, str(tmp_path / "parts"), options)
    assert (made.kept, made.samples) == (3, 14)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, shard: str) -> None:
        if done > 9:  # in the middle of the last shard
            raise Killed

    with pytest.raises(Killed):
        encode(config, str(tmp_path / "killed"), options, kill)
    assert encode(config, str(tmp_path / "killed"), options).kept == 2

    one = bytes_of(tmp_path / "one")
    assert {"manifest.json", "manifest.members", "train-2.tar", "encode.json"} <= set(one)
    assert bytes_of(tmp_path / "parts") == one
    assert bytes_of(tmp_path / "killed") == one


def test_workers_change_no_byte(make_config, tmp_path):
    encode(make_config(), str(tmp_path / "0"), Options(batch=4))
    encode(make_config("data.workers=2"), str(tmp_path / "2"), Options(batch=4))
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "2")


def test_several_data_sets_go_to_folders_of_their_own(make_config, pictures, tmp_path):
    train = f"[{{manifest: {pictures}, weight: 1}}, {{manifest: {pictures}, weight: 3}}]"
    made = encode(make_config(f"data.train={train}"), str(tmp_path), Options())
    assert made.samples == 28
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1")
    first, second = made.manifests
    train = f"[{{manifest: {first}, weight: 1}}, {{manifest: {second}, weight: 3}}]"
    losses(make_config(f"data.train={train}", "data.encoded=true"), steps=2)


def test_refused_samples_are_counted_and_left_out(make_config, tmp_path):
    train = f"data.train={write_shards(tmp_path / 'pictures', damaged=3)}"
    said = []
    config = make_config(train, "data.max_reject_rate=0.1")
    made = encode(config, str(tmp_path / "out"), Options(), say=said.append)
    assert (made.samples, dict(made.rejects)) == (13, {"undecodable image": 1})
    assert "sample-03" in said[0]
    assert Manifest.load(made.manifests[0]).sizes.tolist() == [4, 0, 9]
    again = encode(config, str(tmp_path / "out"), Options(), say=quiet)
    assert (again.kept, again.rejects) == (3, made.rejects)

    strict = make_config(train, "data.max_reject_rate=0.01")
    with pytest.raises(DataError, match=r"data\.max_reject_rate=0\.01.*train-0\.tar"):
        encode(strict, str(tmp_path / "strict"), Options(), say=quiet)
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_a_folder_of_other_encoders_data_or_pictures_is_left_alone(make_config, pictures, tmp_path):
    encode(make_config(), str(tmp_path / "out"), Options())
    before = bytes_of(tmp_path / "out")
    with pytest.raises(DataError, match="other encoders or options gave"):
        encode(make_config(), str(tmp_path / "out"), Options(dtype="fp32"))
    other = write_shards(tmp_path / "pictures", damaged=3)
    with pytest.raises(DataError, match="the encoding of other data"):
        encode(make_config(f"data.train={other}"), str(tmp_path / "out"), Options())
    assert bytes_of(tmp_path / "out") == before
    (tmp_path / "pictures" / "train-2.tar.gz").rename(tmp_path / "pictures" / "train-2.tar")
    index.build([str(tmp_path / f"pictures/train-{i}.tar") for i in range(3)], other)
    before = bytes_of(tmp_path / "pictures")
    with pytest.raises(ConfigError, match="is the folder of the pictures"):
        encode(make_config(f"data.train={other}"), str(tmp_path / "pictures"), Options())
    assert bytes_of(tmp_path / "pictures") == before


# --- what does not fit


@pytest.fixture(scope="module")
def encoded_train(tmp_path_factory, make_config, export) -> str:
    """Latents and text features of the pictures."""
    folder = tmp_path_factory.mktemp("encoded")
    return encode(make_config(), str(folder), Options(model=export, text=True)).manifests[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.flip=0.5"], r"data\.flip=0\.5, but .* has no latents of mirrored"),
        (["data.size=32", "model.image_size=32"], r"data\.size=32, but .* encoded at 16"),
        (["model.autoencoder.factor=1"], r"model\.autoencoder gives latents of \(3, 16, 16\)"),
        (["model.autoencoder.shift=0.5"], r"model\.autoencoder=.*'shift': 0\.5"),
        (["data.tokens=10", "model.text_encoder.length=10"], r"data\.tokens=10, but .* at 12"),
        ([], r"data\.encoded_text=true needs model\.text_encoder\.frozen_from"),
    ],
)
def test_what_other_encoders_made_is_refused(make_config, encoded_train, overrides, message):
    text = any("tokens" in o for o in overrides) or not overrides
    encoded_fields = (f"data.train={encoded_train}", "data.encoded=true")
    config = make_config(*encoded_fields, *overrides)
    # (The configuration says so itself where it can; here the data's own check is asked.)
    data = config.data.model_copy(update={"encoded_text": text})
    with pytest.raises(ConfigError, match=message):
        loader = Loader(data, Tokenizer(config.data.tokenizer), 0, BATCH, 0, 1)
        check_encodings(make_task(config).model, loader.encodings)


def test_features_of_another_text_encoder_are_refused(make_config, encoded_train, tmp_path):
    other = write_export(tmp_path / "other", make_config(), seed=6)
    config = make_config(
        *(f"data.train={encoded_train}", "data.encoded=true", "data.encoded_text=true"),
        f"model.text_encoder.frozen_from={other}",
    )
    with pytest.raises(
        ConfigError, match=r"text_encoder of '.*other' is .* features of data set 0"
    ):
        losses(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.encoded=true", "data.jitter=0.1"], "set jitter: 0"),
        (["data.encoded=true", "data.crop=random"], "set crop: center"),
        (["data.encoded=true", "data.bucket_group=16"], "leave it out"),
        (["data.encoded_text=true"], "encoded_text=true needs encoded=true"),
        (
            ["data.encoded=true", "data.encoded_text=true"],
            r"data\.encoded_text=true needs model\.text_encoder\.frozen_from",
        ),
    ],
)
def test_settings_that_latents_cannot_follow_are_refused(make_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["data.crop=random"], {}, r"data\.crop='random'"),
        (["data.bucket_group=16"], {}, r"data\.bucket_group=16"),
        ([], {"text": True}, "--text needs a trained text encoder"),
        ([], {"model": "/nowhere"}, "--model '/nowhere' is not an exported model"),
        ([], {"part": (2, 2)}, r"part=\(2, 2\)"),
    ],
)
def test_what_cannot_be_encoded_is_named(make_config, tmp_path, overrides, options, message):
    with pytest.raises(ConfigError, match=message):
        encode(make_config(*overrides), str(tmp_path), Options(**options))
    assert not list(tmp_path.iterdir())


def test_pictures_are_no_encoded_data(make_config, pictures):
    with pytest.raises(DataError, match="does not begin with an encoded sample"):
        losses(make_config("data.encoded=true"))


def sample(config: encoded.Encoding, **files: bytes) -> RawSample:
    """A sample with a latent of ones."""
    latents = {"latent": np.ones(config.latent, "<f4")}
    made = encoded.pack({}, ["red apple"], config, latents, {})
    return RawSample("key", "shard.tar", {**made, **files})


def test_damaged_and_foreign_samples(make_config):
    own = encoded.Encoding("a" * 64, (3, 4, 4), "fp32", 16)
    data = make_config().data
    assert encoded.unpack(sample(own), own, data, 0, 0).latent_CHW.eq(1).all()
    whole = sample(own).files["latent.npy"]
    stream = io.BytesIO()
    np.save(stream, np.ones((3, 2, 8), "<f4"))  # as many bytes, another shape
    for damaged in (whole[:-1], whole + b"0", b"", stream.getvalue()):
        files = {"latent.npy": damaged}
        with pytest.raises(encoded.Refused, match="undecodable image"):
            encoded.unpack(sample(own, **files), own, data, 0, 0)
    with pytest.raises(encoded.Refused, match="no image"):
        bare = sample(own)
        del bare.files["latent.npy"]
        encoded.unpack(bare, own, data, 0, 0)
    with pytest.raises(DataError, match=r"shard\.tar:key has encoding=.*bbbb…"):
        encoded.unpack(sample(replace(own, autoencoder="b" * 64)), own, data, 0, 0)


def test_an_encoding_survives_json():
    text = encoded.TextEncoding("b" * 64, 12, 32, 24)
    for one in (encoded.Encoding("a", (3, 4, 4), "fp32", 16),):
        for found in (one, replace(one, text=text, mirrored=True)):
            tree = json.loads(json.dumps(found.tree()))
            assert encoded.Encoding.of_tree(tree) == found and tree == found.tree()
    for wrong in (None, {}, {**tree, "latent": [3]}, {**tree, "dtype": "fp8"}):
        with pytest.raises(ValueError):
            encoded.Encoding.of_tree(wrong)


# --- the frozen text encoder


def test_a_frozen_text_encoder_is_not_trained_and_is_exported(make_config, export, tmp_path):
    config = make_config(f"model.text_encoder.frozen_from={export}")
    task = make_task(config)
    frozen = task.model.frozen_text_encoder
    assert not any("text_encoder" in name for name, _ in task.named_parameters())
    assert not any("text_encoder" in name for name in task.state_dict())
    before = {k: v.clone() for k, v in frozen.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    batch = tiny.batch(4)
    tokens = batch.tokens_BL[:, :8].clamp(max=35)
    batch = replace(batch, tokens_BL=tokens, mask_BL=tokens != 0)
    task(batch).loss.backward()
    optimizer.step()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(torch.equal(v, before[k]) for k, v in frozen.encoder.state_dict().items())

    # What the task computes with is the export's encoder, and goes into the next export.
    original = Predictor.load(export)
    second = write_export(tmp_path / "second", config, seed=9)
    loaded = Predictor.load(second)
    assert loaded.model.config.text_encoder.frozen_from is None
    texts = ["red apple", "a green pear"]
    assert np.array_equal(loaded.embed_text(texts), original.embed_text(texts))
    assert not torch.equal(
        loaded.model.trunk.unet.conv_in.weight, original.model.trunk.unet.conv_in.weight
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.text_encoder.width=64"], r"model\.text_encoder\.width=64, but .* has 32"),
        (["model.text_encoder.frozen_from=/nowhere"], "'/nowhere' is not an exported model"),
    ],
)
def test_another_frozen_encoder_is_refused(make_config, export, overrides, message):
    config = make_config(f"model.text_encoder.frozen_from={export}", *overrides)
    with pytest.raises(ConfigError, match=message):
        make_task(config)


def test_a_frozen_encoder_keeps_its_tokenizer(make_config, export, tmp_path):
    from pretrain.errors import TokenizerMismatch

    path = str(tmp_path / "other.model")
    other = [f"{i} blue houses beside a river" for i in range(99)]
    frozen = f"model.text_encoder.frozen_from={export}"
    for pieces, error in ((36, TokenizerMismatch), (34, ConfigError)):
        tokenizers.train(other, path, pieces)
        with pytest.raises(error, match=r"data\.tokenizer has"):
            make_task(make_config(frozen, f"data.tokenizer={path}"))


def test_an_autoencoder_is_known_by_its_weights_not_its_folder(tmp_path):
    from diffusers import AutoencoderTiny

    def saved(name: str, seed: int) -> str:
        torch.manual_seed(seed)
        blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path / name)
        config = DiffusersConfig(path=str(tmp_path / name), model="AutoencoderTiny", factor=2)
        return autoencoder_sha256(Diffusers(config), config)

    assert saved("a", 0) == saved("b", 0) != saved("c", 1)


# --- batches and the command


def test_a_batch_splits_and_moves_with_its_features():
    text = TextFeatures(torch.arange(4.0).reshape(4, 1, 1), torch.arange(4.0)[:, None])
    latents = torch.arange(4.0).reshape(4, 1, 1, 1)
    batch = replace(tiny.batch(4), latents_BCHW=latents, text=text)
    second = batch.to("cpu").split(2)[1]
    assert second.latents_BCHW.flatten().tolist() == [2, 3]
    assert second.text.c_BLD.flatten().tolist() == second.text.e_BE.flatten().tolist() == [2, 3]
    meta = batch.to("meta")
    assert meta.latents_BCHW.is_meta and meta.text.c_BLD.is_meta and meta.text.e_BE.is_meta
    assert Batch.split(tiny.batch(4), 2)[1].latents_BCHW is None


def test_the_command_says_what_to_set(make_config, tmp_path, capsys):
    import argparse

    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config("data.jitter=0.1").resolved()))
    parser = argparse.ArgumentParser()
    command.configure(parser)
    out = tmp_path / "out"
    assert command.run(parser.parse_args(["--config", str(path), "--out", str(out)])) == 0
    printed = capsys.readouterr()
    assert "14 samples" in printed.out and "left out: none" in printed.out
    assert f"data.train={out}/manifest.json data.encoded=true data.jitter=0" in printed.out
    assert "[encode] 14/14 samples" in printed.err
    part = parser.parse_args(["--config", str(path), "--out", str(out), "--part", "x"])
    with pytest.raises(ConfigError, match="--part=x must be I/N"):
        command.run(part)
