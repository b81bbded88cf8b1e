"""Training from a folder of images that nobody has converted."""

from pathlib import Path

from pipeline.data import main
from pipeline.datasets.manifest import read_image, read_manifest
from tests.conftest import Stages


def test_a_folder_gives_the_weights_that_its_shards_give(chain: Stages, tmp_path: Path) -> None:
    """Bit for bit, in stage 1: the same samples, indices, order and pixels, without and with data workers."""
    for name in ("train", "test"):
        digits = read_manifest(chain.digits / name)
        for sample_index in range(0, digits.num_samples, 3):
            label = digits.classes[int(digits.labels[sample_index])]
            path = tmp_path / "photos" / name / label / f"{sample_index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_image(digits, sample_index))
        main(["convert", "imagefolder", str(tmp_path / "photos" / name), "--out", str(tmp_path / "shards" / name)])
    weights = []
    for kind, workers in (("shards", 0), ("photos", 2)):
        data = [f"data.{name}={tmp_path / kind / name}" for name in ("train", "test")]
        run = chain.complete(
            "arm", *data, "data.split=null", f"data.loader.workers={workers}", f"run.experiment={kind}"
        )
        weights.append((run / "export" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
