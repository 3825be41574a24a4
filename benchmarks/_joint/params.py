"""Parameters by what needs them: a network for one task has no use for the other's."""

from dataclasses import dataclass

from torch import nn

# Beginnings of names below `DiffDis`; the first that fits.
_PARTS = (
    ("text_encoder.query", "query"),
    ("text_encoder", "text"),
    ("trunk.unet.up_blocks", "decoder"),
    ("trunk.unet.conv_norm_out", "decoder"),
    ("trunk.unet.conv_out", "decoder"),
    ("trunk.unet", "encoder"),
    ("trunk", "stream"),
)


@dataclass(frozen=True)
class Count:
    """Parameters of a DiffDis by part.

    Attributes:
        text: text encoder, whose condition c the image stream reads.
        query: its projection to e, which generation does not read.
        encoder: encoder and mid block of the U-Net, with its time embedding.
        decoder: up blocks and output layers.
        stream: the text stream: blocks, time embedding of the query, alignment head.
        objectives: logit scale.
    """

    text: int = 0
    query: int = 0
    encoder: int = 0
    decoder: int = 0
    stream: int = 0
    objectives: int = 0

    @property
    def joint(self) -> int:
        """One network for both tasks: all of it."""
        return self.generate + self.query + self.stream + self.objectives

    @property
    def generate(self) -> int:
        """What generation alone must have."""
        return self.text + self.encoder + self.decoder

    @property
    def align(self) -> int:
        """What alignment alone must have: no decoder."""
        return self.text + self.query + self.encoder + self.stream + self.objectives

    @property
    def text_stream(self) -> int:
        """What a joint step has beside a generation step's parameters."""
        return self.query + self.stream + self.objectives

    def of(self, generation: bool, alignment: bool) -> int:
        """Of a network that is trained on these halves."""
        if generation and alignment:
            return self.joint
        return self.generate if generation else self.align


def count(model: nn.Module, objectives: nn.Module | None = None) -> Count:
    """Of a `DiffDis` and the objectives trained with it."""
    found = dict.fromkeys(Count.__dataclass_fields__, 0)
    for name, parameter in model.named_parameters():
        part = next(part for prefix, part in _PARTS if name.startswith(prefix))
        found[part] += parameter.numel()
    if objectives is not None:
        found["objectives"] = sum(p.numel() for p in objectives.parameters())
    return Count(**found)
