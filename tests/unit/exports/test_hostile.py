"""Exports and weights files from somebody else: one sentence of HandoverError, within a second, and nothing written or run."""

import json
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import HandoverError
from pipeline.exports.card import CARD, Card
from pipeline.exports.export import load_export
from pipeline.exports.weights import load_weights, read_weights
from pipeline.files import sha256_of
from tests.unit.exports.test_export import card, exported

Values = dict[str, Any]


def reseal(folder: Path, change: Callable[[Values], None]) -> None:
    """Do what somebody does who forges an export: change the card, and give it the hash of its new values."""
    values = json.loads((folder / CARD).read_text())
    change(values)
    for name, key in (("model.safetensors", "weights_sha256"), ("fingerprint.safetensors", "fingerprint_sha256")):
        values[key] = sha256_of(folder / name)
    loose = Card.model_construct(**values)
    try:
        loose = Card.model_validate(values)
    except ValueError:
        (folder / CARD).write_text(json.dumps(values))
        return
    (folder / CARD).write_text(json.dumps(loose.sealed().model_dump(mode="json")))


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", "x" * 300, "a\x00b", "a\nb", "\\x", ".hidden"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "export")
    reseal(tmp_path / "export", lambda values: values["labels_seen"][0].update(split=name))
    with pytest.raises(HandoverError, match=r"labels_seen\.0") as error:
        load_export(tmp_path / "export")
    assert "\n" not in str(error.value)


def _set(**changed: Any) -> Callable[[Values], None]:
    return lambda values: values.update(changed)


def _model(**changed: Any) -> Callable[[Values], None]:
    return lambda values: values["model"].update(changed)


FORGED: dict[str, Callable[[Values], None]] = {
    "wider": _model(embed_dim=32),
    "much wider": _model(embed_dim=2**15),
    "deeper": _model(depth=512),
    "far deeper": _model(depth=10**8),
    "more classes": _set(classes=["a", "b", "c", "d"]),
    "more classes in both": lambda v: (v.update(classes=list("abcd")), v["model"].update(num_classes=4))[0],
    "a million classes": lambda v: (v.update(classes=["x"] * 10**6), v["model"].update(num_classes=10**6))[0],
    "larger images": _model(image_size=[64, 64]),
    "another family": _set(model={"name": "efficientvim_m1", "num_classes": 3}),
    "a timm model": _set(model={"name": "timm/resnet10t", "num_classes": 3, "image_size": [32, 32]}),
    "an unknown timm model": _set(model={"name": "timm/nothing", "num_classes": 3, "image_size": [32, 32]}),
    "a pretrainer": _set(kind="pretrainer"),
    "a decoder": _set(decoder={"width": 16, "depth": 1, "num_heads": 2}),
    "counts of other classes": _set(class_counts=[1, 2]),
    "groups of other classes": _set(class_groups={"tail": [7]}),
    "no spread": _set(preprocessing={"mean": [0.5] * 3, "std": [0, 0, 0]}),
    "a number of 5000 digits": _set(eval_batch="9" * 5000),
    "another precision": _set(format=2),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_card_that_does_not_fit_its_files_is_one_sentence_within_a_second(tmp_path: Path, what: str) -> None:
    exported(tmp_path / "export")
    reseal(tmp_path / "export", FORGED[what])
    begin = time.monotonic()
    with pytest.raises(HandoverError) as error:
        load_export(tmp_path / "export")
    assert time.monotonic() - begin < 3  # a second on a machine with nothing else to do
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_files_that_do_not_fit_one_another_are_one_sentence(tmp_path: Path) -> None:
    exported(tmp_path / "export")
    for change in (
        lambda t: {**t, "outputs": torch.zeros(2, 7)},
        lambda t: {**t, "images": torch.zeros(2, 3, 8, 8)},
        lambda t: {"images": t["images"]},
        lambda t: {**t, "images": torch.zeros(0, 3, 32, 32)},
    ):
        path = tmp_path / "export" / "fingerprint.safetensors"
        whole = load_file(path)
        save_file(change(whole), path)
        reseal(tmp_path / "export", lambda values: None)
        with pytest.raises(HandoverError, match="export it again"):
            load_export(tmp_path / "export")
        save_file(whole, path)


def test_a_list_of_labels_that_claims_10_12_values_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "export")
    path = tmp_path / "export/labels/s.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    reseal(tmp_path / "export", lambda values: values["labels_seen"][0].update(sample_indices_sha256=sha256_of(path)))
    _, read = load_export(tmp_path / "export")
    with pytest.raises(HandoverError, match="no list of 3 sample indices"):
        read.check_labels(tmp_path / "export", {"data": 0}, np.arange(9), allow_more=False)


def test_all_files_of_an_export_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    exported(tmp_path / "export")
    (tmp_path / "ordinary").write_text("")
    mode = (tmp_path / "ordinary").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "export").rglob("*") if path.is_file()} == {mode}


def test_a_card_that_is_no_card_is_one_sentence(tmp_path: Path) -> None:
    exported(tmp_path / "export")
    for text in ("[" * 100_000, "9" * 5000, '{"format": 1}', "null", "\ufeff{}", " " * 10**7, '{"a": "\\ud800"}'):
        (tmp_path / "export" / CARD).write_text(text)
        with pytest.raises(HandoverError, match="is not a model card") as error:
            Card.read(tmp_path / "export")
        assert "\n" not in str(error.value)


def _saved(value: Any, **more: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value(), path, **more)


def _header(text: bytes, size: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + size)

    return write


def _zip(members: dict[str, bytes], compression: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return write


ONE = torch.zeros(1)
HEAD = json.dumps({"head": {"dtype": "F32", "shape": [10**9, 512], "data_offsets": [0, 512 * 4 * 10**9]}}).encode()
HOSTILE: dict[str, Callable[[Path], None]] = {
    "no values": _saved(lambda: {"head": torch.empty(10**9, 512, device="meta")}),
    "one value for 10^9 rows": _saved(lambda: {"head": ONE.expand(10**9, 512)}),
    "one value for 10^9 rows, old format": _saved(
        lambda: {"head": ONE.expand(10**9, 512)}, _use_new_zipfile_serialization=False
    ),
    "sparse": _saved(lambda: {"head": torch.eye(3).to_sparse()}),
    "nested": _saved(lambda: {"head": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
    "quantised": _saved(lambda: {"head": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
    "100,000 names": _saved(lambda: {f"layers.{i}": ONE for i in range(100_000)}),
    "100,000 names, old format": _saved(
        lambda: {f"layers.{i}": ONE for i in range(100_000)}, _use_new_zipfile_serialization=False
    ),
    "deeply nested": _zip({"a/data.pkl": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "a/version": b"3"}),
    "a compressed archive": _zip({"a/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED),
    "a header longer than the file": _header(HEAD),
    "a sparse file of 2 TB": _header(HEAD, 512 * 4 * 10**9),
    "a nested header": _header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a pointer of Git LFS": lambda path: (
        path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n") and None
    ),
    "nothing": lambda path: path.write_bytes(b"") and None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_weights_file_that_claims_what_it_does_not_hold_is_one_sentence(
    tmp_path: Path, what: str, ending: str
) -> None:
    path = tmp_path / f"w.{ending}"
    HOSTILE[what](path)
    begin = time.monotonic()
    with pytest.raises(HandoverError) as error:
        read_weights(path)
    assert time.monotonic() - begin < 3
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spans", "held", "said"),
    [
        (((0, 4), (4, 8)), 8, ""),
        (((0, 4), (8, 12)), 12, "gap at byte 4"),
        (((4, 8), (8, 12)), 12, "gap at byte 0"),
        (((0, 4), (0, 4)), 4, "overlap"),
        (((0, 4), (4, 8)), 12, "take 8 bytes, but it holds 12"),
    ],
)
def test_tensors_of_a_safetensors_file_touch_and_fill_it(tmp_path: Path, spans: Any, held: int, said: str) -> None:
    """The library finds a gap only after it has read the file, and says so in words of its own."""
    tensors = {f"t{k}": {"dtype": "F32", "shape": [1], "data_offsets": span} for k, span in enumerate(spans)}
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(held))
    if not said:
        assert sorted(read_weights(tmp_path / "w.safetensors")) == ["t0", "t1"]
        return
    with pytest.raises(HandoverError, match=said):
        read_weights(tmp_path / "w.safetensors")


def _linear() -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    model.convert, model.fresh = lambda weights: dict(weights), lambda: ()  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"_orig_mod.module." + name: value for name, value in state.items()},
        lambda state: {"module._orig_mod." + name: value for name, value in state.items()},
        lambda state: {"state_dict": {n: v + 1 for n, v in state.items()}, "state_dict_ema": state},
        lambda state: {"state_dict": {"model." + n: v for n, v in state.items()}},
        lambda state: {"net._orig_mod." + n: v for n, v in state.items()} | {"criterion.centres": torch.ones(3)},
    ],
)
def test_wrapped_and_averaged_weights_are_found(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    source, target = _linear(), _linear()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(
    "change", [lambda v: v * float("nan"), lambda v: v.to(torch.int8), lambda v: v.to(torch.complex64)]
)
def test_weights_of_another_type_or_without_a_value_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    torch.save({name: change(value) for name, value in _linear().state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(HandoverError, match=r"holds (NaN|torch)"):
        load_weights(_linear(), tmp_path / "w.pth")


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "w.pth")
    assert torch.equal(read_weights(tmp_path / "w.pth")["a"], torch.ones(2))


def test_a_card_of_a_pretrainer_still_loads(tmp_path: Path) -> None:
    exported(tmp_path / "export", "pretrainer")
    assert load_export(tmp_path / "export")[1].kind == card("pretrainer").kind
