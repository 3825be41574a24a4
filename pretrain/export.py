"""From a committed checkpoint to files that anyone can load: safetensors, JSON and the tokenizer.

The export proves itself before it is given its name: it is loaded again without DeepSpeed, and its
tensors and outputs are compared with the checkpoint's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import ops, storage
from pretrain.checkpoint import TAG, Checkpoint, damage, list_committed
from pretrain.config import build
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import CheckpointError, ExportError
from pretrain.inference import Predictor
from pretrain.run_config import RunConfig
from pretrain.task import PretrainTask
from pretrain.train import build_task


def newest(output: str | Path) -> Checkpoint:
    """The newest committed checkpoint of the run in ``output``, its hashes verified.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = list_committed(Path(output) / "checkpoints")
    if not found:
        raise CheckpointError(
            f"output={str(output)!r} holds no committed checkpoint; train it first"
        )
    problem = damage(found[-1].folder)
    if problem:
        raise CheckpointError(f"checkpoint={str(found[-1].folder)!r} is damaged: {problem}")
    return found[-1]


def read_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of the task, whole, fp32, from all ranks' parts; in one process, without a
    process group."""
    ops.choose_accelerator()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.folder), tag=TAG
    )
    return {name: tensor.float() for name, tensor in state.items()}


def load_task(
    output: str | Path, tokenizer_path: str | None = None
) -> tuple[PretrainTask, RunConfig, Tokenizer, int]:
    """Task, configuration, tokenizer and progress of a run's newest committed checkpoint.

    Raises:
        CheckpointError: none, damaged, or not of the configuration it carries.
        TokenizerMismatch: the tokenizer file has changed since.
    """
    checkpoint = newest(output)
    config = build(RunConfig, checkpoint.run["config"])
    tokenizer = Tokenizer(tokenizer_path or config.data.tokenizer)
    tokenizer.check(checkpoint.run["tokenizer_sha256"])
    task = build_task(config, tokenizer)
    state = read_state(checkpoint)
    expected = {name: p.shape for name, p in task.named_parameters()}
    wrong = [n for n, shape in expected.items() if n not in state or state[n].shape != shape]
    if wrong:
        raise CheckpointError(
            f"checkpoint={str(checkpoint.folder)!r} lacks {len(wrong)} of {len(expected)} "
            "tensors, or has them in "
            f"another shape ({', '.join(wrong[:3])})"
        )
    task.load_state_dict({n: state[n] for n in expected}, strict=False)
    return task.eval(), config, tokenizer, checkpoint.samples


def export(output: str | Path, folder: str | Path) -> Path:
    """Write the newest committed checkpoint of ``output`` as a model folder.

    The folder holds ``model.safetensors`` (fp32), ``config.json``, ``tokenizer.model`` and
    ``card.json``.

    Raises:
        CheckpointError: nothing to export.
        ExportError: what was written does not give back the same tensors and outputs.
    """
    from safetensors.torch import save_file

    output, folder = Path(output), Path(folder)
    task, config, tokenizer, samples = load_task(output)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _, state = task.model.portable()
    save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
    storage.write_bytes(
        str(temporary / "tokenizer.model"), storage.read_bytes(config.data.tokenizer)
    )
    _write_json(temporary / "config.json", _definition(task, config, tokenizer))
    _write_json(temporary / "card.json", _card(output, config, samples))
    _prove(temporary, task, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


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


def _card(output: Path, config: RunConfig, samples: int) -> dict[str, Any]:
    """What a reader of the model must know: what it saw, how it scored, what it is not for."""
    evaluations = output / "evaluations.jsonl"
    lines = evaluations.read_text(encoding="utf-8").splitlines() if evaluations.exists() else []
    return {
        "name": config.name,
        "samples": samples,
        "data": {"train": config.data.train},
        "metrics": json.loads(lines[-1]) if lines else {},
        "limits": "It knows what its training shards show, and nothing else; see `data`.",
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
