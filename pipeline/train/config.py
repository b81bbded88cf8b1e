"""What training is, as values (torch-free). Steps are optimizer steps; batches are counted over all processes."""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config import NonNegativeInt, PositiveInt, Seconds, Strict
from pipeline.identity import FREE
from pipeline.report.tracker import TrackerName

COSINE_7_16_END = math.cos(math.pi * 7 / 16)  # the last learning rate of FixMatch's schedule, over the first


class RunConfig(Strict):
    """Where a run lives: ROOT/EXPERIMENT/STAGE. The name is the identity: starting it again continues it."""

    root: Path = Field(Path("runs"), description="folder of all experiments", json_schema_extra=FREE)
    experiment: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=200,
        description="name of the experiment; its stages share it (letters, digits, `_`, `.` and `-`)",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of the first weights, of the order of the data, of the augmentation and of drop path",
    )

    tracker: TrackerName = Field(
        "none",
        description="where the numbers of metrics.jsonl and the config go beside TensorBoard: none, wandb (offline unless"
        " WANDB_MODE says otherwise), mlflow (files in ROOT/mlruns unless MLFLOW_TRACKING_URI names a server) or trackio"
        " (a database in ROOT/trackio); each is an extra of the package with its name",
        json_schema_extra=FREE,
    )

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's run."""
        return self.root / self.experiment / stage


class OptimConfig(Strict):
    """An optimizer with a linear rise over `warmup_steps`, then a fall to `min_lr`, held for `cooldown_steps`."""

    kind: Literal["adamw", "muon", "sgd"] = Field(
        "adamw",
        description="AdamW; Muon, which makes the update of each weight matrix but the classifier's orthogonal and steps the"
        " rest by AdamW, at the same learning rate; or SGD with momentum, whose weight decay is added to the gradient",
    )
    lr: float = Field(
        gt=0,
        le=1e38,
        description="learning rate at the peak, for the global batch as configured (it is not scaled by it)",
    )
    min_lr: float = Field(0.0, ge=0, le=1e38, description="learning rate at the end of the fall")
    schedule: Literal["cosine", "cosine_7_16"] = Field(
        "cosine",
        description="the fall: half a cosine to min_lr, or cos(7/16 pi x the share of the steps), which ends at a fifth of lr"
        " (FixMatch, USB)",
    )
    warmup_steps: NonNegativeInt = Field(0, description="optimizer steps of the linear rise")
    cooldown_steps: NonNegativeInt = Field(0, description="last optimizer steps, all at min_lr")
    weight_decay: float = Field(
        0.05, ge=0, le=1e6, description="weight decay; vectors, A, tokens and position embeddings do not decay"
    )
    decay_also: tuple[str, ...] = Field(
        (),
        description="shell patterns of parameter names that decay though the rule exempts them, as some released recipes do: for"
        ' example ["*.A_log"]; a pattern that fits no parameter is refused',
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the two moments; the first is Muon's too"
    )
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW's term in the denominator")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's share of the last step's direction")
    nesterov: bool = Field(True, description="SGD looks ahead along its momentum")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a layer, divided by that of the layer above it; 1 = all alike"
    )
    unfreeze_every: PositiveInt | None = Field(
        None,
        description="gradual unfreezing: the top layer trains from step 0, and each layer below joins this many optimizer"
        " steps after the one above it; until then its learning rate is 0. null = all train from the start",
    )
    clip_norm: float = Field(0.0, ge=0, le=1e9, description="largest global norm of the gradient; 0 = no clipping")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.schedule == "cosine_7_16" and self.min_lr:
            raise ValueError(
                f"min_lr {self.min_lr} belongs to schedule=cosine; cosine_7_16 ends at {COSINE_7_16_END:.3f} of lr; leave it out"
            )
        if self.kind == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum; set momentum=0.9, or nesterov=false")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class EngineConfig(Strict):
    """How a stage is computed (by DeepSpeed).

    bf16 is autocast over fp32 weights: a scan whose A and step sizes are rounded to bf16 drifts.
    """

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what ZeRO cuts among the processes: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights (one"
        " process computes 3 as 2)",
        json_schema_extra=FREE,
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the forward and backward passes")
    micro_batch: PositiveInt | None = Field(
        None,
        description="largest number of samples of the first stream that a process computes at once; none = its whole share",
        json_schema_extra=FREE,
    )
    bucket_bytes: int = Field(
        64 * 2**20,
        gt=0,
        le=2**40,
        description="bytes of gradients that are reduced at once; small models gain from small buckets",
        json_schema_extra=FREE,
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the input of each block and compute the rest again in the backward pass",
        json_schema_extra=FREE,
    )
    offload_optimizer: bool = Field(
        False,
        description="keep master weights, moments and teacher in the host's memory (ZeRO 1 to 3): larger models, slower steps",
        json_schema_extra=FREE,
    )
    compile: bool = Field(
        False,
        description="use torch.compile: it costs a minute at every start; on a CPU eager is as fast or faster",
        json_schema_extra=FREE,
    )
    keep_whole: NonNegativeInt = Field(
        100_000,
        description="ZeRO 3: parameters of fewer elements stay whole on every process instead of being gathered",
        json_schema_extra=FREE,
    )
    sync_batch_norm: bool = Field(
        True,
        description="batch norms see the micro-batches of all processes, so that the result does not depend on their number;"
        " false: each process normalises by its own images, as the recipes of EfficientViM and VSSD do (256 images each)",
    )
    timeout_seconds: Seconds = Field(
        600.0,
        ge=1,
        description="seconds that a collective may take before a silent process counts as dead (exit 7)",
        json_schema_extra=FREE,
    )

    bind_cores: bool = Field(
        True,
        description="keep each process and its data workers to the CPUs of one socket, that of its GPU, if several processes"
        " share a node of several sockets; false: wherever the system puts them",
        json_schema_extra=FREE,
    )
    public_address: bool = Field(
        False,
        description="accept that several machines meet at an address of the internet; the ranks talk without a password",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs zero_stage 1, 2 or 3: at 0 there are no master weights beside the weights"
            )
        return self


def computed_stage(zero_stage: int, world_size: int) -> int:
    """Return the ZeRO stage that is computed: on one process, where nobody shares the weights, 3 is 2.

    DeepSpeed would keep the weights of ZeRO 3 without gaps there, at addresses that cuDNN cannot read four numbers from.
    """
    return 2 if zero_stage == 3 and world_size == 1 else zero_stage


class LoopConfig(Strict):
    """How long to train, and how often what happens; all in optimizer steps."""

    steps: PositiveInt = Field(description="optimizer steps of the whole run")
    global_batch: int = Field(
        gt=0, le=2**24, description="samples of the stage's first stream per optimizer step, over all processes"
    )
    log_every: PositiveInt = Field(50, description="steps between two log lines", json_schema_extra=FREE)
    eval_every: PositiveInt | None = Field(
        None, description="steps between two validations; none = only after the last step", json_schema_extra=FREE
    )
    select: Literal["last", "best"] = Field(
        "last",
        description="which state of the run is exported: the last, or that of the best validation (by the exported network's"
        " top-1, equal ones by their loss; stage 1: by val/loss). The classifier that a stage starts from counts as step 0, and"
        " stays only if all later states are less accurate. `best` needs validation images and"
        " eval_every, and keeps a copy of the weights",
    )
    patience: PositiveInt | None = Field(
        None,
        description="validations in a row without a better one after which the run ends before `steps`; none = never",
    )
    save_every: PositiveInt = Field(500, description="steps between two checkpoints", json_schema_extra=FREE)
    keep_checkpoints: PositiveInt = Field(
        2, description="how many of the newest checkpoints are kept", json_schema_extra=FREE
    )
    keep_every: PositiveInt | None = Field(
        None,
        description="checkpoints of multiples of this step are kept for ever; none = no such",
        json_schema_extra=FREE,
    )
    background_save: bool = Field(
        True, description="write checkpoints in a thread while training continues", json_schema_extra=FREE
    )
    time_limit_minutes: float | None = Field(
        None,
        gt=0,
        le=10**7,
        description="minutes after which this start saves and ends with exit code 75, as after a signal; none = no limit",
        json_schema_extra=FREE,
    )
    on_divergence: Literal["stop", "rewind"] = Field(
        "stop",
        description="on NaN, Inf or a spike: stop (exit 6), or rewind to the newest checkpoint before it and leave the"
        " first bad step's data out for good",
        json_schema_extra=FREE,
    )
    max_rewinds: NonNegativeInt = Field(3, description="rewinds of a run before it stops", json_schema_extra=FREE)
    on_alarm: Literal["note", "stop"] = Field(
        "note",
        description="on an alarm of the stage (collapse of the pseudo-labels): note an incident for the report, or stop (exit 6)",
        json_schema_extra=FREE,
    )
    spike_mads: float | None = Field(
        None,
        gt=0,
        le=10**9,
        description="a logged loss this many median absolute deviations above the median of the recorded ones is a divergence;"
        " none = spikes are not looked for",
        json_schema_extra=FREE,
    )
    max_skipped_steps: PositiveInt = Field(
        1,
        description="this many updates skipped between two log lines are a divergence; fewer are an incident in the report."
        " ZeRO 1 to 3 skip an update whose gradient is not finite; ZeRO 0 cannot skip",
        json_schema_extra=FREE,
    )
    vote_every: PositiveInt = Field(
        4,
        description="steps between two votes of the processes on stopping (one tiny all-reduce)",
        json_schema_extra=FREE,
    )

    @property
    def compares(self) -> bool:
        """Whether validations are compared with one another."""
        return self.select == "best" or self.patience is not None

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if self.compares and self.eval_every is None:
            key = "select=best" if self.select == "best" else f"patience={self.patience}"
            raise ValueError(
                f"{key} compares validations, but eval_every is null; give the steps between two validations"
            )
        return self
