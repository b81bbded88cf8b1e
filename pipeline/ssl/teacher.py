"""A teacher: the moving average that LyapEMA keeps in shards, and the whole copy of it that computes."""

from typing import Any

from torch import Tensor, nn

from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.inference_copy import InferenceCopy
from pipeline.ssl.lyapema import LyapEMA
from pipeline.train.engine import Engine
from pipeline.train.task import Mean, mean_magnitude


class Teacher:
    """An average of the student's weights and running statistics, which LyapEMA's rule moves.

    One object holds the shards, the inference copy and their state, so a Task only names it. Stage 2's average and
    stage 3's teacher are both one; they differ in their config.

    Args:
        engine: The student under training.
        module: A copy of the student, made before the engine may have cut the weights; it becomes the inference copy.
        config: The rule of the average.
        own_start: Whether the average starts from the weights of `module`, which are then no copy of the student's.
    """

    def __init__(self, engine: Engine, module: nn.Module, config: LyapEMAConfig, *, own_start: bool = False) -> None:
        self.ema = LyapEMA(
            engine.masters, engine.base_optimizer, config, engine.all_reduce, num_weights=engine.num_weights
        )
        if own_start:
            start = dict(module.named_parameters())
            for shard in engine.shards:
                whole = start[shard.name].detach().view(-1)
                shard.of(self.ema.teacher[shard.flat]).copy_(whole[shard.start : shard.start + shard.numel])
            self.ema.measure()
        average = config.buffers == "average"
        self.copy = InferenceCopy(engine, module, self.ema.teacher, average_buffers=average)

    @property
    def module(self) -> nn.Module:
        """The network that computes, in eval mode and without gradients."""
        return self.copy.module

    @property
    def updates(self) -> int:
        """How often the teacher has moved."""
        return self.ema.updates

    def lr_factor(self) -> float:
        """Return what the rule multiplied the last step's learning rate by. It waits for the device."""
        return self.ema.lr_factor()

    def after_step(self, loss: Tensor) -> dict[str, Mean]:
        """Move the teacher after an optimizer step of this loss (collective); return the certificate's numbers."""
        report = self.ema.update(loss)
        self.copy.refresh(self.ema.one_minus_alpha, autocast=True)
        return report

    def fingerprint(self, images: Tensor) -> float:
        """Return the mean magnitude of the output on images (n, 3, H, W) (collective)."""
        self.copy.refresh()
        return mean_magnitude(self.module, images)

    def refresh(self) -> None:
        """Bring the inference copy up to date with the shards, in fp32 (collective); call it before an evaluation."""
        self.copy.refresh()

    def full_weights(self) -> dict[str, Tensor]:
        """Return the whole state dict on the CPU (collective; all ranks get it)."""
        return self.copy.full_weights()

    def sharded_state(self) -> dict[Tensor, Tensor]:
        """Return {master: its average}, which is saved and restored with the optimizer's shards."""
        return self.ema.teacher

    def buffers(self) -> dict[str, Tensor]:
        """Return the running statistics that are averages of the student's."""
        return self.copy.averaged_buffers()

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's small numbers, equal on all ranks."""
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the small numbers, and bring the inference copy up to date with the restored shards (collective)."""
        self.ema.load_state_dict(state)
        self.copy.refresh()
