"""A model that starts from a Stable Diffusion folder draws what diffusers draws from it, before it
has learned anything; and what it exports, diffusers draws as we do."""

import diffusers
import pytest
import torch

from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine_config import EngineConfig
from pretrain.inference import Heads, InferenceConfig, new_model
from pretrain.model.diffdis import ModelConfig
from pretrain.pretrained import Pretrained
from pretrain.rng import generator
from pretrain.streaming import fill
from tests.support import stable_diffusion

# Of pixels in [-1, 1], fp32, DDIM under guidance 4. Measured 7e-7 after 10 steps: the sampler's
# coefficients are formed in another order.
TOLERANCE = 1e-5
PROMPTS, SEEDS, STEPS, GUIDANCE = ["red apple", "blue"], [0, 7], 5, 4.0


@pytest.fixture(scope="module", params=["1, sharded", "2, tiny autoencoder"])
def folder(request, tmp_path_factory):
    version = int(request.param[0])
    shard = "100KB" if "sharded" in request.param else "10GB"
    vae = "AutoencoderTiny" if "tiny" in request.param else "AutoencoderKL"
    made = stable_diffusion.make(tmp_path_factory.mktemp("sd"), version, shard, vae)
    assert ("sharded" in request.param) == (len(list((made / "unet").glob("*.safetensors"))) > 1)
    return made


def ours(folder):
    """The model as a run has it before its first step, and its tokenizer."""
    tree = stable_diffusion.settings(folder)
    tokenizer = Tokenizer(tree["data"]["tokenizer"])
    config = build(ModelConfig, tree["model"])
    model = new_model(config, tokenizer, storage=False)
    task = torch.nn.Module()
    task.model = model
    fill(task, Pretrained(config), EngineConfig(zero_stage=0), seed=0)
    return model.eval(), tokenizer


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = [generator(seed, "generate") for seed in SEEDS]
    images = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=1 + GUIDANCE,
        generator=noise,
        output_type="pt",
    ).images
    return images * 2 - 1


@torch.no_grad()
def test_step_0_draws_what_stable_diffusion_draws(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    expected = drawn(pipeline)
    model, tokenizer = ours(folder)
    heads = Heads(model, InferenceConfig())
    tokens, mask = tokenizer.encode(PROMPTS, model.config.text_encoder.length)
    found = heads.generate_tokens(tokens, mask, SEEDS, STEPS, GUIDANCE, "ddim")
    assert expected.std() > 0.02, "a picture of nothing proves nothing"
    assert (expected[0] - expected[1]).abs().max() > 100 * TOLERANCE
    difference = (found - expected).abs().max().item()
    assert difference < TOLERANCE
    other = heads.generate_tokens(tokens.flip(0), mask.flip(0), SEEDS, STEPS, GUIDANCE, "ddim")
    assert (other - expected).abs().max() > TOLERANCE, "the captions decide nothing"
