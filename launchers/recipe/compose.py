"""The values of the three configs, and the reason for each of them (torch-free)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from launchers.recipe import networks, rules
from launchers.recipe.choice import Choice, Stage
from launchers.recipe.look import Look
from launchers.recipe.neighbours import ColourTest, FlipTest
from launchers.recipe.networks import Family


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The values of one stage's config.

    Attributes:
        values: Plain values, as in the file.
        reasons: Key of `values` -> sentences.
    """

    values: dict[str, Any]
    reasons: dict[str, tuple[str, ...]]


def compose(
    name: str,
    data: Mapping[str, Any],
    look: Look,
    flips: FlipTest,
    colours: ColourTest,
    *,
    gpu: bool,
    family: Choice,
    network: Choice,
    steps: Mapping[Stage, Choice],
    micro: Mapping[Stage, Choice],
) -> dict[Stage, Draft]:
    """Write the values of all stages.

    Args:
        name: The experiment.
        data: `train`, and what there is of `split`, `validation` and `test`.
        look: The images.
        flips: Whether flips are harmless.
        colours: Whether colours tell the classes.
        gpu: Whether the machine has a GPU.
        family: The kind of model, which decides the stages.
        network: The model of that kind, with its image size.
        steps: Steps of each stage.
        micro: Micro-batch of each stage; value None = the whole share.
    """
    chosen_family = cast(Family, family.value)
    augment = rules.views(look, bool(flips.harmless), colours)
    mamba, width = chosen_family == "vision_mamba", network.value.get("embed_dim", networks.BASE_WIDTH)
    balance = rules.sampling(look)
    flip = f"Horizontal flips {'are' if flips.harmless else 'are not'} used: {flips.why}."
    pixels = {"mean": list(look.mean), "std": list(look.std)}
    of_pixels = f"mean and std are those of the images, {'grey' if look.is_grey else 'in colour'}."
    drafts: dict[Stage, Draft] = {}
    for stage in networks.stages(chosen_family):
        supervised = stage != "arm"
        own = dict(data) if supervised else {k: v for k, v in data.items() if k != "test"}
        number, size = steps[stage].value, rules.batch(stage, look, gpu)
        guessed = stage == "distill" and rules.guess(look)
        # Half of a step's loss is that of guessed labels, so a step counts as one of twice the labelled images.
        rate = networks.learning_rate(chosen_family, stage, size.value * (2 if guessed else 1), width, number)
        work = rules.passes(stage, look, size.value)
        chosen = rules.selection(stage, look, number, work) if supervised else rules.pretraining_selection(look, number)
        values: dict[str, Any] = {"run": {"experiment": name}}
        reasons: dict[str, tuple[str, ...]] = {}
        if stage == "semi" or (stage == "distill" and mamba):
            values["init_from"] = "arm" if stage == "distill" else "distill"
        values["data"] = own | pixels | ({"loader": {"sampling": balance.value}} if supervised else {})
        reasons["data"] = (of_pixels, *([f"Sampling is {balance.value}: {balance.why}."] if supervised else []))
        if stage == "arm":
            values["model"] = network.value
            values["decoder"] = {"width": network.value["embed_dim"], "depth": 2, "num_heads": 4}
            values["augment"] = _without_colours(augment["plain"].value)
            if "patience" in chosen.value:
                values["select_by"] = "linear"
        if stage == "distill":
            values["model"] = network.value | ({"cls_token": "none", "pool": "mean"} if mamba else {})
            values["augment"] = augment["plain"].value
        if guessed:
            values["guess"] = {"ratio": rules.GUESS_RATIO}
            reasons["guess"] = (
                f"Most classes have at most {rules.FEW_LABELS} labels: a simple learner first guesses those of the other images.",
            )
        if stage == "semi":
            values |= {"weak": augment["weak"].value, "strong": augment["strong"].value}
            values["labelled"] = augment["plain"].value
            reasons["weak"] = (f"Views: {augment['weak'].why}.", flip)
            reasons["strong"] = (f"Views: {augment['strong'].why}.",)
            values |= _pseudo(look, reasons)
            average = rules.teacher(number)
            values["ema"], reasons["ema"] = average.value, (f"{average.why}.",)
        if "model" in values:
            reasons["model"] = (f"{family.why}.", f"{network.why}.")
        if "augment" in values:
            reasons["augment"] = (f"Views: {augment['plain'].why}.", flip)
        solver = networks.optimizer(chosen_family)
        optim: dict[str, Any] = {"kind": solver.value, "lr": rate.value, "warmup_steps": max(1, number // 20)}
        if mamba:
            optim |= {"betas": [0.9, 0.95]} if stage == "arm" else {"layer_decay": 0.8}
        values["optim"], reasons["optim"] = optim | {"clip_norm": 3.0}, (f"{solver.why}: {rate.why}.",)
        if micro[stage].value is not None:
            values["engine"], reasons["engine"] = {"micro_batch": micro[stage].value}, (f"{micro[stage].why}.",)
        values["loop"] = {
            "steps": number,
            "global_batch": size.value,
            "log_every": max(1, number // 100),
            "save_every": max(1, number // 4),
            **chosen.value,
        }
        reasons["loop"] = (f"Steps: {steps[stage].why}.", *(f"{c.why}." for c in (size, chosen) if c.why))
        drafts[stage] = Draft(values=values, reasons=reasons)
    return drafts


def _without_colours(augment: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 1 predicts pixels, so their colours stay as they are."""
    return {key: value for key, value in augment.items() if key != "color_jitter"}


def _pseudo(look: Look, reasons: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    if not look.unlabelled:
        reasons["pseudo"] = (
            "There are no unlabelled images, so this stage only trains on with labels and an average.",
        )
        return {"pseudo": {"weight": 0.0}}
    reasons["pseudo"] = (
        f"{look.unlabelled} unlabelled images; {rules.UNLABELLED_RATIO} in a step for each labelled one.",
    )
    return {"pseudo": dict(rules.PSEUDO), "unlabelled_ratio": rules.UNLABELLED_RATIO, "label_smoothing": 0.0}
