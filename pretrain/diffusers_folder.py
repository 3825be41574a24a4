"""A model folder as a pipeline folder of diffusers: the generative head for people without this
project.

    unet/            diffusers' UNet2DConditionModel, the weights as they are
    text_encoder/    transformers' own; or ours, with its code, its tokenizer among its weights
    tokenizer/       where the text encoder is of transformers
    scheduler/       diffusers' EDMEulerScheduler or DDIMScheduler
    vae/             where the model has one
    diffdis_pipeline.py, model_index.json

A model that started from Stable Diffusion is a StableDiffusionPipeline again, without code of ours;
another cannot be: that pipeline's text encoder is CLIP's, its latents a VAE's.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import pipeline_parts
from pretrain.diffusion.sampler import start
from pretrain.diffusion.schedule import EDMConfig
from pretrain.errors import ExportError
from pretrain.inference import Predictor, captions_alone
from pretrain.model.autoencoder import Diffusers, SpaceToDepth
from pretrain.rng import generator

_FILES = Path(__file__).parent / "pipeline_files"
_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# Largest difference of a pixel in [-1, 1] from our own sampler; measured 2e-5 at most, since sigmas
# and coefficients are formed in another order.
_TOLERANCE = 1e-3


def write(model: str | Path, to: str | Path) -> Path:
    """Write ``to`` from an exported model folder, and prove that it draws what the model draws.

    Raises:
        ExportError: diffusers has no scheduler for this model's path; or the pictures differ.
    """
    from diffusers import __version__

    predictor = Predictor.load(model)
    if predictor.heads.condition is not captions_alone:
        raise ExportError(
            f"model={str(model)!r} is conditioned on more than captions (the codes of "
            "objectives.disco), for which a pipeline of diffusers has no place; draw with "
            "`python -m pretrain sample --model` instead"
        )
    to = Path(to)
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    scheduler = _scheduler(predictor)
    autoencoder = predictor.model.autoencoder
    unet = predictor.model.trunk.unet
    unet.register_to_config(sample_size=predictor.model.latent_shape[1])
    unet.save_pretrained(temporary / "unet")
    scheduler.save_pretrained(temporary / "scheduler")
    vae = type(autoencoder.vae).__name__ if isinstance(autoencoder, Diffusers) else None
    foreign = pipeline_parts.foreign_text(predictor)
    if isinstance(autoencoder, Diffusers):
        autoencoder.vae.save_pretrained(temporary / "vae")
    index: dict[str, Any] = {
        "_class_name": ["diffdis_pipeline", "DiffDisPipeline"],
        "_diffusers_version": __version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["diffdis_text_encoder", "DiffDisTextEncoder"],
        "tokenizer": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": [None, None] if vae is None else ["diffusers", vae],
        **_settings(predictor),
    }
    if foreign is None:
        own = _text_encoder(predictor, Path(model) / "tokenizer.model")
        own.save_pretrained(temporary / "text_encoder")
        shutil.copy(_FILES / "diffdis_text_encoder.py", temporary / "text_encoder")
    else:
        made = pipeline_parts.save_text_encoder(foreign, temporary / "text_encoder")
        index["text_encoder"] = ["transformers", made]
        tokenizer = pipeline_parts.save_tokenizer(Path(model), temporary / "tokenizer")
        index["tokenizer"] = ["transformers", tokenizer]
    if vae is not None and pipeline_parts.is_stable_diffusion(predictor):
        index = pipeline_parts.stable_diffusion_index(
            type(scheduler).__name__, vae, index["tokenizer"][1]
        )
    else:
        shutil.copy(_FILES / "diffdis_pipeline.py", temporary)
    pipeline_parts.write_index(temporary, index)
    for name in ("card.json", "README.md"):
        if (Path(model) / name).exists():
            shutil.copy(Path(model) / name, temporary)
    _prove(temporary, predictor, index)
    shutil.rmtree(to, ignore_errors=True)
    temporary.rename(to)
    return to


def _scheduler(predictor: Predictor) -> Any:
    from diffusers import DDIMScheduler, EDMEulerScheduler

    path = predictor.model.config.image_path
    schedule = path.schedule
    if path.gamma == 1 and isinstance(schedule, EDMConfig) and path.predict == "edm":
        return EDMEulerScheduler(
            sigma_min=schedule.sigma_min,
            sigma_max=schedule.sigma_max,
            sigma_data=path.sigma_data,
            rho=schedule.rho,
        )
    if path.gamma == 1 and not isinstance(schedule, EDMConfig) and path.predict in _PREDICTION:
        return DDIMScheduler(
            num_train_timesteps=schedule.steps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=_PREDICTION[path.predict],
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            steps_offset=1,  # no matter to trailing times; StableDiffusionPipeline warns of 0
            clip_sample=False,
        )
    raise ExportError(
        f"model.image_path has schedule.kind={schedule.kind}, predict={path.predict}, "
        f"gamma={path.gamma:g}, for which diffusers has no scheduler; it has them for gamma=1 and "
        "edm with edm, or scaled_linear with eps, x0 or v. Use the model folder itself"
    )


def _text_encoder(predictor: Predictor, tokenizer: Path) -> Any:
    from pretrain.pipeline_files.diffdis_text_encoder import DiffDisTextEncoder

    config, data = predictor.model.config.text_encoder, bytearray(tokenizer.read_bytes())
    made = DiffDisTextEncoder(
        vocab_size=predictor.tokenizer.vocab_size,
        tokenizer_bytes=len(data),
        **config.model_dump(exclude={"frozen_from", "kind"}),
    )
    state = predictor.model.text_encoder.state_dict()  # type: ignore[union-attr]
    made.load_state_dict({**state, "tokenizer": torch.frombuffer(data, dtype=torch.uint8)})
    return made.eval()


def _settings(predictor: Predictor) -> dict[str, Any]:
    """The pipeline's own arguments."""
    model, inference = predictor.model, predictor.heads.config
    foreign = pipeline_parts.foreign_text(predictor)
    shift, colours = 0.0, None
    if isinstance(model.autoencoder, SpaceToDepth):
        shift = model.autoencoder.shift
        if model.autoencoder.inverse is not None:
            colours = model.autoencoder.inverse.tolist()
    return {
        "image_size": model.config.image_size,
        "factor": model.autoencoder.factor,
        "shift": shift,
        "colours": colours,
        "start": float(start(model.image_path, torch.ones(1))),
        "steps": inference.steps,
        "guidance_scale": 1 + inference.guidance,  # diffusers counts from the null prompt
        "last_noise": inference.last_noise,
        "tokens": model.config.text_encoder.length,
        "masks_padding": foreign is not None and foreign.kind != "clip",
    }


@torch.no_grad()
def _prove(folder: Path, predictor: Predictor, index: dict[str, Any]) -> None:
    pipeline = _opened(folder, predictor, index)
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = ["a proof of export", ""], [0, 1]
    steps = 8  # divides 1,000: else DDIMScheduler steps to times beside those of its own list
    noise = [generator(s, "generate") for s in seeds]
    scale = 1 + predictor.heads.config.guidance
    drawn = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=noise,
        output_type="pt",
    ).images
    theirs: Tensor = drawn.float().cpu() * 2 - 1
    tokens, mask = predictor.tokenizer.encode(prompts, predictor.length)
    ours = predictor.heads.generate_tokens(tokens, mask, seeds, steps, sampler="ddim")
    far = float((theirs - ours).abs().max())
    if not far <= _TOLERANCE:
        raise ExportError(
            f"{folder}: the pipeline's pictures differ from the model's by {far:.3g} of [-1, 1], "
            f"more than {_TOLERANCE:g}; this is a fault of the program, please report it"
        )


def _opened(folder: Path, predictor: Predictor, index: dict[str, Any]) -> Any:
    """The pipeline as the folder's user has it. (diffusers would copy code of ours into its cache:
    that is imported here.)"""
    import diffusers
    import transformers

    from pretrain.pipeline_files.diffdis_pipeline import DiffDisPipeline
    from pretrain.pipeline_files.diffdis_text_encoder import DiffDisTextEncoder

    if isinstance(index["_class_name"], str):
        return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {}
    for name in ("unet", "text_encoder", "tokenizer", "scheduler", "vae"):
        library, cls = index[name]
        if library is not None:
            own = (
                DiffDisTextEncoder if name == "text_encoder" and library not in libraries else None
            )
            parts[name] = (own or getattr(libraries[library], cls)).from_pretrained(folder / name)
    return DiffDisPipeline(**parts, **_settings(predictor))
