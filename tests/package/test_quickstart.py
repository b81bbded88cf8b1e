"""The quickstart notebook runs from its first cell to its last in an empty folder, with nothing but the package."""

import base64
import io
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import ENVIRONMENT, ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


# pyzmq leaves sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_quickstart_runs_as_written_and_shows_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    (picture,) = (o.data["image/png"] for o in outputs if o.output_type == "display_data")
    assert Image.open(io.BytesIO(base64.b64decode(picture))).width > 500
    (metrics,) = (
        o.data["text/plain"] for o in outputs if "test/teacher_top1" in o.get("data", {}).get("text/plain", "")
    )
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert said.count("exported runs/quickstart/") == 3
    assert "image 5  " in said
    assert metrics
