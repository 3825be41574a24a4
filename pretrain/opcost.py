"""What a pass costs, operation by operation, found by running it on the meta device: floating-point
operations, bytes that are read and written, and how often. Times are for `roofline.py` to say.

Bytes are those of an operation's inputs and outputs, each once: what it moves if nothing of it is
in a cache and it needs one pass over its data. A view moves nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pretrain.abstract import fused_attention

Kind = Literal["matmul", "convolution", "convolution backward", "attention", "other"]

_KINDS: Mapping[str, Kind] = {
    "mm": "matmul",
    "addmm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "convolution": "convolution",
    "convolution_backward": "convolution backward",
}
# They give storage and fill none of it, or answer a question about shapes.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: by what its time goes.
        flops: a multiply and an add are two.
        nbytes: read and written.
    """

    kind: Kind
    flops: int
    nbytes: int


Ops = Mapping[Op, int]
"""Operations of a pass, and how often each is."""


class Recorder(TorchDispatchMode):
    """Records the operations that run inside. Nested views and in-place writes are understood.

    Attributes:
        ops: how often each was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[Op] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            self._note(func, name, args, kwargs, result)
        return result

    def attention(self, flops: int, nbytes: int) -> None:
        """A fused attention, of which the dispatcher sees only allocations."""
        self.ops[Op("attention", flops, nbytes)] += 1

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(result)
        if not made:
            return
        counter = flop_registry.get(func.overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=result)) if counter else 0
        own = {id(t.untyped_storage()) for t in given}
        if not name.endswith("_") and all(id(t.untyped_storage()) in own for t in made):
            return  # a reshape that needed no copy, a `to` that changed nothing
        nbytes = sum(t.nbytes for t in {id(t): t for t in given}.values())
        nbytes += sum(t.nbytes for t in made)
        self.ops[Op(_KINDS.get(name, "other"), flops, nbytes)] += 1


@contextmanager
def recorded() -> Iterator[Ops]:
    """The operations that run inside, on the meta device, attention being fused."""
    with Recorder() as recorder, fused_attention(recorder.attention):
        yield recorder.ops


def flops(ops: Ops) -> int:
    """Of all of them."""
    return sum(op.flops * n for op, n in ops.items())


def nbytes(ops: Ops) -> int:
    """That all of them move."""
    return sum(op.nbytes * n for op, n in ops.items())


def calls(ops: Ops) -> int:
    """How many there are."""
    return sum(ops.values())


def of_kinds(ops: Ops, kinds: Iterable[Kind]) -> Ops:
    """Those of some kinds."""
    wanted = set(kinds)
    return {op: n for op, n in ops.items() if op.kind in wanted}


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
