from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def test_the_quickstart_runs_and_shows_its_pictures(tmp_path, monkeypatch, data_dir):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    # Plain JAX, as a user has it: the strict settings of these tests do not reach the kernel.
    notebook = nbformat.read(ROOT / "launch" / "colab" / "quickstart.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if cell.source.startswith("WORKDIR ="))
    settings.source = f"WORKDIR = {str(tmp_path / 'run')!r}\nDENSE_EPOCHS, PRUNE_EPOCHS = 2, 21"
    config = next(cell for cell in notebook.cells if "config = get_config()" in cell.source)
    few = """config = get_config()
config.model, config.gate.channel_ratio = "networks:small_vgg", (0.3, 0.5)
config.gate.column_ratio, config.data.train_examples = (0.0, 0.3), 256"""
    config.source = config.source.replace("config = get_config()", few)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 4
    assert (tmp_path / "run" / "report.json").exists()
    assert not [out for out in outputs if out.output_type == "error"]


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(ROOT / "launch" / "colab" / "quickstart.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
