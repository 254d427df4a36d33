"""The notebook of the documents runs from top to bottom, without its installation and its gigabytes."""

import os
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "colab.ipynb"
LEFT_OUT = {"install", "real"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # nbclient's
def test_the_notebook_runs(tmp_path, monkeypatch):
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    for name in ("sample", "train", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not LEFT_OUT & set(cell.metadata.get("tags", []))]
    kernel = AsyncKernelManager(
        kernel_name="python3", transport="ipc", ip=str(tmp_path / "socket")
    )  # ports may be taken
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, km=kernel, timeout=1800, resources=where)
    client.owns_km = True  # ends the kernel
    client.execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(shown) == 3 and (tmp_path / "outputs" / "text2img" / "00000-3.png").is_file()
