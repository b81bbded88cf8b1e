"""The rules of recipes, each as a law with numbers, over any dataset and machine."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.recipe import networks, rules
from launchers.recipe.choice import Choice
from launchers.recipe.compose import compose
from launchers.recipe.look import Look
from launchers.recipe.neighbours import ColourTest, FlipTest
from pipeline.streaming.config import AugmentConfig
from stages import SPECS


def look(**changed: Any) -> Look:
    """Digits: 1,000 images of 28 x 28, 15 of them labelled."""
    facts: dict[str, Any] = {
        "images": 1000, "labelled": (5, 4, 3, 2, 1), "unlabelled": 935, "validation": 50, "height": 28, "width": 28,
        "grey": 1.0, "drawn": 1.0, "mean": (0.1, 0.1, 0.1), "std": (0.3, 0.3, 0.3),
    }  # fmt: skip
    return Look(**facts | changed)


STAGES = networks.stages("vision_mamba")
LOOKS = st.builds(
    look,
    images=st.integers(2, 10**7),
    labelled=st.lists(st.integers(0, 10**5), min_size=2, max_size=50).map(tuple).filter(any),
    unlabelled=st.integers(0, 10**7),
    validation=st.integers(0, 10**5),
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    grey=st.floats(0, 1),
    drawn=st.floats(0, 1),
)


@given(
    LOOKS,
    st.booleans(),
    st.booleans(),
    st.integers(100, 10**5),
    st.sampled_from(["auto", *networks.FAMILIES]),
)
def test_every_recipe_is_a_valid_config(facts: Look, gpu: bool, flips: bool, number: int, asked: Any) -> None:
    family = networks.family(facts, gpu, asked)
    drafts = compose(
        "mine",
        {"train": "data/mine/train"},
        facts,
        FlipTest(flips, "because"),
        ColourTest(flips, "because"),
        gpu=gpu,
        family=family,
        network=networks.candidates(family.value, rules.image_sizes(facts, gpu))[-1],
        steps={stage: Choice(number, "words") for stage in STAGES},
        micro={stage: Choice(None, "") for stage in STAGES},
    )
    assert tuple(drafts) == networks.stages(family.value)
    for stage in drafts:
        config = SPECS[stage].config.model_validate(drafts[stage].values)
        assert config.run.experiment == "mine"
        assert set(drafts[stage].reasons) <= set(drafts[stage].values)
    if "arm" not in drafts:
        assert "init_from" not in drafts["distill"].values
        return
    arm, distill = (SPECS[s].config.model_validate(drafts[s].values).model for s in ("arm", "distill"))
    same = ("image_size", "patch_size", "embed_dim", "depth")
    assert [getattr(arm, name) for name in same] == [getattr(distill, name) for name in same]


@pytest.mark.parametrize(("side", "gpu", "chosen"), [
    (8, False, 32), (28, False, 32), (37, False, 32), (38, False, 64), (500, False, 64), (500, True, 192), (28, True, 32)
])  # fmt: skip
def test_the_view_is_the_least_that_holds_the_images(side: int, gpu: bool, chosen: int) -> None:
    assert rules.image_sizes(look(height=side, width=2 * side), gpu)[0].value == chosen


def test_a_smaller_view_comes_after_all_models_of_the_first() -> None:
    sides = rules.image_sizes(look(height=64, width=64), gpu=False)
    found = [(c.value["name"], c.value["image_size"]) for c in networks.candidates("efficientvim", sides)]
    assert found == [("efficientvim_mini", 64), ("efficientvim_nano", 64), ("efficientvim_nano", 32)]
    small = networks.candidates("small_resnet", sides)
    assert [c.value["image_size"] for c in small] == [64, 32]
    assert len(rules.image_sizes(look(height=28, width=28), gpu=True)) == 1


@pytest.mark.parametrize("side", rules.SIDES_GPU)
def test_clusters_and_patches_divide_the_side(side: int) -> None:
    values = networks.candidates("vision_mamba", [Choice(side, "words")])[0].value
    assert side % values["cluster_size"] == 0
    assert values["cluster_size"] % values["patch_size"] == 0


def test_learning_rates_follow_the_root_of_the_batch_and_the_inverse_of_the_width() -> None:
    for family, rates in networks.BASE_RATES.items():
        for stage, (base, batch) in rates.items():
            assert networks.learning_rate(family, stage, batch).value == pytest.approx(base)
            assert networks.learning_rate(family, stage, 4 * batch, 64).value == pytest.approx(2 * base)
            assert networks.learning_rate(family, stage, batch, 256).value == pytest.approx(
                base / 4, rel=0.03
            )  # two digits


@pytest.mark.parametrize(("family", "kind"), [
    ("efficientvim", "muon"), ("small_resnet", "muon"), ("resnet", "adamw"), ("vision_mamba", "adamw")
])  # fmt: skip
def test_small_networks_learn_by_muon_in_every_stage(family: networks.Family, kind: str) -> None:
    drafts = compose(
        "mine", {"train": "x"}, look(), FlipTest(False, "x"), ColourTest(False, "x"), gpu=False, family=Choice(family, ""),
        network=networks.candidates(family, [Choice(32, "words")])[0],
        steps={stage: Choice(100, "") for stage in STAGES}, micro={stage: Choice(None, "") for stage in STAGES},
    )  # fmt: skip
    assert {draft.values["optim"]["kind"] for draft in drafts.values()} == {kind}


def test_a_short_run_of_a_resnet_has_three_times_the_rate() -> None:
    for family in networks.BASE_RATES:
        short, longer = (networks.learning_rate(family, "semi", 16, 64, networks.SHORT_RUN + n).value for n in (0, 1))
        assert short == pytest.approx(longer * (3 if family == "resnet" else 1), rel=0.03)  # two digits


def test_few_images_make_the_batch_of_stage_1_smaller_and_no_other() -> None:
    for number in (1, 9, 15, 33, 1000):
        facts = look(labelled=(number,), images=number)
        assert rules.batch("arm", facts, gpu=False).value <= max(8, number)
        assert rules.batch("distill", facts, gpu=False).value == 32


def test_pretraining_is_for_many_images_on_a_gpu_or_by_wish() -> None:
    many, fewer = look(images=networks.MANY_IMAGES), look(images=networks.MANY_IMAGES - 1)
    assert networks.family(many, gpu=True).value == "vision_mamba"
    assert networks.family(fewer, gpu=True).value == "resnet"
    assert networks.family(many, gpu=False).value == "small_resnet"
    assert networks.family(fewer, gpu=False, asked="vision_mamba").value == "vision_mamba"


@given(LOOKS, st.lists(st.floats(1e-3, 10), min_size=3, max_size=3), st.floats(60, 1e5), st.booleans())
def test_the_steps_take_the_budget_or_all_epochs_or_the_least(
    facts: Look, each: list[float], amount: float, counted: bool
) -> None:
    batches = {stage: rules.batch(stage, facts, False).value for stage in STAGES}
    seconds = dict(zip(STAGES, each, strict=True))
    found = rules.steps(facts, batches, seconds, rules.Budget(amount, counted))
    limits = {stage: rules.epoch_limit(stage, facts, batches[stage]) for stage in STAGES}
    numbers = {stage: choice.value for stage, choice in found.items()}
    assert all(rules.LEAST_STEPS <= n <= max(limits[stage], rules.LEAST_STEPS) for stage, n in numbers.items())
    total, least = (sum(n[s] * seconds[s] for s in STAGES) for n in (numbers, dict.fromkeys(STAGES, rules.LEAST_STEPS)))
    usable = amount if counted else max(0.0, rules.USABLE * (amount - rules.FIXED_SECONDS))
    assert total <= usable + least + 1e-6
    if all(rules.LEAST_STEPS < n < 0.89 * limits[stage] for stage, n in numbers.items()):
        assert total >= 0.9 * usable - sum(each)  # two digits of each number are kept


def test_more_unlabelled_images_get_more_of_the_time_for_stages_1_and_3() -> None:
    few, many = (rules.shares(look(unlabelled=n), STAGES) for n in (0, 10**6))
    assert many["arm"] > few["arm"]
    assert many["semi"] > few["semi"]
    assert sum(few.values()) == pytest.approx(sum(many.values())) == pytest.approx(1)
    assert rules.shares(look(labelled=(9, 9)), networks.stages("small_resnet")) == {"distill": 0.75, "semi": 0.25}


def test_unlabelled_images_end_stage_2_after_a_third_of_the_epochs() -> None:
    alone, beside = (rules.epoch_limit("distill", look(labelled=(400, 400), unlabelled=n), 32) for n in (0, 10**5))
    assert alone == pytest.approx(3 * beside, rel=1e-3)


def test_views_follow_the_kind_of_images() -> None:
    telling = ColourTest(True, "because")
    drawn = rules.views(look(), False, telling)
    photo = rules.views(look(drawn=0.1, grey=0.0), True, telling)
    for name in ("plain", "weak", "strong"):
        sign, picture = (AugmentConfig.model_validate(v[name].value) for v in (drawn, photo))
        assert sign.affine is not None
        assert sign.horizontal_flip == 0.0
        assert sign.color_jitter == 0.0  # grey
        assert picture.affine is None
        assert picture.horizontal_flip == 0.5
    weak, strong = (AugmentConfig.model_validate(drawn[name].value).affine for name in ("weak", "strong"))
    assert weak is not None
    assert strong is not None
    assert weak.rotation < strong.rotation


@pytest.mark.parametrize(("drawn", "telling", "jitter"), [(1.0, True, 0.0), (1.0, False, 0.4), (0.1, True, 0.4)])
def test_colours_of_drawn_images_change_only_where_they_do_not_tell_the_classes(
    drawn: float, telling: bool, jitter: float
) -> None:
    found = rules.views(look(drawn=drawn, grey=0.0), False, ColourTest(telling, "colours find the class"))
    plain, strong = (AugmentConfig.model_validate(found[name].value) for name in ("plain", "strong"))
    assert plain.color_jitter == jitter
    assert strong.color_jitter == (jitter if drawn == 1.0 else 0.0)
    assert ("colours find the class" in found["plain"].why) == (drawn == 1.0)


def test_classes_are_balanced_where_labels_are_not() -> None:
    assert rules.sampling(look()).value == "class_balanced"
    assert rules.sampling(look(labelled=(4, 4, 4))).value == "uniform"


def test_the_best_state_is_chosen_only_by_enough_validation_images() -> None:
    enough, fewer = (look(validation=rules.ENOUGH_VALIDATION - n) for n in (0, 1))
    assert rules.selection("distill", enough, 400, passes=96).value == {"select": "best", "eval_every": 20}
    assert rules.selection("distill", fewer, 400, passes=96).value["select"] == "last"


def test_few_validation_images_protect_what_stage_3_starts_from() -> None:
    few = look(validation=9)
    assert rules.selection("semi", few, 400, passes=96).value["select"] == "best"
    assert rules.selection("semi", look(validation=0), 400, passes=96).value["select"] == "last"


def test_labels_are_guessed_where_most_classes_have_few_and_the_pool_can_be_read() -> None:
    one = look(labelled=(1, 1, 4, 9), unlabelled=500)
    assert rules.guess(one)
    assert rules.batch("distill", one, gpu=False).value == 16
    assert rules.epoch_limit("distill", one, 16) > rules.epoch_limit(
        "distill", look(labelled=(5, 5, 5, 6), unlabelled=500), 16
    )
    for other in (
        look(labelled=(5, 5, 5, 9), unlabelled=500),
        look(labelled=(1, 1, 1), unlabelled=0),
        look(labelled=(1, 1, 1), unlabelled=rules.MOST_GUESSED + 1),
        look(labelled=(1,), unlabelled=500),
    ):
        assert not rules.guess(other)
        assert rules.batch("distill", other, gpu=False).value == 32


@given(st.integers(0, 10**6), st.integers(100, 10**5), st.integers(0, 10**6), st.sampled_from(["distill", "semi"]))
def test_validations_take_a_tenth_of_the_work_or_are_four(held_out: int, number: int, pool: int, stage: Any) -> None:
    facts = look(validation=held_out, unlabelled=pool)
    batch = rules.batch(stage, facts, gpu=False).value
    every = rules.selection(stage, facts, number, rules.passes(stage, facts, batch)).value["eval_every"]
    models, inferred = (2, rules.UNLABELLED_RATIO if pool else 0) if stage == "semi" else (1, 0)
    more = inferred if stage == "semi" else rules.GUESS_RATIO if rules.guess(facts) else 0
    step = batch * (3 * (1 + more) + inferred)
    assert number // every >= 4
    assert models * held_out <= rules.VALIDATING * every * step or every == number // 4
    assert every >= number // 20


def test_stage_1_ends_by_the_linear_probe_only_with_enough_validation_images() -> None:
    assert "patience" not in rules.pretraining_selection(look(validation=rules.ENOUGH_FOR_PROBE - 1), 400).value
    found = rules.pretraining_selection(look(validation=rules.ENOUGH_FOR_PROBE), 400).value
    assert found == {"select": "best", "patience": 4, "eval_every": 40}


@given(st.integers(100, 10**6))
def test_the_teachers_horizon_is_a_part_of_the_run(number: int) -> None:
    found = rules.teacher(number).value
    short, long = (1 / (1 - found[key]) for key in ("base_decay", "max_decay"))
    assert 10 * 0.99 <= short <= long
    assert long <= max(20, number / 7) * 1.01
    assert math.isfinite(long)


@pytest.mark.parametrize(
    ("distill", "semi", "labels", "pays"),
    [
        (999, 500, 5000, False),
        (1000, 490, 5000, False),
        (1000, 500, 5000, True),
        (290, 500, 5, False),
        (300, 500, 5, True),
    ],
)
def test_a_network_needs_enough_steps_or_all_its_epochs(distill: int, semi: int, labels: int, pays: bool) -> None:
    """5 labels allow 300 steps of stage 2 at most, 5000 allow 100 epochs; 935 unlabelled images allow 1461 of stage 3."""
    found = {"distill": Choice(distill, ""), "semi": Choice(semi, "")}
    assert rules.pays_for(found, look(labelled=(labels,)), {"distill": 32, "semi": 16}) is pays


@given(st.integers(1, 512), st.integers(1, 2**34), st.integers(0, 2**38))
def test_micro_batches_divide_the_batch_and_fit(global_batch: int, each: int, free: int) -> None:
    value = rules.micro_batch(global_batch, each, free).value or global_batch
    assert global_batch % value == 0
    assert value == 1 or value * each <= rules.MEMORY_SHARE * free
    larger = [d for d in range(value + 1, global_batch + 1) if global_batch % d == 0]
    assert not larger or larger[0] * each > rules.MEMORY_SHARE * free - each


def test_an_unlabelled_pool_that_is_missing_makes_stage_3_supervised() -> None:
    drafts = compose(
        "mine", {"train": "x"}, look(unlabelled=0), FlipTest(False, "x"), ColourTest(False, "x"), gpu=False,
        family=Choice("vision_mamba", ""),
        network=networks.candidates("vision_mamba", [Choice(32, "words")])[0],
        steps={stage: Choice(100, "") for stage in STAGES}, micro={stage: Choice(None, "") for stage in STAGES},
    )  # fmt: skip
    assert drafts["semi"].values["pseudo"] == {"weight": 0.0}
    assert "no unlabelled images" in drafts["semi"].reasons["pseudo"][0]
    assert np.isclose(
        drafts["distill"].values["optim"]["lr"], networks.learning_rate("vision_mamba", "distill", 32, 64).value
    )
