"""From a committed checkpoint to files that anyone can load: safetensors, JSON and the tokenizer.

Parameters are put together one at a time from the ranks' parts and streamed into the file, so no
device and no process ever needs room for more than one whole parameter beside the model itself. The
export proves itself before it is given its name: it is loaded again without DeepSpeed, and its
tensors and outputs are compared with the checkpoint's.
"""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pretrain import card, ema, storage
from pretrain.checkpoint import Checkpoint
from pretrain.ckpt_tools import choose
from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import CheckpointError, ExportError
from pretrain.inference import Predictor
from pretrain.objectives.base import Objective
from pretrain.partitions import WEIGHTS
from pretrain.parts import Parts
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask
from pretrain.train import build_task
from pretrain.weights import Entry, write


def load_task(
    output: str | Path,
    tokenizer_path: str | None = None,
    which: str = "newest",
    weights: str | None = None,
) -> tuple[PretrainTask, RunConfig, Tokenizer, int]:
    """Task, configuration, tokenizer and progress of a run's checkpoint.

    Args:
        which: of its checkpoints, see `ckpt_tools.choose`.
        weights: "weights", or an average such as "ema-2000"; None takes the run's ``ema.use``.

    Raises:
        CheckpointError: none, damaged, or not of the configuration it carries.
        TokenizerMismatch: the tokenizer file has changed since.
    """
    task, config, tokenizer, checkpoint, _ = _load(output, tokenizer_path, which, weights)
    return task, config, tokenizer, checkpoint.samples


def _load(
    output: str | Path, tokenizer_path: str | None, which: str, weights: str | None
) -> tuple[PretrainTask, RunConfig, Tokenizer, Checkpoint, str]:
    checkpoint = choose(output, which)
    config = build(RunConfig, checkpoint.run["config"])
    tokenizer = Tokenizer(tokenizer_path or config.data.tokenizer)
    tokenizer.check(checkpoint.run["tokenizer_sha256"])
    exact = config.model_copy(update={"model": config.model.exact()})
    task = build_task(exact, tokenizer)
    parts = Parts(checkpoint.folder)
    kind = weights_of(checkpoint, config, weights)
    expected = dict(task.named_parameters())
    wrong = [n for n, p in expected.items() if parts.shapes.get(n) != tuple(p.shape)]
    if wrong:
        raise CheckpointError(
            f"checkpoint={str(checkpoint.folder)!r} lacks {len(wrong)} of {len(expected)} "
            "tensors, or has them in "
            f"another shape ({', '.join(wrong[:3])})"
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(parts.whole(kind, name))
    return task.eval(), config, tokenizer, checkpoint, kind


def weights_of(checkpoint: Checkpoint, config: RunConfig, weights: str | None) -> str:
    """Which weights of a checkpoint are meant: ``weights``, else those of the run's ``ema.use``.

    Raises:
        CheckpointError: it has none such.
    """
    kind = weights or (WEIGHTS if config.ema.use is None else ema.kind(config.ema.use))
    kinds = [k for k in Parts(checkpoint.folder).kinds if k == WEIGHTS or k.startswith("ema-")]
    if kind not in kinds:
        raise CheckpointError(
            f"weights={kind!r} is not in checkpoint {str(checkpoint.folder)!r}; there are "
            f"{', '.join(kinds)}"
        )
    return kind


def export(
    output: str | Path,
    folder: str | Path,
    which: str = "newest",
    weights: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write a committed checkpoint of ``output`` as a model folder.

    The folder holds ``model.safetensors`` (fp32), ``config.json``, ``tokenizer.model`` (or
    ``tokenizer/``, and ``vae/``, where those came from a diffusers folder), ``disco/`` where the
    run had codes, and the model card as ``card.json`` and ``README.md``.

    Args:
        which, weights: see `load_task`.
        licence: of the weights, for the card.

    Raises:
        CheckpointError: nothing to export.
        ExportError: an objective conditions generation, and the folder has no place for what it
            needs; or what was written does not give back the same tensors and outputs.
    """
    output, folder = Path(output), Path(folder)
    task, config, tokenizer, checkpoint, kind = _load(output, None, which, weights)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    condition = _save_condition(task, temporary, output)
    _, state = task.model.portable()
    entries = [Entry.of(name, tensor) for name, tensor in state.items()]
    write(temporary / "model.safetensors", entries, {"format": "pt"})
    tokenizer.save(temporary)
    task.model.save_autoencoder(temporary)
    _write_json(temporary / "config.json", _definition(task, config, tokenizer) | condition)
    parameters = sum(tensor.numel() for tensor in state.values())
    made = card.make(output, config, checkpoint, kind, parameters, licence)
    _write_json(temporary / "card.json", made)
    storage.write_bytes(str(temporary / "README.md"), card.readme(made).encode())
    _prove(temporary, task, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def _save_condition(task: PretrainTask, folder: Path, output: Path) -> dict[str, str]:
    """What an objective added to the captions, in a folder of its name; and config.json's field."""
    found: dict[str, str] = {}
    for name, module in task.objectives.items():
        objective = cast(Objective, module)
        if type(objective).condition_at_inference is Objective.condition_at_inference:
            continue
        if found or not objective.save_condition(folder / name, output):
            others = f"beside objectives.{found['condition']} " if found else ""
            raise ExportError(
                f"objectives.{name} {others}adds to what generation is conditioned on, which an "
                "exported model does not hold: its pictures would be wrong. Draw from the run "
                f"instead: `python -m pretrain {name} --help`"
            )
        found = {"condition": name}
    return found


def _definition(task: PretrainTask, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    scales: list[Tensor] = [
        module() for name, module in task.named_modules() if name.endswith(".logit_scale")
    ]
    return {
        "name": config.name,
        "model": task.model.portable()[0].model_dump(mode="json"),
        "inference": config.inference.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer.sha256,
        "logit_scale": float(scales[0].detach().mean()) if scales else 100.0,
    }


@torch.no_grad()
def _prove(folder: Path, task: PretrainTask, tokenizer: Tokenizer) -> None:
    predictor = Predictor.load(folder)
    written, expected = (
        dict(predictor.model.named_parameters()),
        task.model.portable()[1],
    )
    empty = [name for name, p in written.items() if p.numel() == 0]
    changed = [name for name, p in expected.items() if not torch.equal(p, written[name])]
    if empty or changed or len(written) != len(expected):
        raise ExportError(
            f"{folder}: {len(empty)} tensors are empty and {len(changed)} differ from the "
            "checkpoint"
        )
    model = task.model.eval()
    tokens, mask = tokenizer.encode(["a proof of export"], model.config.text_encoder.length)
    z = torch.linspace(-1, 1, 3 * model.config.image_size**2).view(
        1, 3, model.config.image_size, -1
    )
    for ours, theirs in zip(
        _outputs(model, z, tokens, mask), _outputs(predictor.model, z, tokens, mask), strict=True
    ):
        if not torch.equal(ours, theirs) or not torch.isfinite(theirs).all():
            raise ExportError(
                f"{folder}: the exported model's outputs differ from the checkpoint's"
            )


def _outputs(model: Any, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    z = model.autoencoder.encode(images)
    text, null_c = model.encode_text(tokens, mask)
    half = 0.5 * torch.ones(1)
    t_z, t_e = (p.schedule.training_times(half) for p in (model.image_path, model.text_path))
    return model.denoise_image(z, t_z, text.c_BLD), model.denoise_query(text.e_BE, t_e, z, null_c)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    storage.write_bytes(str(path), json.dumps(tree, indent=1, sort_keys=True).encode())
