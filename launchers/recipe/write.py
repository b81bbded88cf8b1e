"""Write the configs of a chain for a dataset: look, test, time a step, apply the rules, and never overwrite what was edited."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from launchers.recipe import neighbours, networks, rules, text
from launchers.recipe.choice import Choice, Stage
from launchers.recipe.compose import Draft, compose
from launchers.recipe.look import Look, look_at, sampled
from launchers.recipe.networks import Family
from launchers.recipe.rules import Budget
from pipeline.config import find_config, nearest, packaged_configs, validate
from pipeline.datasets.manifest import HEADER
from pipeline.errors import ConfigError, EnvironmentProblem
from pipeline.files import replace_text
from pipeline.streaming.config import AugmentConfig
from stages import SPECS
from stages.check import open_data, written_by
from stages.configs.base import StageConfig

if TYPE_CHECKING:  # it imports torch
    from launchers.recipe.timing import Timing

_Views = Sequence[tuple[AugmentConfig, int]]  # the augmentations of a step, each with its views per sample

BUDGET = "30m"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "T": 1.0}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a recipe is asked for.

    Attributes:
        name: Of the configs and the experiment.
        train: Folders of the training data.
        split: The split file, or None.
        validation: Folder of a validation set, or None.
        test: Folder of a test set, or None.
        budget: Time for the whole chain, such as 30m or 2h; or its work, such as 4T for 4 * 10^12 FLOPs.
        flips: Whether to use flips; `test` asks the images.
        model: The kind of model; `auto` = by the rule `networks.family`.
        again: Whether to write configs that exist already; edited ones are kept beside the new ones.
    """

    name: str
    train: tuple[Path, ...]
    split: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    budget: str = BUDGET
    flips: Literal["yes", "no", "test"] = "test"
    model: Family | Literal["auto"] = "auto"
    again: bool = False


def order_for(name: str, budget: str | None) -> Order | None:
    """Return the order for data that lie where README puts them, in data/NAME; None if there are none.

    Args:
        name: Name of the chain.
        budget: As typed, or None.

    Raises:
        ConfigError: The name cannot be a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"the name {name[:60]!r} must begin with a letter or a digit and have only letters, digits, '.', '_' and '-',"
            " such as mine"
        )
    folder = Path("data") / name
    train = folder / "train" if (folder / "train" / HEADER).is_file() else folder
    if not (train / HEADER).is_file():
        return None
    split, test = folder / "split.json", folder / "test"
    return Order(
        name=name,
        train=(train,),
        split=split if split.is_file() else None,
        test=test if (test / HEADER).is_file() else None,
        budget=budget or BUDGET,
    )


def order_for_chain(name: str, budget: str | None) -> Order | None:
    """Return the order for a chain that has no configs; None if it has some.

    Args:
        name: Name of the chain.
        budget: As typed, or None.

    Raises:
        ConfigError: There are neither configs nor data of that name.
    """
    if any(find_config(path).is_file() for path in paths(name).values()):
        return None
    order = order_for(name, budget)
    if order is None:
        named = {
            path.stem for stage in SPECS for path in (*Path("configs", stage).glob("*.yaml"), *packaged_configs(stage))
        }
        named |= {
            path.parent.relative_to("data").parts[0]
            for part in ("", "*/")
            for path in Path("data").glob(f"*/{part}{HEADER}")
        }
        raise ConfigError(
            f"chain {name}: there are no configs/STAGE/{name}.yaml, and no data at data/{name}/train to write them for;"
            f" `python -m pipeline.data convert` makes such data; names like it: {', '.join(nearest(name, sorted(named))[:5])}"
        )
    return order


def has_budget(names: str, budget: str) -> bool:
    """Whether a recipe has written the configs of these chains with this budget."""
    for name in names.split(","):
        written = [path.read_text(errors="replace") for path in paths(name).values() if path.is_file()]
        told = [found[1] for text in written if (found := re.search(r"^# .* --budget (\S+)$", text, re.MULTILINE))]
        if not told or len(told) < len(written) or any(read_budget(each) != read_budget(budget) for each in told):
            return False
    return True


def paths(name: str) -> dict[Stage, Path]:
    """Return the config file of each stage."""
    return {stage: Path("configs") / stage / f"{name}.yaml" for stage in networks.stages("vision_mamba")}


def read_budget(budget: str) -> Budget:
    """Convert 90s, 30m or 1.5h to seconds, and 4T to FLOPs.

    Raises:
        ConfigError: It is no such time or work.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smhT])", budget)
    if not found or not float(found[1]):
        raise ConfigError(
            f"budget {budget[:40]!r}: give a number and s, m or h, such as 30m or 1.5h; or T for 10^12 FLOPs, such as 4T"
        )
    return Budget(float(found[1]) * _UNITS[found[2]], counted=found[2] == "T")


def write(order: Order) -> list[Path]:
    """Write the configs of all three stages and say what they hold.

    Returns:
        The files that were written; none if all exist and `again` is false.

    Raises:
        PipelineError: The data cannot be opened, or a value is wrong.
    """
    budget, files = read_budget(order.budget), paths(order.name)
    there = [path for path in files.values() if path.is_file()]
    if there and not order.again:
        print(f"kept: {', '.join(map(str, there))}; --again writes them anew and keeps what was edited")
        return []
    drafts = draft(order, budget)
    written = [files[stage] for stage in drafts]
    try:
        for path in there:
            _clear(path)
        for stage, found in drafts.items():
            files[stage].parent.mkdir(parents=True, exist_ok=True)
            replace_text(files[stage], _file(order, stage, found))
    except OSError as error:
        raise EnvironmentProblem(
            f"{error.filename or written[0]} cannot be written ({error.strerror}); run this where you may write"
        ) from None
    print(f"wrote {', '.join(map(str, written))}; edit them as you like, a rerun keeps them")
    return written


def draft(order: Order, budget: Budget) -> dict[Stage, Draft]:
    """Look at the data, time a step of each stage and apply the rules.

    Args:
        order: What is asked for.
        budget: For the whole chain.
    """
    data = _data(order)
    # The rest of this config is only there to open the data as a stage does.
    opened = open_data(_validated("distill", {"run": {"experiment": order.name}, "data": data,
                                              "model": {"name": "vim_nano"}, "optim": {"lr": 1e-3},
                                              "loop": {"steps": 1, "global_batch": 1}}, order))  # fmt: skip
    look = look_at(opened)
    print(in_words(look))
    if not look.validation:
        folders, file = shlex.join(map(str, order.train)), Path("data", order.name, "split.json")
        print(
            f"note: all {look.labels} labels are trained on, and without validation images nothing is chosen or calibrated;"
            f" `python -m pipeline.data split {folders} --validation-per-class 10 --out {shlex.quote(str(file))}` and --split"
            f" {shlex.quote(str(file))} here hold some out"
        )
    known = np.concatenate([opened.subsets.labelled, opened.subsets.validation])
    labelled = neighbours.labelled_pictures(opened.manifest, np.sort(known))
    flips = neighbours.choose_flips(order.flips, neighbours.compare_flips(*labelled), look.is_drawn)
    colours = neighbours.ColourTest(False, "not tested")
    print(f"flips: {flips.why}")
    if look.is_drawn and not look.is_grey:
        colours = neighbours.compare_colours(*labelled)
        print(f"colours {'stay' if colours.telling else 'change'}: {colours.why}")
    from launchers.recipe import timing  # imports torch

    gpu = timing.has_gpu()
    pictures = sampled(opened.manifest, np.arange(opened.manifest.num_samples), 32)
    family = networks.family(look, gpu, order.model)
    stages = networks.stages(family.value)
    compose_with = partial(compose, order.name, data, look, flips, colours, gpu=gpu, family=family)

    def measure(config: StageConfig, pending: Mapping[Path, StageConfig], drawn: _Views) -> "Timing":
        classes = len(opened.manifest.classes)
        if budget.counted:
            return timing.count_stage(config, classes, pending)
        return timing.time_stage(config, classes, pending, pictures, drawn)

    for network in networks.candidates(family.value, rules.image_sizes(look, gpu)):
        batches, costs, micro = _measured(partial(compose_with, network=network), stages, order, measure)
        numbers = rules.steps(look, batches, costs, budget)
        if rules.pays_for(numbers, look, batches):
            break
    for stage in stages:
        print(f"{stage}: {numbers[stage].value} steps, {numbers[stage].why}")
    total = sum(numbers[stage].value * costs[stage] for stage in stages)
    if total > 1.2 * budget.for_steps:
        minutes = (total / rules.USABLE + rules.FIXED_SECONDS) / 60
        least = f"{total:.2g} * 10^12 FLOPs" if budget.counted else f"about {minutes:.1f} min here, starts included"
        print(f"note: the least of every stage takes {least}, more than the budget {order.budget}")
    drafts = compose_with(network=network, steps=numbers, micro=micro)
    for stage in stages:
        _validated(stage, drafts[stage].values, order)
    return drafts


def _measured(
    compose_with: Callable[..., dict[Stage, Draft]],
    stages: Sequence[Stage],
    order: Order,
    measure: Callable[..., "Timing"],
) -> tuple[dict[Stage, int], dict[Stage, float], dict[Stage, Choice]]:
    """Measure a step of each stage of one network; returns their batches, costs and micro-batches."""
    unknown, nothing = (dict.fromkeys(stages, Choice(value, "")) for value in (rules.LEAST_STEPS, None))
    first = compose_with(steps=unknown, micro=nothing)
    pending: dict[Path, StageConfig] = {}
    batches: dict[Stage, int] = {}
    costs: dict[Stage, float] = {}
    micro: dict[Stage, Choice] = {}
    for stage in stages:
        config = _validated(stage, first[stage].values, order)
        measured = measure(config, pending, _drawn(first[stage].values))
        pending |= written_by(config)
        batches[stage], costs[stage] = config.loop.global_batch, measured.cost
        micro[stage] = rules.micro_batch(batches[stage], measured.bytes_per_sample, measured.free)
    return batches, costs, micro


def in_words(look: Look) -> str:
    """Say in one line what the images are."""
    kind = "drawn or scanned" if look.is_drawn else "photographs"
    colour = "grey" if look.is_grey else "in colour"
    present = sum(count > 0 for count in look.labelled)
    return (
        f"{look.images} images of about {look.width} x {look.height} px, {kind}, {colour}; {look.labels} labels of {present}"
        f" classes to train on (imbalance {look.imbalance:.3g}), {look.validation} for validation, {look.unlabelled} unlabelled"
    )


def _data(order: Order) -> dict[str, Any]:
    train = [str(folder) for folder in order.train]
    given = {"split": order.split, "validation": order.validation, "test": order.test}
    data: dict[str, Any] = {"train": train[0] if len(train) == 1 else train}
    return data | {key: str(path) for key, path in given.items() if path is not None}


def _drawn(values: dict[str, Any]) -> _Views:
    """Return the augmentations of a step with their views per sample of the first stream."""
    if "augment" in values:
        guessed = values.get("guess", {}).get("ratio", 0)
        return [(AugmentConfig.model_validate(values["augment"]), 1 + guessed)]
    ratio = values.get("unlabelled_ratio", 0)
    counts = {"labelled": 1, "weak": ratio, "strong": ratio}
    return [(AugmentConfig.model_validate(values[key]), number) for key, number in counts.items() if number]


def _validated(stage: Stage, values: dict[str, Any], order: Order) -> StageConfig:
    return validate(SPECS[stage].config, values, f"the recipe of {order.name}")


def _file(order: Order, stage: Stage, draft: Draft) -> str:
    pretrained = " of stage 1's backbone" if "init_from" in draft.values else ""
    title = {
        "arm": "Stage 1: ARM pretraining of a Vision Mamba on all images; it reads no labels.",
        "distill": f"Stage 2: supervised training{pretrained} on the labelled images"
        + (", and on guessed labels of the others." if "guess" in draft.values else "."),
        "semi": "Stage 3: semi-supervised fine-tuning of stage 2's model, with a teacher (Semi-ViM).",
    }[stage]
    given = {"split": order.split, "validation": order.validation, "test": order.test, "budget": order.budget}
    options = " ".join(f"--{option} {value}" for option, value in given.items() if value is not None)
    remake = f"python -m launchers recipe {order.name} --train {' '.join(map(str, order.train))} {options}"
    head = [
        title,
        "",
        "Written for these images and this machine by",
        f"    {remake}",
        "Edit it as you like: a rerun keeps it. Every key: docs/reference/config.md",
        f"Command   make chain NAME={order.name}      (this stage alone: make stage-{SPECS[stage].number}"
        f" CONFIG=configs/{stage}/{order.name}.yaml)",
        "Seed      run.seed, 0 by default",
        "",
    ]
    return text.render(head, draft.values, draft.reasons)


def _clear(path: Path) -> None:
    """Take an old file away; what a person has edited is kept beside it, and said."""
    if text.edited(path.read_text(encoding="utf-8")):
        print(f"{path} was edited: it is kept as {text.set_aside(path)}")
    else:
        path.unlink()
