"""A grid of generated images under their prompts, with the same seeds every time."""

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from pretrain.data.loader import DataConfig
from pretrain.evaluators.base import (
    Evaluator,
    EvaluatorConfig,
    Result,
    Subject,
    share,
    together,
)
from pretrain.inference import to_pil


class Settings(EvaluatorConfig):
    """Attributes:
    prompts: one picture (or ``per_prompt``) for each.
    per_prompt: pictures of each prompt.
    steps, guidance: of the sampler; None takes the run's ``inference`` settings.
    seed: of the first picture; picture i has seed + i.
    columns, tile: of the grid; tile in pixels.
    """

    prompts: tuple[str, ...] = ("red apple", "green apple", "blue car", "sunflower")
    per_prompt: int = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)
    guidance: float | None = Field(None, ge=0)
    seed: int = 0
    columns: int = Field(8, ge=1)
    tile: int = Field(96, ge=16)


def grid(
    images: Sequence[Image.Image], titles: Sequence[str], columns: int, tile: int
) -> Image.Image:
    """Images in rows of ``columns``, each ``tile`` pixels wide, its title under it."""
    label, gap = 16, 4
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new(
        "RGB", (columns * (tile + gap) + gap, rows * (tile + label + gap) + gap), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = gap + i % columns * (tile + gap), gap + i // columns * (tile + label + gap)
        sheet.paste(image.resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
        while draw.textlength(title, font=font) > tile and len(title) > 2:
            title = title[:-2] + "…"
        draw.text((x + tile / 2, y + tile + 1), title, fill="black", font=font, anchor="ma")
    return sheet


class Samples:
    """Each rank draws its share of the pictures; rank 0 writes the grid."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, data: DataConfig, beat: Callable[[], object]) -> None:
        """It reads nothing."""

    def run(self, subject: Subject) -> Result:
        s = self.settings
        prompts = [p for p in s.prompts for _ in range(s.per_prompt)]
        mine = share(len(prompts), subject.rank, subject.world)
        length = subject.heads.model.config.text_encoder.length
        device = subject.heads.model.null_tokens_L.device
        made: dict[int, Image.Image] = {}
        left = False
        for start in range(0, len(mine), 32):
            left = subject.pulse()
            if left:
                break
            part = mine[start : start + 32]
            tokens, mask = subject.tokenizer.encode([prompts[i] for i in part], length)
            seeds = [s.seed + i for i in part]
            images = subject.heads.generate_tokens(
                tokens.to(device), mask.to(device), seeds, s.steps, s.guidance
            )
            made |= {i: to_pil(image) for i, image in zip(part, images, strict=True)}
        found = {i: image for part in together(made, left) for i, image in part.items()}
        if subject.rank != 0:
            return Result({})
        path = subject.folder / f"samples-{subject.samples:09d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid([found[i] for i in range(len(prompts))], prompts, s.columns, s.tile).save(path)
        return Result({}, (path,))


def build(settings: EvaluatorConfig) -> Evaluator:
    """The evaluator."""
    assert isinstance(settings, Settings)
    return Samples(settings)
