"""What no shape of a released file tells: asked for, read from the stored arguments, or assumed aloud.

The oracle is a literal forward pass in float64, from the equations (`tests/unit/models/oracle.py`). Our model computes in
float64 too, but for exp(A_log), which it always takes in fp32.
"""

import logging
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pipeline.errors import HandoverError
from pipeline.exports.card import Card
from pipeline.exports.convert import convert
from pipeline.exports.export import load_export
from pipeline.exports.weights import load_weights
from pipeline.models import build_model
from pipeline.models.__main__ import main
from tests.unit.exports import released
from tests.unit.models import oracle

VIM = released.vim(dim=32, depth=2, tokens=17, classes=5, patch=4)
ARM = released.arm_fine_tuned(dim=32, depth=2, tokens=17, classes=5, patch=4)
NAME = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed"
FORMS = [("middle", "mean"), ("first", "mean"), ("middle", "sum"), ("first", "sum")]
NAMES = {
    ("middle", "mean"): f"{NAME}_with_midclstok_div2",
    ("first", "mean"): f"{NAME}_with_cls_token_div2",
    ("middle", "sum"): f"{NAME}_with_midclstoken",
    ("first", "sum"): f"{NAME}_with_clstok",
}


def saved(folder: Path, state: dict[str, torch.Tensor], **arguments: object) -> Path:
    torch.save({"model": state, "args": Namespace(**arguments)} if arguments else state, folder / "released.pth")
    return folder / "released.pth"


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[str, str, str], torch.Tensor]:
    """Logits of every form in float64, of a Vim and of an ARM."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)).double()
    states = {"vim": (released.filled(VIM), "cls"), "arm": (released.filled(ARM), "mean")}
    return {
        (layout, cls, combine): oracle.classify(
            {k: v.double() for k, v in state.items()},
            images,
            pool=pool,
            first=cls == "first",
            divided=combine == "mean",
        )
        for layout, (state, pool) in states.items()
        for cls, combine in FORMS
    }


def logits(export: Path) -> torch.Tensor:
    model, _ = load_export(export)
    return model.double()(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)).double())


@pytest.mark.parametrize(("cls", "combine"), FORMS)
@pytest.mark.parametrize("layout", ["vim", "arm"])
def test_every_form_computes_its_equations_when_it_is_asked_for(wanted, layout, cls, combine, tmp_path, caplog) -> None:
    path = saved(tmp_path, released.filled(VIM if layout == "vim" else ARM))
    asked = ["--cls-position", cls, "--combine", combine]
    assert main(["convert", str(path), "--out", str(tmp_path / "export"), *asked]) == 0
    torch.testing.assert_close(logits(tmp_path / "export"), wanted[layout, cls, combine], rtol=1e-7, atol=1e-7)
    card = Card.read(tmp_path / "export")
    assert (card.model.cls_token, card.model.combine) == (cls, combine)
    assert sum("given by --" in said for said in card.assumptions) == 2
    assert "WARNING" not in caplog.text


def test_another_form_is_far_off(wanted) -> None:
    """By more than 5 % of the largest logit, so a form must not be taken in silence."""
    want = wanted["vim", "middle", "mean"]
    off = {f: ((wanted["vim", *f] - want).abs().max() / want.abs().max()).item() for f in FORMS[1:]}
    assert min(off.values()) > 0.05, off


@pytest.mark.parametrize(("cls", "combine"), FORMS)
@pytest.mark.parametrize("stored", ["name", "flags"])
def test_the_stored_arguments_tell_the_form(wanted, stored, cls, combine, tmp_path, caplog) -> None:
    told = {
        "name": {"model": NAMES[cls, combine]},
        "flags": {"use_middle_cls_token": cls == "middle", "if_divide_out": combine == "mean"},
    }[stored]
    path = saved(tmp_path, released.filled(VIM), **told)
    assert main(["convert", str(path), "--out", str(tmp_path / "export")]) == 0
    torch.testing.assert_close(logits(tmp_path / "export"), wanted["vim", cls, combine], rtol=1e-7, atol=1e-7)
    assert sum("the file's args." in said for said in Card.read(tmp_path / "export").assumptions) == 2
    assert "WARNING" not in caplog.text


@pytest.mark.parametrize("arguments", [{}, {"model": "arm_base_pz16"}, {"model": 3, "lr": 1e-3}], ids=str)
def test_a_file_that_leaves_it_open_is_taken_as_released_with_two_warnings(wanted, arguments, tmp_path, caplog) -> None:
    path = saved(tmp_path, released.filled(VIM), **arguments)
    with caplog.at_level(logging.INFO):
        assert main(["convert", str(path), "--out", str(tmp_path / "export")]) == 0
    err = caplog.text
    assert err.count("WARNING: ") == 2
    assert "(cls_token=middle): assumed, as in the released models; the file does not say" in err
    assert "if it is otherwise, give --combine" in err
    torch.testing.assert_close(logits(tmp_path / "export"), wanted["vim", "middle", "mean"], rtol=1e-7, atol=1e-7)
    card, readme = Card.read(tmp_path / "export"), (tmp_path / "export" / "README.md").read_text()
    assert len(card.assumptions) == 5
    assert all(said in readme and said in err for said in card.assumptions)


def test_what_a_person_gives_stands_over_the_file_and_the_card_says_so(wanted, tmp_path) -> None:
    path = saved(tmp_path, released.filled(VIM), model=NAMES["middle", "mean"])
    card = convert(path, tmp_path / "export", form={"cls_token": "first"})
    assert (
        "given by --cls-position, against what the file says (the file's args.model is vim_tiny" in card.assumptions[0]
    )
    torch.testing.assert_close(logits(tmp_path / "export"), wanted["vim", "first", "mean"], rtol=1e-7, atol=1e-7)


def test_arms_flag_tells_what_its_head_reads(tmp_path) -> None:
    state = released.filled(ARM)
    card = convert(saved(tmp_path, state, model="arm_base_pz16", global_pool=False), tmp_path / "export")
    assert card.model.pool == "cls"
    images = torch.randn(1, 3, 16, 16).double()
    want = oracle.classify({k: v.double() for k, v in state.items()}, images, pool="cls")
    torch.testing.assert_close(load_export(tmp_path / "export")[0].double()(images), want, rtol=1e-7, atol=1e-7)


def test_a_vim_without_a_cls_token_is_read_by_its_mean(tmp_path) -> None:
    shapes = {k: v for k, v in VIM.items() if k != "cls_token"} | {"pos_embed": (1, 16, 32)}
    card = convert(saved(tmp_path, released.filled(shapes)), tmp_path / "export")
    assert (card.model.cls_token, card.model.pool, card.model.image_size) == ("none", "mean", (16, 16))
    with pytest.raises(HandoverError, match="leaves nothing open that --cls-position could decide"):
        convert(saved(tmp_path, released.filled(shapes)), tmp_path / "other", form={"cls_token": "first"})


def test_a_name_that_says_more_than_our_model_has_is_refused(tmp_path) -> None:
    path = saved(tmp_path, released.filled(VIM), model=f"{NAME}_rope_also_residual_with_cls_token")
    with pytest.raises(HandoverError, match="rotary position embeddings, which our model does not have"):
        convert(path, tmp_path / "export")


def test_stage_2_takes_a_released_file_only_in_its_form(tmp_path, caplog) -> None:
    """`weights.path`: another form is refused, and the right one is resized with its cls token where it stands."""
    state = released.filled(VIM)
    size = {"embed_dim": 32, "depth": 2, "image_size": 24, "patch_size": 4, "num_classes": 5}
    with pytest.raises(HandoverError, match=r"args\.model is vim.*; set model\.cls_token=first"):
        load_weights(build_model("vim_tiny", **size), saved(tmp_path, state, model=NAMES["first", "mean"]))
    with pytest.raises(HandoverError, match=r"set model\.combine=sum"):
        load_weights(build_model("vim_tiny", **size), saved(tmp_path, state, if_divide_out=False))
    target = build_model("vim_tiny", cls_token="first", **size)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_weights(target, saved(tmp_path, state, model=NAMES["first", "mean"]))
        assert not caplog.records
        load_weights(target, saved(tmp_path, state))
    assert "(model.cls_token=first)" in caplog.text
    assert torch.equal(target.pos_embed[0, 0], state["pos_embed"][0, 0])
    grid = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(target.pos_embed[:, 1:], resized)
