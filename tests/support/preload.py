"""What every rank of a distributed test imports, imported once (see ranks.py)."""

from pretrain import ops

ops.choose_accelerator()
ops.import_deepspeed()

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402  (brings torch._dynamo)
import deepspeed.runtime.zero.stage3  # noqa: E402, F401

import pretrain.train  # noqa: E402, F401
import tests.support.tiny  # noqa: E402, F401
