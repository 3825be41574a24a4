"""What one rank holds of the training state: flat fp32 tensors, and where each parameter lies in
them.

ZeRO cuts the optimizer's state between ranks. Moving averages, checkpoints and rewinds all work on
these cuts where they lie, so none of them gathers a parameter. This file alone knows DeepSpeed's
layout of them (read in 0.19.8; engine.py alone imports it).

Stage 3 cuts every parameter of n elements into equal parts of ceil(n / ranks), the last one padded;
stages 1 and 2 cut the concatenation of all parameters, so a cut may fall anywhere in one; stage 0
cuts nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")

Read = Callable[[str, str, int, int], Tensor]
"""(kind, parameter, start, stop) -> those elements of it, fp32, flat."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the parameter ``name``, at ``offset`` of flat tensor ``flat``;
    ``shared`` if every rank holds them."""

    name: str
    start: int
    stop: int
    flat: int
    offset: int
    shared: bool = False

    def of(self, flats: list[Tensor]) -> Tensor:
        """Its elements in ``flats``, a view."""
        return flats[self.flat][self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True)
class Copy:
    """The state of one rank's partitions, copied: what a checkpoint writes and a rewind restores.

    Attributes:
        tensors: fp32 flat tensors on the CPU by kind: weights, exp_avg, exp_avg_sq, and what else
            the owner put in (moving averages).
        steps: AdamW's step count.
    """

    tensors: dict[str, list[Tensor]]
    steps: float


class Partitions:
    """This rank's part of a task's trained parameters and of their AdamW state.

    Attributes:
        flats: fp32 master weights. Views of DeepSpeed's own: written in place alone.
        frozen: parameters that are not trained, or this rank's part of them, in their own type.
        pieces: what of each parameter lies where in flats, then frozen; padding belongs to none.
        shapes: of every parameter, whole.
        even: whether the parts of a parameter are [r·s, (r+1)·s) with s = ceil(n / ranks).
        replicated: whether every rank holds all.
    """

    def __init__(self, module: nn.Module, optimizer: Any, rank: int, world: int) -> None:
        named = dict(module.named_parameters())
        self._zero, self._rank, self._world = optimizer, rank, world
        self._names = {id(p): n for n, p in named.items()}
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in named.items()}
        self.flats: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self.pieces: list[Piece] = []
        self.even = self.replicated = False
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self.even = True
            self._stage3()
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self._stage12()
        elif isinstance(optimizer, torch.optim.Optimizer):
            self.replicated = True
            self._stage0()
        else:
            raise ConfigError(
                f"engine.zero_stage: partitions of {type(optimizer).__name__} are not known; use "
                "zero_stage 3, 2 or 1, or 0 with precision fp32"
            )
        if any(not flat.numel() for flat in self.flats):
            raise ConfigError(
                "engine: the optimizer's state is not in memory, where moving averages and "
                "checkpoints read it; use offload_optimizer none or cpu"
            )
        for name, p in named.items():
            if not p.requires_grad:
                part = getattr(p, "ds_tensor", None)  # of ZeRO-3
                whole = part is None
                tensor = (p.data if part is None else part.data).view(-1)
                numel = torch.Size(self.shapes[name]).numel()
                start, stop = (0, numel) if whole else even_part(numel, rank, world)
                self.pieces.append(
                    Piece(name, start, stop, len(self.flats) + len(self.frozen), 0, whole)
                )
                self.frozen.append(tensor)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that steps the flat tensors."""
        return self._zero if self.replicated else self._zero.optimizer

    def written(self) -> Iterator[tuple[Piece, int, int]]:
        """Each piece that this rank writes to a checkpoint, and the elements [start, stop) of the
        parameter that it writes: over all ranks, every element once."""
        for piece in self.pieces:
            start, stop = piece.start, piece.stop
            if piece.shared:
                start, stop = even_part(stop, self._rank, self._world)
            if stop > start:
                yield piece, start, stop

    def tensors(self) -> dict[str, list[Tensor]]:
        """The state itself, by kind; no moments before the first step."""
        found = {WEIGHTS: [flat.detach() for flat in (*self.flats, *self.frozen)]}
        states = [self.inner.state.get(key, {}) for key in self._keys()]
        for kind in MOMENTS:
            if all(kind in state for state in states):
                found[kind] = [state[kind].detach().view(-1) for state in states]
        return found

    @property
    def restorable(self) -> bool:
        """Whether a copy of this rank's part is enough to go back to it (not in stages 1 and 2,
        whose working weights are whole on every rank and their masters not)."""
        return self.even or self.replicated

    @property
    def steps(self) -> float:
        """Steps that AdamW has made."""
        state = self.inner.state.get(self._keys()[0], {})
        return float(state.get("step", 0))

    def copy(self, more: Mapping[str, list[Tensor]]) -> Copy:
        """State and ``more`` tensors of the same layout, copied to the CPU."""
        tensors = {
            kind: [flat.detach().to("cpu", copy=True) for flat in flats]
            for kind, flats in (self.tensors() | dict(more)).items()
        }
        return Copy(tensors, self.steps)

    @torch.no_grad()
    def restore(self, copy: Copy) -> None:
        """Put a copy of this rank's own back; only where `restorable`."""
        self._fill(copy.tensors, copy.steps)
        self._publish()

    @torch.no_grad()
    def load(self, read: Read, steps: float) -> None:
        """Fill every piece from ``read``, whatever number of ranks wrote it."""
        kinds = (WEIGHTS, *MOMENTS) if steps else (WEIGHTS,)
        self._fill({kind: self.like(read, kind) for kind in kinds}, steps)
        self._publish(read)

    @torch.no_grad()
    def refine(self, has: Callable[[str], bool], read: Callable[[str, int, int], Tensor]) -> None:
        """Give the masters the values that their working weights are rounded from, where
        ``has(parameter)``: ``read(parameter, start, stop)``."""
        for piece in self.pieces:
            if piece.flat < len(self.flats) and piece.stop > piece.start and has(piece.name):
                value = read(piece.name, piece.start, piece.stop)
                flat, at = self.flats[piece.flat], piece.offset
                flat.data[at : at + len(value)].copy_(value)

    def like(self, read: Read, kind: str) -> list[Tensor]:
        """Tensors of the layout of `flats`, and for weights of `frozen`, filled from ``read``."""
        own = (*self.flats, *self.frozen) if kind == WEIGHTS else self.flats
        filled = [torch.zeros_like(flat, requires_grad=False) for flat in own]
        for piece in self.pieces:
            if piece.stop > piece.start and piece.flat < len(filled):
                piece.of(filled).copy_(read(kind, piece.name, piece.start, piece.stop))
        return filled

    # --- DeepSpeed's layouts ---------------------------------------------------------------------

    def _stage3(self) -> None:
        z = self._zero
        self.flats = list(z.fp32_partitioned_groups_flat)
        for index, parameters in enumerate(z.fp16_groups):
            offset = 0
            for p in parameters:
                part = p.partition_numel()
                start, stop = even_part(p.ds_numel, self._rank, self._world)
                self.pieces.append(Piece(self._names[id(p)], start, stop, index, offset))
                offset += part

    def _stage12(self) -> None:
        z = self._zero
        self.flats = list(z.single_partition_of_fp32_groups)
        for index, parameters in enumerate(z.bit16_groups):
            for p in parameters:
                mapping = p._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    name = self._names[id(p)]
                    self.pieces.append(
                        Piece(name, low.start, low.start + low.numel, index, high.start)
                    )

    def _stage0(self) -> None:
        self._whole = [p for group in self.inner.param_groups for p in group["params"]]
        self.flats = [p.data.view(-1) for p in self._whole]
        self.pieces = [
            Piece(self._names[id(p)], 0, p.numel(), index, 0, shared=True)
            for index, p in enumerate(self._whole)
        ]

    def _keys(self) -> list[Any]:
        """Under what the optimizer keeps the state of each flat tensor."""
        return self._whole if self.replicated else self.flats

    def _fill(self, tensors: Mapping[str, list[Tensor]], steps: float) -> None:
        for frozen, value in zip(self.frozen, tensors[WEIGHTS][len(self.flats) :], strict=True):
            frozen.copy_(value)
        for index, (key, flat) in enumerate(zip(self._keys(), self.flats, strict=True)):
            flat.data.copy_(tensors[WEIGHTS][index])
            if not steps:
                self.inner.state.pop(key, None)
                continue
            state = self.inner.state[key]
            on_device = bool(self.inner.defaults.get("fused"))
            device = flat.device if on_device else torch.device("cpu")
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(key, requires_grad=False)
                state[kind].view(-1).copy_(tensors[kind][index])

    def _publish(self, read: Read | None = None) -> None:
        """Make the working weights those of the masters."""
        z = self._zero
        if self.even:
            z._partition_all_parameters()
            for index in range(len(self.flats)):
                z._reassign_or_swap_out_partitioned_parameters(index)
            z.checkpoint_event_epilogue()  # gathers what is kept whole on every rank
        elif not self.replicated:
            assert read is not None
            for group in z.bit16_groups:
                for p in group:
                    name = self._names[id(p)]
                    p.data.copy_(read(WEIGHTS, name, 0, p.numel()).view_as(p))


def even_part(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Rank's elements [start, stop) of ``numel`` cut into equal parts, the last ones shorter or
    empty."""
    part = -(-numel // world)
    return min(rank * part, numel), min((rank + 1) * part, numel)
