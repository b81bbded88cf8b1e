"""What training is, as values (torch-free). Steps are optimizer steps; batches are counted over all processes."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config import Strict


class RunConfig(Strict):
    """Where a run lives: ROOT/EXPERIMENT/STAGE. The name is the identity: starting it again continues it."""

    root: Path = Path("runs")
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: NonNegativeInt = 0

    def folder(self, stage: str) -> Path:
        return self.root / self.experiment / stage


class OptimConfig(Strict):
    """AdamW with a linear rise over `warmup_steps`, then half a cosine down to `min_lr`, held for `cooldown_steps`."""

    lr: float = Field(gt=0, description="at the peak, for the global batch as configured (no hidden scaling)")
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: NonNegativeInt = 0
    cooldown_steps: NonNegativeInt = Field(0, description="the last steps, all at min_lr")
    weight_decay: float = Field(0.05, ge=0, description="not applied to vectors, A, tokens and positions")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1, description="lr of a layer over the lr of the layer above it")
    clip_norm: float = Field(0.0, ge=0, description="global gradient norm; 0 = no clipping")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class EngineConfig(Strict):
    """DeepSpeed's part. bf16 is autocast over fp32 weights: a scan whose A and steps are rounded to bf16 drifts."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch: PositiveInt | None = Field(
        None, description="most samples of the first stream a process takes at once; none = all of its share"
    )
    bucket_bytes: PositiveInt = Field(
        64 * 2**20, description="gradients reduced at once; small models like small buckets"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the input of each block and compute the rest again in backward"
    )
    offload_optimizer: bool = Field(
        False,
        description="masters, moments and teacher in the host's memory (ZeRO 1 to 3); slower steps, larger models",
    )
    compile: bool = Field(
        False, description="torch.compile: a minute at every start; for GPUs, on a CPU eager is as fast or faster"
    )
    keep_whole: NonNegativeInt = Field(
        100_000, description="ZeRO-3: parameters of fewer elements stay whole on every rank instead of being gathered"
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="of a collective: longer, and a rank counts as dead (exit 7)"
    )

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs zero_stage 1, 2 or 3: at 0 there are no masters beside the weights"
            )
        return self


class LoopConfig(Strict):
    """How long, and how often what happens; all in optimizer steps."""

    steps: PositiveInt
    global_batch: PositiveInt = Field(
        description="samples of the stage's first stream per optimizer step, over all processes"
    )
    log_every: PositiveInt = 50
    eval_every: PositiveInt | None = Field(None, description="validation; none = only after the last step")
    save_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: PositiveInt | None = Field(None, description="checkpoints of these steps are kept for ever")
    background_save: bool = Field(True, description="write checkpoints beside the training")
    time_limit_minutes: float | None = Field(
        None, gt=0, description="of this start; then as after a signal: save, exit 75"
    )
    on_divergence: Literal["stop", "rewind"] = Field(
        "stop", description="rewind: back to the newest checkpoint, never to see the first bad step's data again"
    )
    max_rewinds: NonNegativeInt = 3
    on_alarm: Literal["note", "stop"] = Field(
        "note", description="a stage's own alarm (collapse of the pseudo-labels): an incident in the report, or exit 6"
    )
    spike_mads: float | None = Field(
        None,
        gt=0,
        description="a logged loss this many median absolute deviations above the recorded ones is a divergence",
    )
    max_skipped_steps: PositiveInt = Field(
        1,
        description="updates that ZeRO 1 to 3 skip between two log lines, for gradients that are not finite, that are a"
        " divergence; fewer are an incident in the report (ZeRO 0 cannot skip)",
    )
    vote_every: PositiveInt = Field(4, description="steps between the ranks' votes on stopping (one tiny all-reduce)")


class LyapEMAConfig(Strict):
    """The teacher's rule. The source names gamma and lambda but gives no values: every default here is ours."""

    preset: Literal["none", "supplement"] = Field(
        "none",
        description="supplement: eq. 3-5 as printed (lyap, l2, offset 0, no clamp, no warm-up); give gamma and pull yourself",
    )
    mode: Literal["ema", "lyap", "guarded"] = "guarded"
    signal: Literal["discrepancy", "energy"] = Field(
        "discrepancy",
        description="what the decay answers to: |s-t| (the supplement), or the fall of V in the student's step (the README)",
    )
    norm: Literal["l2", "rms", "relative", "lag"] = Field(
        "lag", description="how |s-t| is measured; lag = in mean student steps, without dimension"
    )
    gamma: float = Field(0.01, ge=0, description="sensitivity of the decay to the discrepancy")
    base_decay: float = Field(
        0.97, gt=0, lt=1, description="decay at no discrepancy (0.5 = the supplement); in mode ema, the decay"
    )
    final_decay: float | None = Field(
        None, gt=0, lt=1, description="mode ema: the decay after `ramp_steps`, reached from base_decay by half a cosine"
    )
    ramp_steps: NonNegativeInt = 0
    min_decay: float = Field(0.0, ge=0, lt=1)
    max_decay: float = Field(0.999, gt=0, le=1)
    pull: float = Field(0.0, ge=0, lt=1, description="lambda: the student's step towards the teacher, not scaled by lr")
    warmup_steps: NonNegativeInt = Field(20, description="steps with decay (1+k)/(10+k) at most, and no guard")
    radius_steps: float = Field(
        50.0, gt=0, description="guard: smallest radius of the trust region, in mean student steps"
    )
    buffers: Literal["copy", "average"] = Field(
        "copy", description="the teacher's running statistics: the student's, or averaged with the same decay"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset", "none") != "supplement":
            return values
        if missing := [name for name in ("gamma", "pull") if name not in values]:
            raise ValueError(f"preset supplement needs {' and '.join(missing)}: the source prints no value for it")
        for name, decided in SUPPLEMENT.items():
            if values.get(name, decided) != decided:
                raise ValueError(f"{name} = {values[name]!r}: preset supplement decides it ({decided!r}); leave it out")
        return {**values, **SUPPLEMENT}

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_decay > self.max_decay:
            raise ValueError(f"min_decay {self.min_decay} is above max_decay {self.max_decay}")
        if self.mode != "ema" and not self.min_decay <= self.base_decay < self.max_decay:
            raise ValueError(
                f"base_decay {self.base_decay} must lie from min_decay {self.min_decay} to below max_decay {self.max_decay}:"
                f" otherwise the decay of mode {self.mode} is clamped to a constant"
            )
        if (self.final_decay is None) != (self.ramp_steps == 0):
            raise ValueError("final_decay and ramp_steps belong together: give both or neither")
        if self.final_decay is not None and self.mode != "ema":
            raise ValueError(f"final_decay is of mode ema; in mode {self.mode} the discrepancy decides the decay")
        return self


# sigmoid(gamma |s - t|) lies in [0.5, 1) by itself.
SUPPLEMENT: dict[str, Any] = {
    "mode": "lyap",
    "signal": "discrepancy",
    "norm": "l2",
    "base_decay": 0.5,
    "min_decay": 0.0,
    "max_decay": 1.0,
    "warmup_steps": 0,
}
