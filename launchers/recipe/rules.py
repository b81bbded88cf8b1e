"""The rules of a recipe: from what the images are and what the machine can do to the values of the configs (see networks.py too).

Each rule is one function, with its reason in words for the config file. The constants are measured where a study is named,
and otherwise ours; the person edits the file that is written. A rule sees no test image.
"""

import math
import statistics
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from launchers.recipe.choice import Choice, Stage
from launchers.recipe.look import Look
from launchers.recipe.neighbours import ColourTest

SIDES_CPU, SIDES_GPU = (32, 64), (32, 64, 128, 192)
BATCHES: dict[Stage, tuple[int, int]] = {"arm": (64, 256), "distill": (32, 128), "semi": (16, 64)}  # CPU, GPU
# A stage reads its larger stream at most so many times; stage 2 a third as often where stage 3 learns from unlabelled images.
EPOCHS: dict[Stage, int] = {"arm": 300, "distill": 200, "semi": 100}
ENOUGH_STEPS = 1000  # steps of stage 2 from which a larger network learns more than a smaller one with more steps
LEAST_STEPS, MOST_STEPS = 100, 100_000
UNLABELLED_RATIO = 4
FEW_LABELS = 4  # labels per class (the median of the classes) up to which guessed labels help stage 2
GUESS_RATIO = 3
MOST_GUESSED = 20_000  # unlabelled images up to which a simple learner reads all pixels in a minute or two

FIXED_SECONDS = 60.0  # starts of three stages, exports, report
USABLE = 0.85  # share of the rest that goes to steps; the others are validations and saves
VALIDATING = 0.1  # validations take at most this share of the steps' work
ENOUGH_VALIDATION = 50  # images from which the best validation says more than the last step
LONGEST_HORIZON = 10_000.0  # steps that the teacher averages over at most (decay 0.9999)
# Above FixMatch in all cells tried (docs/recipe.md).
PSEUDO = {"thresholds": "softmatch", "alignment": "uniform", "weight": 1.0}
ENOUGH_FOR_PROBE = 200  # images from which a linear probe can say that stage 1 has stopped paying
MEMORY_SHARE = 0.6  # a step may use this share of the free memory


def image_sizes(look: Look, gpu: bool) -> tuple[Choice, ...]:
    """Choose the side of the square that the model sees: the least that is not below the images', as the machine allows.

    A larger side costs time and shows nothing; a smaller one loses detail. A CPU stays at 64 pixels. The second choice, if
    there is one, is the next smaller side, for a budget that does not pay for enough steps of the first (`pays_for`). Icons of
    64 px with 10 labels a class were recognised better in 440 steps at 32 px than in 110 at 64 px (docs/recipe.md).
    """
    sides = SIDES_GPU if gpu else SIDES_CPU
    side = next((s for s in sides if s >= 0.85 * look.side), sides[-1])
    limit = f", the largest for a {'GPU' if gpu else 'CPU'} here" if side < 0.85 * look.side else ""
    images = f"the images are {look.width} x {look.height} px (width x height, medians)"
    first = Choice(side, f"{side} px{limit}: {images}")
    smaller = [
        Choice(s, f"{s} px: {images}, but the budget pays for few steps at {side} px") for s in sides if s < side
    ]
    return (first, *smaller[-1:])


def batch(stage: Stage, look: Look, gpu: bool) -> Choice:
    """Choose the global batch: that of the stage; in stage 1 it is halved until the images fill it.

    Few labels do not make the batch smaller: each image then occurs several times, in views of its own, and batch
    statistics need the number. Images with guessed labels take the place of half of the labelled ones.
    """
    wanted = value = BATCHES[stage][gpu]
    if stage == "distill" and guess(look):
        return Choice(value // 2, f"batch {value // 2}, and {GUESS_RATIO} images with guessed labels for each")
    while stage == "arm" and value > max(8, look.images):
        value //= 2
    return Choice(value, f"batch {value}" + (f": only {look.images} images" if value < wanted else ""))


def shares(look: Look, among: Collection[Stage]) -> dict[Stage, float]:
    """Divide the time among the stages.

    With stage 1, the more of the images are unlabelled, the more goes to stages 1 and 3; with guessed labels stage 2 learns from
    them too, and gets what stage 3 would get. Without stage 1, stage 2 learns all features, in steps that cost a third of those
    of stage 3, and gets three quarters (docs/recipe.md); with guessed labels a third, since so few labels are soon learnt.
    """
    if "arm" not in among:
        semi = 2 / 3 if guess(look) else 1 / 4
        return {"distill": 1 - semi, "semi": semi}
    unlabelled = look.unlabelled / (look.unlabelled + look.labels)
    arm, semi = 0.25 + 0.15 * unlabelled, 0.3 + (0 if guess(look) else 0.15 * unlabelled)
    return {"arm": arm, "distill": 1 - arm - semi, "semi": semi}


def epoch_limit(stage: Stage, look: Look, global_batch: int) -> int:
    """Count the steps of the most epochs of a stage; more would repeat the images too often to pay.

    The epochs of stage 2 beside unlabelled images are from single runs (docs/recipe.md).
    """
    images = {
        "arm": look.images / global_batch,
        "distill": max(look.labels, look.unlabelled / GUESS_RATIO if guess(look) else 0) / global_batch,
        "semi": max(look.labels / global_batch, look.unlabelled / (UNLABELLED_RATIO * global_batch)),
    }[stage]
    epochs = EPOCHS[stage] / 3 if stage == "distill" and look.unlabelled else EPOCHS[stage]
    return round(min(MOST_STEPS, max(3 * LEAST_STEPS, epochs * images)))


class Budget(NamedTuple):
    """What a chain may cost.

    Attributes:
        amount: Seconds for the whole chain, or 10^12 FLOPs for its steps.
        counted: Whether it is FLOPs, which give the same steps on every machine and beside any other work.
    """

    amount: float
    counted: bool = False

    @property
    def for_steps(self) -> float:
        """The part of it that steps may use."""
        return self.amount if self.counted else max(0.0, USABLE * (self.amount - FIXED_SECONDS))


def steps(look: Look, batches: dict[Stage, int], costs: dict[Stage, float], budget: Budget) -> dict[Stage, Choice]:
    """Choose the steps of all stages, so that they take the budget together.

    Args:
        look: The images.
        batches: Global batch of each stage.
        costs: Of a step of each stage: seconds as they were timed, or 10^12 FLOPs.
        budget: For the whole chain, in the same unit.

    A stage gets its share of the time, at most its epochs, and what it leaves goes to the others. Each has at least
    LEAST_STEPS.
    """
    limits = {stage: epoch_limit(stage, look, batches[stage]) for stage in batches}
    left, open_shares = budget.for_steps, shares(look, batches)
    chosen: dict[Stage, int] = {}
    while open_shares:  # a stage that reaches its epochs frees time for those that are still open
        total = sum(open_shares.values())
        wanted = {stage: left * share / total / costs[stage] for stage, share in open_shares.items()}
        full = [stage for stage, number in wanted.items() if number >= limits[stage]]
        for stage in full or list(wanted):
            chosen[stage] = max(LEAST_STEPS, limits[stage] if full else int(wanted[stage]))
            left -= chosen[stage] * costs[stage]
            del open_shares[stage]
        if not full:
            break
    return {
        stage: Choice(_round(chosen[stage]), _of_steps(stage, look, batches, costs, chosen, limits, budget.counted))
        for stage in batches
    }


def pays_for(steps: Mapping[Stage, Choice], look: Look, batches: Mapping[Stage, int]) -> bool:
    """Whether a network has ENOUGH_STEPS in stage 2 and half as many in stage 3, or all that their most epochs allow.

    In single trials with 4 glyphs a class, 1400 steps of efficientvim_mini reached more than 2095 of efficientvim_nano. With 10 a
    class and in equal work, its 527 steps reached less (docs/recipe.md).
    """
    enough: dict[Stage, int] = {"distill": ENOUGH_STEPS, "semi": ENOUGH_STEPS // 2}
    return all(
        steps[stage].value >= min(number, _round(epoch_limit(stage, look, batches[stage])))
        for stage, number in enough.items()
    )


def _round(number: int) -> int:
    """Round down to two digits, so that timing again gives the same number more often."""
    scale = 10 ** max(0, len(str(number)) - 2)
    return number // scale * scale


def _of_steps(
    stage: Stage,
    look: Look,
    batches: dict[Stage, int],
    costs: dict[Stage, float],
    chosen: dict[Stage, int],
    limits: dict[Stage, int],
    counted: bool,
) -> str:
    drawn = _round(chosen[stage]) * batches[stage]
    seen = {"arm": look.images, "distill": look.labels, "semi": look.labels}[stage]
    cost = _round(chosen[stage]) * costs[stage]
    work = (
        f"{cost:.2g} * 10^12 FLOPs"
        if counted
        else f"about {cost / 60:.1f} min at {costs[stage]:.3f} s a step as timed here"
    )
    why = "its most epochs" if chosen[stage] >= limits[stage] else "its share of the budget"
    why = "the least" if chosen[stage] == LEAST_STEPS else why
    return f"{work}, {drawn / max(1, seen):.0f} epochs: {why}"


def views(look: Look, flips: bool, colours: ColourTest) -> dict[str, Choice]:
    """Choose the augmentation by the kind of images: `plain` (stages 1 and 2), `weak` and `strong` (stage 3).

    Drawn and scanned images are turned, scaled, sheared and shifted on their ground, and keep nearly all of their area,
    since a part of a sign is another sign. Photographs are cropped, and their strong views have RandAugment. Colours change
    only where there are colours, and on drawn images only where they do not tell the classes; light changes those of photographs.
    """
    flip = 0.5 if flips else 0.0
    jitter = {} if look.is_grey or (look.is_drawn and colours.telling) else {"color_jitter": 0.4}
    if look.is_drawn:
        why = f"{100 * look.drawn:.0f} % of the images have a border of one colour: drawn or scanned, so affine views"
        tone = "" if look.is_grey else f". Colours {'stay' if colours.telling else 'change'}: {colours.why}"
        strong = _drawn(22.0, (0.7, 1.35), 0.18, flip) | jitter | {"erase": 0.4}
        return {
            "plain": Choice(_drawn(15.0, (0.8, 1.25), 0.12, flip) | jitter, why + tone),
            "weak": Choice(_drawn(8.0, (0.9, 1.1), 0.06, flip), why + ", small ones"),
            "strong": Choice(strong, why + ", large ones" + tone),
        }
    why = "photographs: crops"
    randaugment = {"rand_augment": "rand-m9-mstd0.5-inc1"}
    return {
        "plain": Choice({"crop_scale": [0.3, 1.0], "horizontal_flip": flip} | jitter, why),
        "weak": Choice({"crop_scale": [0.5, 1.0], "horizontal_flip": flip}, why + ", large ones"),
        "strong": Choice(
            {"crop_scale": [0.3, 1.0], "horizontal_flip": flip} | randaugment | {"erase": 0.25},
            why + " and RandAugment",
        ),
    }


def _drawn(degrees: float, scale: tuple[float, float], translation: float, flip: float) -> dict[str, Any]:
    affine = {"rotation": degrees, "scale": list(scale), "shear": round(degrees * 2 / 3, 1), "translation": translation}
    return {"crop_scale": [0.85, 1.0], "affine": affine, "horizontal_flip": flip}


def sampling(look: Look) -> Choice:
    """Draw classes equally often where the labels are imbalanced."""
    if look.imbalance <= 1.5:
        return Choice("uniform", "the classes have about equally many labels")
    return Choice("class_balanced", f"the largest class has {look.imbalance:.0f} times the labels of the smallest")


def guess(look: Look) -> bool:
    """Whether stage 2 also learns from labels that a simple learner guesses for the unlabelled images (docs/recipe.md).

    It pays where a network learns little from the labels alone: with up to four per class.
    """
    present = [count for count in look.labelled if count]
    few = bool(present) and statistics.median(present) <= FEW_LABELS
    return few and len(present) > 1 and look.labels <= look.unlabelled <= MOST_GUESSED


def selection(stage: Stage, look: Look, number: int, passes: float) -> Choice:
    """Choose which state is exported, and how often it is validated: about twenty times in a run.

    Many validation images for few steps make it rarer, so that validations take at most VALIDATING of the steps' work, but
    not fewer than four. Few images choose badly among the states of a run, so stage 2 then exports the last. In stage 3 they
    still choose: what it starts from stays if all its states are less accurate.

    Args:
        stage: Stage 2 or 3.
        look: The images.
        number: Steps of the run.
        passes: Work of a step for each model that is validated, in forward passes of an image.
    """
    costly = math.ceil(look.validation / (VALIDATING * passes))
    every = max(1, min(max(number // 20, costly), number // 4))
    if look.validation >= ENOUGH_VALIDATION:
        why = f"{look.validation} validation images choose the best of about {number // every} states"
        return Choice({"select": "best", "eval_every": every}, why)
    if stage == "semi" and look.validation:
        why = f"{look.validation} validation images tell whether all states are less accurate than stage 2's"
        return Choice({"select": "best", "eval_every": every}, why)
    return Choice(
        {"select": "last", "eval_every": every},
        f"the last state: {look.validation} validation images are too few to choose by (from {ENOUGH_VALIDATION} on)",
    )


def passes(stage: Stage, look: Look, global_batch: int) -> float:
    """Count a step's work in forward passes of an image, for each model that is validated; a backward pass is two.

    In stage 3 the teacher passes over each unlabelled image too, and both models are validated.
    """
    if stage != "semi":
        return 3 * global_batch * (1 + GUESS_RATIO if stage == "distill" and guess(look) else 1)
    ratio = UNLABELLED_RATIO if look.unlabelled else 0
    return (3 * (1 + ratio) + ratio) * global_batch / 2


def pretraining_selection(look: Look, number: int) -> Choice:
    """Choose when stage 1 ends: with enough validation images when the linear probe on its features stops rising.

    Ten validations a run; it ends after four without a better one. With fewer images a linear probe is too noisy to stop by.
    """
    every = max(1, number // 10)
    if look.validation < ENOUGH_FOR_PROBE:
        return Choice({"eval_every": every}, "")
    why = f"it ends when the linear probe on {look.validation} validation images has not risen four times in a row"
    return Choice({"select": "best", "patience": 4, "eval_every": every}, why)


def teacher(number: int) -> Choice:
    """Choose the horizon of the teacher's average: a fourteenth of the run, at most a seventh, at least ten steps."""
    long = min(LONGEST_HORIZON, max(20.0, number / 7))
    short = long / 2
    values = {
        "mode": "guarded",
        "base_decay": round(1 - 1 / short, 6),
        "gamma": 0.01,
        "max_decay": round(1 - 1 / long, 6),
    }
    return Choice(values, f"the teacher averages over about {short:.0f} to {long:.0f} of {number} steps")


def micro_batch(global_batch: int, bytes_per_sample: int, free: int) -> Choice:
    """Choose the largest divisor of the batch whose activations fit into MEMORY_SHARE of the free memory.

    Args:
        global_batch: Samples of the first stream per step, on one process.
        bytes_per_sample: Activations that a sample of the first stream keeps, with those of the other streams.
        free: Free bytes of the device, after weights and optimizer.
    """
    fits = max(1, int(MEMORY_SHARE * free) // max(1, bytes_per_sample))
    value = max(d for d in range(1, global_batch + 1) if global_batch % d == 0 and d <= max(1, fits))
    if value == global_batch:
        return Choice(None, "")
    return Choice(
        value, f"micro-batches of {value}: {bytes_per_sample / 2**20:.0f} MiB a sample, {free / 2**30:.1f} GiB free"
    )
