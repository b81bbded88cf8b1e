"""Replay: one step of a run is taken again, with hooks on every module, to find the first value that is not finite.

Its batch is drawn again and its weights are restored from before it. The stream is exact and checkpoints know no world
size, so one process on a CPU can take the steps of many. Not bit for bit the same are the order of sums, the kernels, and
with drop path the masks of other ranks.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.streaming.loader import Batch
from pipeline.train import checkpoint
from pipeline.train.divergence import data_step_of, next_data_step
from pipeline.train.training import Draws, Training, train_step

logger = logging.getLogger(__name__)


class Replay(NamedTuple):
    """Which step to take again.

    Args:
        folder: The folder of the run.
        data_step: A step of the data, as an incident or a flight record names it.
    """

    folder: Path
    data_step: int


def replay(training: Training, asked: Replay) -> str:
    """Take one step of a run again, from the newest sound checkpoint before it, or from the start.

    Returns:
        A sentence that names the first module or gradient with a value that is not finite.

    Raises:
        ConfigError: If the steps of the run do not reach the data step.
    """
    state = checkpoint.restore(
        asked.folder / "checkpoints",
        training,
        accept=lambda saved: next_data_step(saved) <= asked.data_step,
        set_aside=False,
    )
    step = state.step if state else 0
    left_out = [hole for hole in state.loop.left_out if hole != asked.data_step] if state else []
    steps = training.loop.steps
    newest = data_step_of(steps - 1, left_out)
    if asked.data_step > newest:
        raise ConfigError(
            f"--replay: DATA_STEP is {asked.data_step}, but the {steps} steps of {asked.folder} end at data step {newest};"
            f" take one from {asked.folder}/incidents.jsonl"
        )
    logger.info(
        "replaying from step %d to data step %d, %d micro-batches a step", step, asked.data_step, training.accumulation
    )
    draws = Draws(training)
    while (data_step := data_step_of(step, left_out)) < asked.data_step:
        train_step(training, draws.take(data_step), step=step, data_step=data_step)
        step += 1
    drawn = draws.take(data_step)
    watch = Watch(training.engine.module)
    done = train_step(training, drawn, step=step, data_step=data_step)
    watch.close()
    logger.info("its samples: %s", {name: batch.indices.tolist() for name, batch in drawn.items()})
    found = bad_images(drawn) or watch.found or _bad_loss(done.loss)
    return f"data step {data_step} (step {step}): {found}"


class Watch:
    """Hooks on every module and weight of `model`.

    `found` names the first value that is not finite, in the order of computation: forward from the input, backward from
    the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found = ""
        self._handles = [
            module.register_forward_hook(self._forward(name or "the model", module))
            for name, module in model.named_modules()
        ]
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                self._handles.append(weight.register_hook(self._backward(f"the gradient of {name}")))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _forward(self, name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._backward(f"the gradient of the output of {name} ({_kind(module)})"))
                if not self.found and not _finite(tensor):
                    self.found = f"forward, {name} ({_kind(module)}) is the first module to give {_what(tensor)};"
                    self.found += f" its inputs {_range(inputs)}, its weights {_range(tuple(module.parameters()))}"

        return hook

    def _backward(self, what: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if not self.found and not _finite(gradient):
                self.found = f"backward, {what} is the first to hold {_what(gradient)}; forward all is finite"

        return hook


def bad_images(drawn: Mapping[str, Batch]) -> str:
    """Return which samples' images are not finite, or an empty string."""
    for name, batch in drawn.items():
        finite = batch.images.flatten(1).isfinite().all(1)
        if not finite.all():
            return f"images of the stream {name} are not finite: samples {batch.indices[~finite].tolist()}"
    return ""


def _bad_loss(loss: Tensor) -> str:
    if _finite(loss):
        return (
            f"every value is finite, the loss is {float(loss):.6g}: the run's fault came from its hardware,"
            " a kernel of its device, or the masks of another rank's drop path"
        )
    return f"the loss is {float(loss)}, though every module and gradient is finite: it arises in the loss itself"


def _tensors(output: Any) -> list[Tensor]:
    given = output if isinstance(output, tuple | list) else (output,)
    return [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _what(tensor: Tensor) -> str:
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} nan and {infinite} infinities among {tensor.numel()} values"


def _range(values: tuple[Any, ...]) -> str:
    """The range of the values, if all are finite."""
    tensors = _tensors(values)
    if not tensors:
        return "are none"
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    if not _finite(flat):
        return "are not finite themselves"
    return f"lie in [{float(flat.min()):.3g}, {float(flat.max()):.3g}]"


def _kind(module: nn.Module) -> str:
    return type(module).__name__
