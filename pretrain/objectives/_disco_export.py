"""What an exported model keeps of DisCo-Diff: the codes' tokens, and the prior where one was
trained. The encoder stays behind: generation never reads an image.

    disco.json           settings of the objective; whether there is a prior
    tokens.safetensors   codes to tokens
    prior.*              as `_disco_prior.save` writes them
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config import build
from pretrain.errors import ExportError
from pretrain.model.diffdis import DiffDis
from pretrain.objectives import _disco_prior
from pretrain.objectives._disco_sampling import At, CodeGuidance, by_prior
from pretrain.objectives.disco import Disco, Settings

FILE, TOKENS = "disco.json", "tokens.safetensors"


def save(disco: Disco, folder: Path, output: Path) -> None:
    """Write ``folder``; the prior is taken from ``output``.

    Raises:
        ExportError: the prior was trained for other weights.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = {n: p.detach().float().cpu().contiguous() for n, p in disco.tokens.named_parameters()}
    save_file(state, folder / TOKENS)
    prior, found = output / _disco_prior.FOLDER, False
    if (prior / "prior.json").exists():
        facts = json.loads((prior / "prior.json").read_text(encoding="utf-8"))["facts"]
        if facts.get("codes_of") != disco.fingerprint():
            raise ExportError(
                f"prior={str(prior)!r} draws codes of other weights than the ones exported; train "
                f"it anew (`python -m pretrain disco prior --output {output}`, of the same "
                "checkpoint and weights), or move it away to export without"
            )
        for name in ("prior.json", "prior.safetensors"):
            shutil.copyfile(prior / name, folder / name)
        found = True
    tree = {"settings": disco.settings.model_dump(mode="json"), "prior": found}
    (folder / FILE).write_text(json.dumps(tree, indent=1), encoding="utf-8")


class Exported:
    """An `inference.Condition` of codes drawn by the prior; without one, of the null tokens.

    Args:
        weight, temperature: guidance over the codes, and the prior's temperature.
    """

    def __init__(
        self, folder: Path, model: DiffDis, weight: float = 0.0, temperature: float = 1.0
    ) -> None:
        from safetensors.torch import load_file

        try:
            tree = json.loads((folder / FILE).read_text(encoding="utf-8"))
            state = load_file(folder / TOKENS)
        except (OSError, ValueError) as error:
            raise ExportError(
                f"folder={str(folder)!r} lacks the codes of the model ({error}); export it again"
            ) from None
        s = build(Settings, tree["settings"], "disco")
        self.disco = Disco(s, model, encodes=False)
        self.disco.tokens.load_state_dict(state)
        self.disco.eval()
        self.guidance: CodeGuidance | None = None
        if tree["prior"]:
            width = model.config.text_encoder.width
            self.prior = _disco_prior.load(folder, s.codes, s.values, width)
            draw = by_prior(self.prior, temperature)
            self.guidance = CodeGuidance(self.disco, model, draw, weight)

    def __call__(
        self, c_BLD: Tensor, null_c_BLD: Tensor, guidance: float, seeds: Sequence[int]
    ) -> At:
        device = c_BLD.device  # the model's, wherever it was moved since
        self.disco.to(device)
        if self.guidance is not None:
            self.prior.to(device)
            return self.guidance(c_BLD, null_c_BLD, guidance, seeds)
        null = self.disco.null_tokens(len(c_BLD)).to(c_BLD)
        c, without = (torch.cat([x, null], dim=1) for x in (c_BLD, null_c_BLD))
        return lambda t_B: (c, [(guidance, without)])
