"""The teacher's rule and the pseudo-labels' rule, as values (torch-free)."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import NonNegativeInt, Strict


class LyapEMAConfig(Strict):
    """The teacher's rule. The defaults are ours, the presets are those of Semi-ViM's sources.

    The supplement names gamma and lambda but gives no values. The released code has another rule, with values.
    """

    preset: Literal["none", "supplement", "released"] = Field(
        "none",
        description="supplement: eq. 3-5 as printed (lyap, l2, offset 0, no clamp, no warm-up), for which gamma and pull must be"
        " given; released: the rule of the released code, sigmoid(-gamma (V - V before)) with rollback, gamma 1 and pull 0"
        " unless given",
    )
    mode: Literal["ema", "lyap", "guarded"] = Field(
        "guarded",
        description="how the decay is decided: constant or a ramp (ema), by the discrepancy (lyap), or by the discrepancy with"
        " the guard that keeps V from growing (guarded)",
    )
    signal: Literal["discrepancy", "energy"] = Field(
        "discrepancy",
        description="what the decay follows: |s-t| (the supplement), or the fall of V in the student's step (the README and the"
        " released code)",
    )
    signal_after: NonNegativeInt = Field(
        0,
        description="modes lyap and guarded: first updates whose decay is base_decay, before it follows the signal (released"
        " code: 1)",
    )
    rollback: bool = Field(
        False,
        description="mode lyap: where a move of the teacher does not lower V, the teacher stays, and from then on the learning"
        " rate is halved and gamma grows by half (released code)",
    )
    norm: Literal["l2", "rms", "relative", "lag"] = Field(
        "lag", description="how |s-t| is measured; lag = in mean student steps, without dimension"
    )
    gamma: float = Field(0.01, ge=0, le=1e9, description="sensitivity of the decay to the discrepancy")
    base_decay: float = Field(
        0.97, gt=0, lt=1, description="decay at no discrepancy (0.5 = the supplement); in mode ema, the decay"
    )
    final_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="mode ema: the decay after ramp_steps, reached from base_decay by half a cosine; none = no ramp",
    )
    ramp_steps: NonNegativeInt = Field(
        0, description="mode ema: optimizer steps of the ramp to final_decay; 0 = no ramp"
    )
    min_decay: float = Field(0.0, ge=0, lt=1, description="lower bound of the decay in the modes lyap and guarded")
    max_decay: float = Field(0.999, gt=0, le=1, description="upper bound of the decay in the modes lyap and guarded")
    pull: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="lambda: share of the way to the teacher that the student moves per step, not scaled by lr; or the weight"
        " of |s-t|^2 in the loss (pull_as)",
    )
    pull_as: Literal["step", "loss"] = Field(
        "step",
        description="how the pull acts: beside the optimizer's step (the supplement), or by the gradient of lambda |s-t|^2, which"
        " the optimizer scales (the released code)",
    )
    warmup_steps: NonNegativeInt = Field(
        20, description="first updates k, with a decay of (1+k)/(10+k) at most and without the guard"
    )
    radius_steps: float = Field(
        50.0, gt=0, le=1e9, description="mode guarded: smallest radius of the trust region, in mean student steps"
    )
    buffers: Literal["copy", "average"] = Field(
        "copy", description="the teacher's running statistics: the student's, or averaged with the same decay"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if preset not in PRESETS:
            return values
        missing = [name for name in ("gamma", "pull") if name not in values]
        if missing and preset == "supplement":
            raise ValueError(f"preset supplement needs {' and '.join(missing)}: the source prints no value for it")
        for name, decided in PRESETS[preset].items():
            if values.get(name, decided) != decided:
                raise ValueError(f"{name} = {values[name]!r}: preset {preset} decides it ({decided!r}); leave it out")
        return {"gamma": 1.0, **values, **PRESETS[preset]}

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
            raise ValueError(
                f"final_decay works in mode ema only; in mode {self.mode} the discrepancy decides the decay"
            )
        if self.rollback and self.mode != "lyap":
            raise ValueError(f"rollback works in mode lyap only, not in mode {self.mode}; leave it out")
        return self


# With base_decay 0.5, sigmoid(gamma |s - t|) lies in [0.5, 1) without a clamp.
_UNBOUNDED = {"mode": "lyap", "norm": "l2", "base_decay": 0.5, "min_decay": 0.0, "max_decay": 1.0, "warmup_steps": 0}
# What each preset decides.
PRESETS: dict[str, dict[str, Any]] = {
    "supplement": _UNBOUNDED | {"signal": "discrepancy", "signal_after": 0, "rollback": False, "pull_as": "step"},
    "released": _UNBOUNDED | {"signal": "energy", "signal_after": 1, "rollback": True, "pull_as": "loss"},
}


class PseudoLabelRule(Strict):
    """How a teacher's predictions become pseudo-labels, and which of them are accepted."""

    kind: Literal["hard", "soft"] = Field("hard", description="the most probable class, or the teacher's probabilities")
    temperature: float = Field(1.0, gt=0, le=1e6, description="temperature of the teacher's softmax; below 1 sharpens")
    threshold: float = Field(
        0.7,
        ge=0,
        le=1,
        description="confidence from which a pseudo-label is accepted (tau), for the thresholds fixed and class_balanced",
    )
    thresholds: Literal["fixed", "class_balanced", "softmatch", "freematch"] = Field(
        "fixed",
        description="fixed: pseudo.threshold for all classes; class_balanced: lower for classes that are rare among confident"
        " predictions (FlexMatch); softmatch: no threshold, a weight that falls below the mean confidence; freematch: the mean"
        " confidence, lower for classes that are rarely predicted",
    )
    sigmas: float = Field(
        2.0,
        gt=0,
        le=1000,
        description="thresholds=softmatch: how steeply the weight falls, in 1 / standard deviation of the confidence; the paper's"
        " equation has 1, its released code 2",
    )
    momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the running means of the predictions that remains after a step (SoftMatch and FreeMatch: 0.999);"
        " null = the first 100 steps weigh alike, then 0.99",
    )
    alignment: Literal["none", "uniform", "labelled"] = Field(
        "none",
        description="distribution alignment: moves the mean prediction to uniform, or to the classes' shares of the labels",
    )
    aligned: Literal["targets", "confidence"] = Field(
        "targets",
        description="what the alignment changes: the pseudo-labels and their confidence, or the confidence alone (SoftMatch)",
    )


class BalancedHeadConfig(Strict):
    """ABC's auxiliary balanced classifier: a second head, which is evaluated and exported in place of the first."""

    weight: float = Field(1.0, gt=0, le=1e6, description="weight of the balanced head's two losses")
    threshold: float = Field(
        0.95, ge=0, le=1, description="confidence of the balanced head from which a strong view learns its prediction"
    )
    targets: Literal["soft", "hard"] = Field(
        "soft", description="what the strong view learns: the probabilities (ABC), or the most probable class (USB)"
    )
