"""The discriminative head alone, as a plain torch module: no decoder, no sampler of images.

model = Classifier.load("model")                                  # of `export`
e_KE = model.embed_labels(["red apple", "blue car"])
images_BCHW = torch.stack([from_pil(Image.open(f), model.image_size) for f in files])
probabilities_BK = model(images_BCHW, e_KE).softmax(-1)
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import ExportError
from pretrain.inference import Heads, InferenceConfig, new_model
from pretrain.model.diffdis import DiffDis, ModelConfig
from pretrain.weights import Entry, write

# Parts of the U-Net that draw, and that nothing here calls.
_DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")


class Classifier(nn.Module):
    """Images to scores of labels, by denoising a text query given the image (DiffDis, Alg. 3).

    Args:
        model: a whole network; its decoder is taken from it.
        tokenizer: of its texts.
        config: steps, noises and guidance of the chain.
        scale: of the cosines, as the contrast was trained.
    """

    def __init__(
        self, model: DiffDis, tokenizer: Tokenizer, config: InferenceConfig, scale: float
    ) -> None:
        super().__init__()
        for name in _DECODER:
            setattr(model.trunk.unet, name, None)
        self.model = model.eval()
        self.tokenizer, self.config, self.scale = tokenizer, config, scale
        self.image_size = model.config.image_size

    @classmethod
    def load(cls, folder: str | Path) -> "Classifier":
        """From the folder of a whole model, or of one that `save` has written.

        Raises:
            ExportError: a file is missing, or the weights are not those of the configuration.
        """
        folder = Path(folder)
        try:
            tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            state = load_file(folder / "model.safetensors")
        except (OSError, ValueError) as error:
            raise ExportError(
                f"folder={str(folder)!r} is not an exported model ({error}); run `export` first"
            ) from None
        tokenizer = Tokenizer.of_model(folder)
        tokenizer.check(tree["tokenizer_sha256"])
        made = cls(
            new_model(build(ModelConfig, tree["model"], "model").within(folder), tokenizer),
            tokenizer,
            build(InferenceConfig, tree["inference"], "inference"),
            tree["logit_scale"],
        )
        wanted = dict(made.model.named_parameters())
        if missing := [name for name in wanted if name not in state]:
            raise ExportError(
                f"{folder}/model.safetensors lacks {len(missing)} tensors "
                f"({', '.join(missing[:3])}); export the model again"
            )
        made.model.load_state_dict({name: state[name] for name in wanted})
        return made

    def forward(self, images_BCHW: Tensor, e_KE: Tensor, seed: int = 0) -> Tensor:
        """Logits (B, K) of images in [-1, 1] for K label embeddings; softmax them."""
        return self.scale * self.embed(images_BCHW, seed) @ e_KE.T

    def embed(self, images_BCHW: Tensor, seed: int = 0) -> Tensor:
        """Unit rows (B, E) in the space of the texts."""
        return Heads(self.model, self.config).embed_images(images_BCHW, seed)

    @torch.no_grad()
    def embed_labels(self, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Unit rows (K, E): the mean over the templates, each with {} for the label."""
        prompts = [template.format(label) for label in labels for template in templates]
        tokens, mask = self.tokenizer.encode(prompts, self.model.config.text_encoder.length)
        device = self.model.null_tokens_L.device
        e_KE = self.model.encode_text(tokens.to(device), mask.to(device))[0].e_BE
        return F.normalize(e_KE.reshape(len(labels), len(templates), -1).mean(1), dim=-1)


def write_folder(model: str | Path, to: str | Path) -> Path:
    """The folder of a whole model without the decoder's weights, for `Classifier.load`.

    Raises:
        ExportError: as `Classifier.load`.
    """
    model, to = Path(model), Path(to)
    classifier = Classifier.load(model)
    to.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = dict(classifier.model.named_parameters())
    entries = [Entry.of(name, tensor) for name, tensor in state.items()]
    write(to / "model.safetensors", entries, {"format": "pt"})
    for name in ("config.json", "tokenizer.model", "card.json", "README.md"):
        if (model / name).exists():
            (to / name).write_bytes((model / name).read_bytes())
    for name in ("tokenizer", "vae"):
        if (model / name).is_dir():
            shutil.copytree(model / name, to / name, dirs_exist_ok=True)
    Classifier.load(to)
    return to
