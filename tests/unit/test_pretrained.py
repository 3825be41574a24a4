"""What is read of pretrained folders, and what is said of folders that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain import hub
from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer
from pretrain.describe import describe, image_path, unet
from pretrain.engine_config import EngineConfig
from pretrain.errors import ConfigError, DataError
from pretrain.inference import new_model
from pretrain.model.diffdis import ModelConfig
from pretrain.model.fresh import initialise, make_anew, without_storage
from pretrain.model.weight_files import WeightFiles
from pretrain.pretrained import Pretrained
from pretrain.streaming import fill
from tests.support import stable_diffusion


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return stable_diffusion.make(tmp_path_factory.mktemp("sd"), shard="150KB")


@pytest.fixture
def folder(made, tmp_path):
    """One of the test's own, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "sd"))


def start(folder: Path, **model) -> nn.Module:
    tree = stable_diffusion.settings(folder)
    tokenizer = Tokenizer(tree["data"]["tokenizer"])
    for name, fields in model.items():
        tree["model"][name] = {**tree["model"].get(name, {}), **fields}
    config = build(ModelConfig, tree["model"], "model")
    pretrained = Pretrained(config)
    task = nn.Module()
    task.model = new_model(config, tokenizer, storage=False)
    fill(task, pretrained, EngineConfig(zero_stage=0), 0)
    return task


# --- files


def test_every_range_of_a_tensor_is_read_as_it_is(tmp_path):
    torch.manual_seed(0)
    state = {
        "a.weight": torch.randn(5, 3, 2),
        "a.half": torch.randn(7).bfloat16(),
        "a.f16": torch.randn(2, 2).half(),
        "ids": torch.arange(4),
    }
    save_file(state, tmp_path / "model.safetensors")
    files = WeightFiles("field", tmp_path)
    assert files.shapes == {"a.weight": (5, 3, 2), "a.half": (7,), "a.f16": (2, 2)}
    for name, tensor in state.items():
        for start, stop in ((0, tensor.numel()), (1, 4), (3, 3), (tensor.numel() - 1,) * 2):
            if name != "ids":
                expected = tensor.float().flatten()[start:stop]
                assert torch.equal(files.read(name, start, stop), expected)
    files.close()
    assert torch.equal(files.read("a.half", 0, 7), state["a.half"].float())


def test_damaged_folders_are_named(folder):
    field = "model.init.path"
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].rename(shards[1].with_suffix(".aside"))
    with pytest.raises(ConfigError, match=rf"{field}=.* lacks 1 of the .*{shards[1].name}"):
        WeightFiles(field, folder / "unet")
    shards[1].write_bytes(shards[1].with_suffix(".aside").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=rf"{field}=.*{shards[1].name} cannot be read"):
        WeightFiles(field, folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json cannot be read"):
        WeightFiles(field, folder / "unet")
    for file in (folder / "unet").iterdir():
        file.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("")
    with pytest.raises(ConfigError, match=r"has no diffusion_pytorch_model\.safetensors .*pickled"):
        WeightFiles(field, folder / "unet")
    with pytest.raises(ConfigError, match=r"no diffusion_pytorch_model\.fp16\.safetensors"):
        WeightFiles(field, folder / "unet", "fp16")


def test_a_variant_is_its_own_file(tmp_path):
    for middle, value in (("", 1.0), (".fp16", 2.0)):
        save_file({"w": torch.full((2,), value)}, tmp_path / f"model{middle}.safetensors")
    assert WeightFiles("f", tmp_path).read("w", 0, 1) == 1
    assert WeightFiles("f", tmp_path, "fp16").read("w", 0, 1) == 2


def test_no_folder_and_no_network(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.init\.path='/nowhere' is not a folder"):
        hub.folder("model.init.path", "/nowhere")
    (tmp_path / "vae").mkdir()
    with pytest.raises(ConfigError, match="has no folder 'unet'; there are: vae"):
        hub.folder("model.init.path", str(tmp_path), "unet")
    import huggingface_hub

    def refuse(*_args, **_kwargs):  # no network is to be asked by a test
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=r"='owner/name' is not a folder .*no route.*hf download"):
        hub.folder("model.init.path", "owner/name", "unet")


# --- what must agree


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unet": {"heads": 8}}, r"model\.unet\.heads=\[8, 8\], but .* says \[4, 4\]"),
        ({"unet": {"norm_groups": 16}}, r"model\.unet\.norm_groups=16, but .* says 8"),
        ({"image_path": {"predict": "v"}}, r"image_path\.predict=v, but .* says eps; set"),
        (
            {"image_path": {"schedule": {"kind": "scaled_linear", "steps": 500}}},
            r"image_path\.schedule\.steps=500, but .* says 1000",
        ),
        (
            {"text_encoder": {"width": 64, "query_dim": 64}},
            r"model\.text_encoder\.width=64, but the encoder .* has 32; set width: 32",
        ),
        (
            {"text_encoder": {"settings": {"num_hidden_layers": 3}}},
            r"settings\.num_hidden_layers=3, but the encoder .* has 2",
        ),
        ({"text_encoder": {"settings": {"layers": 3}}}, "CLIPTextConfig has no such field"),
        ({"text_encoder": {"length": 13}}, r"length=13 is more than the 12 places"),
        ({"text_encoder": {"model": "t5"}}, r"model\.text_encoder"),
        ({"autoencoder": {"channels": 8}}, r"autoencoder\.channels=8, but .* has 4"),
        ({"autoencoder": {"model": "AutoencoderTiny"}}, r"cannot be loaded as AutoencoderTiny"),
        ({"init": {"path": "/nowhere"}}, r"model\.init\.path='/nowhere' is not a folder"),
    ],
)
def test_settings_that_are_not_the_folders(made, changes, said):
    with pytest.raises(ConfigError, match=said):
        start(made, **changes)


def test_a_tensor_of_another_shape_is_named(folder):
    for file in (folder / "unet").glob("*.safetensors"):
        state = load_file(file)
        if "conv_in.weight" in state:
            state["conv_in.weight"] = torch.zeros(16, 4, 3, 3)
            save_file(state, file)
    said = (
        r"model\.init\.path=.* has conv_in\.weight of shape \(16, 4, 3, 3\), the model has \(32, 4"
    )
    with pytest.raises(ConfigError, match=said):
        start(folder)


def test_a_text_encoder_without_a_tensor_is_refused(folder):
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state.pop("text_model.final_layer_norm.weight")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"text_encoder\.path=.* lacks 1 tensors .*final_layer"):
        start(folder)
    with pytest.raises(
        ConfigError, match=r"text_encoder\.path=.* lacks 1 of 36 .*final_layer_norm"
    ):
        start(folder, text_encoder={"frozen": False})


def test_folders_that_this_network_is_not(folder):
    def edited(part: str, file: str, **fields):
        path = folder / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    assert unet(folder / "unet")["heads"] == 4
    edited("scheduler", "scheduler_config.json", beta_schedule="linear")
    with pytest.raises(ConfigError, match=r"beta_schedule='linear'.*known here are scaled_linear"):
        image_path(folder / "scheduler")
    edited("unet", "config.json", in_channels=9)
    with pytest.raises(
        ConfigError, match="in_channels=9, its autoencoder 4: a network for inpaint"
    ):
        describe(str(folder))
    edited("unet", "config.json", addition_embed_type="text_time")  # SDXL's
    with pytest.raises(
        ConfigError, match="addition_embed_type='text_time', which the image stream"
    ):
        unet(folder / "unet")


# --- text encoders and tokenizers


def test_a_tokenizer_of_transformers(made, tmp_path):
    tokenizer = Tokenizer(str(made / "tokenizer"))
    ids, mask = tokenizer.encode(["red blue", ""], 6)
    begin, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert ids[1].tolist() == [begin, end, end, end, end, end]
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert ids[0, 0] == begin and ids[0, 3] == end
    assert tokenizer.encode(["red " * 9], 6)[0][0, -1] == end, "a text is cut before its end token"
    tokenizer.save(tmp_path)
    assert Tokenizer.of_model(tmp_path).sha256 == tokenizer.sha256
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no tokenizer of transformers"):
        Tokenizer(str(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["clip", "clip with projection", "t5", "xlm_r"])
def test_features_are_the_encoders_own(tmp_path, kind):
    """Also of one in training, filled from the files; and of what is exported of either."""
    import transformers as t

    from pretrain.model.text_config import TransformersTextConfig
    from pretrain.model.transformers_text import TransformersTextEncoder, build, shape

    torch.manual_seed(0)
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        theirs = t.T5EncoderModel(
            t.T5Config(vocab_size=40, **sizes, feed_forward_proj="gated-gelu")
        )
    elif kind == "xlm_r":
        own = t.XLMRobertaConfig(**small, intermediate_size=32, max_position_embeddings=20)
        theirs = t.XLMRobertaModel(own, add_pooling_layer=False)
    else:
        own = t.CLIPTextConfig(
            **small, intermediate_size=32, max_position_embeddings=8, projection_dim=12
        )
        projects = kind == "clip with projection"
        theirs = (t.CLIPTextModelWithProjection if projects else t.CLIPTextModel)(own)
    theirs.eval().save_pretrained(tmp_path)
    settings = {"model": kind.partition(" ")[0], "path": str(tmp_path), "length": 8, "width": 16}
    settings |= {"query_dim": 12 if "proj" in kind else 16}
    settings |= {"query": "projection"} if "proj" in kind else {}
    tokens = torch.tensor([[5, 6, 7, 39, 1, 1, 1, 1], [9, 39, 1, 1, 1, 1, 1, 1]])
    mask = torch.arange(8) < torch.tensor([[4], [2]])

    frozen = build(TransformersTextConfig(**settings), 40)
    found = frozen(tokens, mask)
    with torch.no_grad():
        given = {} if "clip" in kind else {"attention_mask": mask.long()}
        inner = theirs.text_model if "proj" in kind else theirs
        c = inner(input_ids=tokens, **given).last_hidden_state
        if "clip" in kind:
            e = c[[0, 1], [3, 1]]
            e = theirs.text_projection(e) if "proj" in kind else e
        else:
            e = torch.stack([c[0, :4].mean(0), c[1, :2].mean(0)])
    assert torch.allclose(found.c_BLD, c, atol=1e-6)
    assert torch.allclose(found.e_BE, nn.functional.normalize(e, dim=-1), atol=1e-6)
    assert not any(p.requires_grad for p in frozen.parameters())

    config = TransformersTextConfig(**settings, frozen=False)
    task = nn.Module()
    task.model = nn.Module()
    with without_storage():
        task.model.text_encoder = build(config, 40)
    model = ModelConfig(text_encoder=config)
    fill(task, Pretrained(model), EngineConfig(zero_stage=0), 0)
    trained = task.model.text_encoder.eval()
    assert torch.allclose(trained(tokens, mask).c_BLD, c, atol=1e-6)
    assert all(p.requires_grad for p in trained.parameters())

    # Without the folder, from its settings and the weights that an export holds.
    apart = frozen.portable()
    assert apart.path is None and not apart.frozen
    alone = TransformersTextEncoder(apart, shape(apart)).eval()
    alone.load_state_dict(dict(frozen.encoder.named_parameters()), strict=True)
    with torch.no_grad():
        assert torch.equal(alone(tokens, mask).e_BE, found.e_BE)
    assert not any(m.training for m in trained.train().encoder.modules()), "dropout would be drawn"
    assert frozen.sha256 == build(TransformersTextConfig(**settings), 40).sha256


def test_a_tokenizer_of_more_ids_is_refused(made):
    from pretrain.model.text_config import TransformersTextConfig
    from pretrain.model.transformers_text import build as build_encoder

    tree = stable_diffusion.settings(made)["model"]["text_encoder"]
    with pytest.raises(ConfigError, match=r"data\.tokenizer has 999 ids, .* knows 519"):
        build_encoder(TransformersTextConfig(**tree), 999)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"query_dim": 32}, "query_dim=32 and width=768 differ.*set query: linear"),
        ({"query": "linear"}, "query='linear' is a layer .*set query: pooled, or frozen: false"),
        ({"model": "t5", "query": "projection"}, "query='projection' is clip's"),
        ({"path": None}, "path is not given, and frozen is true"),
        ({"frozen": False, "precision": "bf16"}, "precision='bf16' is of a frozen encoder"),
    ],
)
def test_settings_of_a_text_encoder_that_mean_nothing(fields, said):
    tree = {"text_encoder": {"kind": "transformers", "model": "clip", "path": "x", **fields}}
    with pytest.raises(ConfigError, match=said):
        build(ModelConfig, tree)


# --- parts made without storage


def test_modules_without_storage_are_made_anew():
    def near(layer: nn.Linear) -> None:
        layer.weight.mul_(0.01)

    with without_storage():
        part = nn.Sequential(initialise(nn.Linear(64, 64), near), nn.BatchNorm1d(3))
    assert part[0].weight.is_meta and not part[1].running_mean.is_meta
    linear = initialise(nn.Linear(64, 64), near)
    assert linear.weight.std() < 0.01
    make_anew(linear)
    assert 0 < linear.weight.std() < 0.01
    bare = nn.Module()
    bare.p = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="no reset_parameters"):
        make_anew(bare)


def test_what_is_new_is_the_same_whatever_is_read(made):
    """Each module has a seed of its own name."""
    first, second = start(made).model, start(made, text_encoder={"frozen": False}).model
    for name, p in first.trunk.named_parameters():
        assert torch.equal(p, second.trunk.get_parameter(name)), name
    assert first.trunk.head.position.weight.std() < 0.03  # its own scale, not an embedding's
    assert first.trunk.blocks[0].fc_in.weight.std() > 0
