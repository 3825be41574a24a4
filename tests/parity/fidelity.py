"""torch-fidelity's own numbers, in a process of its own: its package imports torchvision, which
does not load beside this torch, so empty modules stand in for it.

python fidelity.py WHEEL FOLDER reads weights.pth, pixels.pt and features.pt from FOLDER and writes
found.pt.
"""

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

wheel, folder = sys.argv[1], Path(sys.argv[2])
for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models"):
    module = types.ModuleType(f"torchvision{name}")
    module.__spec__ = ModuleSpec(module.__name__, None)
    module.__getattr__ = lambda attribute: MagicMock(name=attribute)  # type: ignore[method-assign]
    sys.modules[module.__name__] = module
sys.path.insert(0, wheel)

import torch  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.metric_fid import (  # noqa: E402
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402

network = FeatureExtractorInceptionV3("reference", ["2048"], str(folder / "weights.pth"))
with torch.no_grad():
    found = [network(pixels)[0] for pixels in torch.load(folder / "pixels.pt")]
real, made = torch.load(folder / "features.pt")
metrics = fid_statistics_to_metric(
    fid_features_to_statistics(made), fid_features_to_statistics(real), False
)
metrics |= kid_features_to_metric(
    made, real, kid_subsets=1, kid_subset_size=len(made), verbose=False
)
metrics |= prc_features_to_metric(made, real, verbose=False, save_cpu_ram=False)
torch.save({"features": found, "metrics": metrics}, folder / "found.pt")
