"""Say whether each stage was worth it, and what to do next, by rules that a reader can check.

A gain is established if its 95 % interval, paired over the test images, excludes zero. A rule of advice looks at numbers of
the report alone, names them, and ends in a command or a key of the config.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from pipeline.report.recommend import Candidate, recommend
from pipeline.report.results import ROWS, Result, StageRun
from pipeline.report.tables import Table

WEAK_CLASS = 10.0  # points of accuracy below the mean at which a class is worth labels
MAX_NAMED = 4  # classes that a sentence names
RISING = 1.0  # points by which validation must rise over the last third of a run that is worth prolonging
FALLING = 2.0  # points below its best at which validation has fallen
CALIBRATED = 8.0  # percent of expected calibration error that is still called calibrated


class Gain(NamedTuple):
    """A difference of top-1 between two models on the same test images, in points.

    Attributes:
        name: What was gained over what, for the table.
        subject: What is credited, as the subject of a sentence: "stage 3".
        over: What it is compared with: "stage 2".
        value: The difference.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
    """

    name: str
    subject: str
    over: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["established", "not established", "a loss"]:
        """Whether the interval lies above zero, includes it, or lies below it."""
        if self.low > 0:
            return "established"
        return "a loss" if self.high < 0 else "not established"

    def sentence(self) -> str:
        """Return the verdict in words: "stage 3 added 1.4 points (-0.9 to 3.8): not established"."""
        if self.over.startswith("stage"):
            change = f"added {self.value:.1f} points" if self.value >= 0 else f"cost {-self.value:.1f} points"
        else:
            change = f"is {abs(self.value):.1f} points {'above' if self.value > 0 else 'below'} {self.over}"
            change = change if self.value else f"equals {self.over}"
        return f"{self.subject} {change} ({self.low:.1f} to {self.high:.1f}): {self.verdict}"


class Simple(NamedTuple):
    """A baseline that was computed for the report.

    Attributes:
        title: What it is and what it learns from: "logistic regression on pixels".
        top1: Percent on the test images, mean over the experiments.
        ece: Expected calibration error in percent; None if it gives no probabilities.
        setting: What was chosen, in words, and on what.
        seconds: Time for reading, tuning and predicting.
        validated: Percent on the validation images, a mean over classes and experiments; None if it was not tuned on them.
    """

    title: str
    top1: float
    ece: float | None
    setting: str
    seconds: float
    validated: float | None = None


class Advice(NamedTuple):
    """Something to do next.

    Attributes:
        name: The rule.
        text: What was seen and what to do, in one or two sentences.
        warning: Whether something is wrong, rather than improvable.
    """

    name: str
    text: str
    warning: bool = False


class Worth(NamedTuple):
    """Whether the stages were worth it, as computed for a report.

    Attributes:
        gains: Stage by stage, and over the best baseline.
        baselines: The baselines, the best first.
        notes: What was left out or capped, one sentence each.
        missing: Why there are no baselines; empty if there are.
    """

    gains: Sequence[Gain]
    baselines: Sequence[Simple]
    notes: Sequence[str]
    missing: str = ""

    def tables(self) -> list[Table]:
        """Return the table of gains and the table of baselines, as far as there are rows."""
        found = []
        if self.gains:
            rows = [[g.name, f"{g.value:+.1f}", f"{g.low:+.1f} to {g.high:+.1f}", g.verdict] for g in self.gains]
            found.append(Table(
                name="gains", title="What each step added", header=["", "points of top-1", "95 % interval", "verdict"],
                rows=rows, note="Paired bootstrap over the test images, redrawn inside each class; seeds are not redrawn.",
            ))  # fmt: skip
        if self.baselines:
            cells = [
                [b.title, f"{b.top1:.2f}", "–" if b.ece is None else f"{b.ece:.1f}", b.setting, f"{b.seconds:.1f}"]
                for b in self.baselines
            ]
            found.append(Table(
                name="baselines", title="Baselines on the same labels", header=["", "top1", "ece", "setting", "seconds"],
                rows=cells, note=" ".join(self.notes),
            ))  # fmt: skip
        return found


def advise(result: Result, worth: Worth, experiment: str) -> list[Advice]:
    """Return what to do next, the warnings first.

    Args:
        result: The experiment that the advice is for.
        worth: The gains and baselines.
        experiment: Its folder, as a command names it.
    """
    semi, distill = result.stages.get("semi"), result.stages.get("distill")
    row = next((row for row in ("stage 3, teacher", "stage 3, student", "stage 2") if row in result.models), None)
    found = [
        _nothing_accepted(semi),
        _recommended(result, worth, row),
        _below_baseline(worth),
        _stage_three(worth, experiment),
    ]
    found += [_length("stage 3", "semi", semi), _length("stage 2", "distill", distill)]
    if row is not None:
        found += [_classes(result, row, experiment), _calibration(result, row)]
    advice = [item for item in found if item is not None]
    return sorted(advice, key=lambda item: not item.warning)


def _nothing_accepted(semi: StageRun | None) -> Advice | None:
    """Warn if stage 3 accepted no pseudo-label, or hardly any, towards its end."""
    rates = semi.curve("ssl/mask_rate")[1] if semi else []
    late = rates[-max(1, len(rates) // 4) :]
    if semi is None or not late or fmean(late) >= 0.005:
        return None
    confidence = semi.curve("ssl/confidence")[1]
    threshold = semi.config.get("pseudo", {}).get("threshold")
    return Advice(
        "mask-rate",
        f"Stage 3 accepted {100 * fmean(late):.1f} % of its pseudo-labels at the end, so it learnt from the labelled images"
        f" alone{_mean_confidence(confidence, threshold)}. Lower pseudo.threshold, train stage 2 longer, or drop stage 3.",
        warning=True,
    )


def _mean_confidence(confidence: Sequence[float], threshold: float | None) -> str:
    if not confidence or threshold is None:
        return ""
    return f": the mean confidence was {confidence[-1]:.2f}, and pseudo.threshold is {threshold:g}"


def _recommended(result: Result, worth: Worth, row: str | None) -> Advice | None:
    """Advise to use something else than the export where the validation images say so."""
    candidates = candidates_of(result, worth.baselines, row)
    images = validation_images(result)
    if not candidates or candidates[0].title != row:
        return None
    chosen = recommend(candidates, images)
    if chosen == candidates[0]:
        return None
    return Advice(
        "recommended",
        f"On the {images} validation images {chosen.title} reaches {chosen.validated:.1f} %, the exported model"
        f" {candidates[0].validated:.1f} %, and more than a standard error lies between. Use {chosen.title}, or train longer.",
        warning=True,
    )


def candidates_of(result: Result, baselines: Sequence[Simple], row: str | None) -> list[Candidate]:
    """List what can be used and has been validated: the exported model first, then stage 2, then the baselines."""
    rows = [name for name in dict.fromkeys((row, "stage 2")) if name in result.models]
    validated = {name: result.stages[ROWS[name][0]].validated(ROWS[name][1]) for name in rows}
    validated |= {baseline.title: baseline.validated for baseline in baselines}
    return [Candidate(name, value) for name, value in validated.items() if value is not None]


def validation_images(result: Result) -> int:
    """Return the number of validation images of the last stage that was evaluated."""
    counts = [run.evaluation.get("labels", {}).get("validation", 0) for run in result.stages.values()]
    return int(next((count for count in reversed(counts) if count), 0))


def _below_baseline(worth: Worth) -> Advice | None:
    """Warn if the exported model is not established above the best baseline."""
    gain = next((g for g in worth.gains if g.name.startswith("exported model over")), None)
    if gain is None or gain.verdict == "established":
        return None
    word = "is below" if gain.verdict == "a loss" else "is not established above"
    return Advice(
        "baseline",
        f"The exported model {word} {gain.over}, which takes seconds ({gain.value:+.1f} points, {gain.low:+.1f} to"
        f" {gain.high:+.1f}). More labels help both; views that suit the images and more steps help the network.",
        warning=gain.value < 0,
    )


def _stage_three(worth: Worth, experiment: str) -> Advice | None:
    """Advise to drop stage 3 where it lost, and to measure again where nothing is established."""
    gain = next((g for g in worth.gains if g.subject == "stage 3"), None)
    if gain is None or gain.verdict == "established":
        return None
    if gain.value <= 0:
        drop = "Drop stage 3" if gain.verdict == "a loss" else "It has not paid here"
        text = f"{_upper(gain.sentence())}. {drop}: use {experiment}/distill/export."
    else:
        text = (
            f"{_upper(gain.sentence())}. Run other seeds (run.seed=1 and 2, each under a name of its own) and give the report"
            " all of them, or test on more images, before you rely on it."
        )
    return Advice("stage-3", text, warning=gain.verdict == "a loss")


def _length(title: str, stage: str, run: StageRun | None) -> Advice | None:
    """Advise more steps where validation still rises at the end, and fewer where it has fallen from its best."""
    name = "val/teacher_balanced" if stage == "semi" else "val/balanced"
    steps, values = run.curve(name) if run else ([], [])
    if len(values) < 4:
        return None
    third = max(1, len(values) // 3)
    rise = fmean(values[-third:]) - fmean(values[-2 * third : -third])
    best = max(range(len(values)), key=lambda k: values[k])
    noise = _noise(run, values[best])
    if rise >= max(RISING, noise) and values[-1] >= max(values) - max(0.5, noise):
        return Advice(
            f"longer-{stage}",
            f"Validation still rose by {rise:.1f} points over the last third of {title}: train it longer, for example"
            f" {stage}:loop.steps={2 * round(steps[-1])}.",
        )
    if values[best] - fmean(values[-third:]) >= max(FALLING, 2 * noise) and best < len(values) - third:
        return Advice(
            f"shorter-{stage}",
            f"Validation was best at step {steps[best]:.0f} of {title} ({values[best]:.1f} %) and fell to {values[-1]:.1f} %"
            f" by step {steps[-1]:.0f}: train it for fewer steps.",
        )
    return None


def _noise(run: StageRun | None, percent: float) -> float:
    """Return the standard error of an accuracy on the run's validation images, in points."""
    number = run.evaluation.get("labels", {}).get("validation", 0) if run else 0
    share = min(max(percent / 100, 0.05), 0.95)
    return 100 * math.sqrt(share * (1 - share) / max(1, number))


def _classes(result: Result, row: str, experiment: str) -> Advice | None:
    """Advise to collect labels of the classes that are far below the mean, those with the fewest labels first."""
    per_class: Mapping[str, float | None] = result.models[row]["per_class"]
    known = {name: value for name, value in per_class.items() if value is not None}
    if not known:
        return None
    mean = fmean(known.values())
    labelled = result.labelled_per_class()
    weak = [name for name, value in known.items() if value < mean - WEAK_CLASS]
    weak.sort(key=lambda name: (labelled.get(name, 0), known[name]))
    if not weak:
        return None
    named = ", ".join(f"{_quoted(n)} ({known[n]:.0f} %, {labelled.get(n, 0)} labels)" for n in weak[:MAX_NAMED])
    more = f" and {len(weak) - MAX_NAMED} more" if len(weak) > MAX_NAMED else ""
    return Advice(
        "labels",
        f"Collect labels of {named}{more}: they are at least {WEAK_CLASS:.0f} points below the mean of {mean:.0f} %. Images that"
        f" are worth labelling first: python -m pipeline.data label-next {experiment}.",
    )


def _calibration(result: Result, row: str) -> Advice | None:
    """Say where the confidences are not what they claim."""
    error = result.models[row]["ece"]
    if error <= CALIBRATED:
        return None
    return Advice(
        "calibration",
        f"The confidences of the model of {row} are off by {error:.0f} points on average (expected calibration error): do"
        " not read them as probabilities. The temperature of an export is fitted on the validation images; more of them make"
        " it better.",
    )


def _quoted(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
