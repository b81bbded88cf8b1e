"""The inference copy: a materialised copy of the teacher, made of the shards that LyapEMA moves.

Under ZeRO 0 to 2 every rank holds the whole copy, 4P bytes in fp32 (A and the step sizes of a scan do not survive bf16).
One all-gather refreshes it after each update. Under ZeRO-3 a rank holds the parameters outside of blocks and those of the
block that computes. They are gathered when a forward begins and released when it ends. Every rank must then call the copy
equally often, as training and evaluation do.

A gather sends 4P bytes. With `engine.precision=bf16` the matrices of linear layers and 2-D convolutions travel in bf16, which
nearly halves it: autocast rounds them so in every forward of the training, which therefore computes the same bits. An
evaluation is fp32, so the driver refreshes the copy in fp32 before it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.train.engine import Engine


class InferenceCopy:
    """A module in eval mode and without gradients, with the weights of an average.

    Args:
        engine: The student under training.
        module: A copy of the student, whole; it is used in place.
        tensors: {master: its average}.
        average_buffers: Whether running statistics are averaged too; otherwise they are the student's.
    """

    def __init__(self, engine: Engine, module: nn.Module, tensors: Mapping[Tensor, Tensor], *, average_buffers: bool):
        self.engine, self.tensors, self.average_buffers = engine, tensors, average_buffers
        self.module = module.to(engine.world.device).eval().requires_grad_(False)
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        halves = engine.config.precision == "bf16" and not engine.replicated
        self._rounded = rounded_by_autocast(module) if halves else frozenset()
        self.by_blocks = engine.config.zero_stage == 3
        if self.by_blocks:
            trained = {name for name, _ in engine.named_parameters}
            for block, parameters in blocks_of(self.module):
                self._gather_around(block, {n: p for n, p in parameters.items() if n in trained})
        self.refresh()

    def refresh(self, one_minus_alpha: Tensor | None = None, *, autocast: bool = False) -> None:
        """Bring the copy up to date (collective).

        Args:
            one_minus_alpha: Weight of the student in the last update, for averaged running statistics; None where they are
                up to date.
            autocast: Whether the copy will only compute under the training's autocast, and may have what that rounds rounded.
        """
        if not self.by_blocks:
            parameters = self._trained({n: p.data for n, p in self.module.named_parameters()})
            self._gather(parameters, autocast=autocast)
        latest, averaged = dict(self.engine.module.named_buffers()), self.averaged_buffers()
        copied: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, buffer in self.module.named_buffers():
            if name not in averaged:
                copied[buffer.dtype].append((buffer, latest[name]))
            elif one_minus_alpha is not None:
                buffer.lerp_(latest[name], one_minus_alpha.to(buffer))
        for (
            pairs
        ) in copied.values():  # one call for each dtype: a kernel for each small buffer would keep the host busy
            torch._foreach_copy_([receiver for receiver, _ in pairs], [source for _, source in pairs])

    def averaged_buffers(self) -> dict[str, Tensor]:
        """Return the running statistics that are averages of the student's, and so a state of their own."""
        lasting = self.module.state_dict().keys() if self.average_buffers else ()
        return {n: b for n, b in self.module.named_buffers() if n in lasting and b.is_floating_point()}

    def full_weights(self) -> dict[str, Tensor]:
        """Return the whole state dict on the CPU (collective; all ranks get it)."""
        full = self._trained({name: torch.empty(shape) for name, shape in self._shapes.items()})
        full = {name: tensor.to(self.engine.world.device) for name, tensor in full.items()}
        self.engine.gather(self.tensors, full)
        return {k: v.detach().cpu().clone() for k, v in {**self.module.state_dict(), **full}.items()}

    def _gather(self, into: Mapping[str, Tensor], *, autocast: bool) -> None:
        """Fill parameters from the shards (collective); under autocast, matrices travel as it rounds them."""
        travelling = {
            name: torch.empty_like(parameter, dtype=torch.bfloat16)
            for name, parameter in into.items()
            if autocast and name in self._rounded
        }
        whole = {name: parameter for name, parameter in into.items() if name not in travelling}
        for parameters in (whole, travelling):
            if parameters:
                self.engine.gather(self.tensors, parameters)
        for name, parameter in travelling.items():
            into[name].copy_(parameter)

    def _trained(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name] for name, _ in self.engine.named_parameters}

    def _gather_around(self, block: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Make the parameters under a module whole while the module computes, whichever module of the block is called."""
        depth = 0  # nested forwards of the block

        def gather(owned: dict[str, nn.Parameter], *_: Any) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                for name, parameter in owned.items():
                    parameter.data = torch.empty(self._shapes[name], device=self.engine.world.device)
                within = torch.is_autocast_enabled(self.engine.world.device.type)
                self._gather({name: parameter.data for name, parameter in owned.items()}, autocast=within)

        def release(owned: dict[str, nn.Parameter], *_: Any) -> None:
            nonlocal depth
            depth -= 1
            if not depth:
                _release(owned.values())

        for module in block.modules():
            under = {id(p) for p in module.parameters()}
            if owned := {name: p for name, p in parameters.items() if id(p) in under}:
                module.register_forward_pre_hook(partial(gather, owned))
                module.register_forward_hook(partial(release, owned))
        _release(parameters.values())


def rounded_by_autocast(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that a bf16 autocast rounds before each use: matrices of layers that it covers."""
    return frozenset(
        f"{prefix}.weight" if prefix else "weight"
        for prefix, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    )


def blocks_of(module: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Return the blocks of a module, each with the parameters that one forward of it uses together.

    The blocks are the items of the outermost lists and sequences (in a list of lists, the inner items). The last entry is
    the module itself, with the parameters that lie in no block. Parameters have their full names.
    """
    blocks: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, node: nn.Module, listed: bool) -> None:
        for name, child in node.named_children():
            if listed and type(child).forward is not nn.Module.forward:  # a bare list cannot be called
                blocks.append((f"{prefix}{name}.", child))
            else:
                container = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
                visit(f"{prefix}{name}.", child, listed or container)

    visit("", module, False)
    found = [(block, {prefix + n: p for n, p in block.named_parameters()}) for prefix, block in blocks]
    taken = {name for _, parameters in found for name in parameters}
    return [*found, (module, {n: p for n, p in module.named_parameters() if n not in taken})]


def _release(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
