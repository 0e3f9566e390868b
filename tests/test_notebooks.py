"""Every notebook runs from top to bottom, on small settings and without a network; what is committed has no outputs."""

import dataclasses
import json
import os
import pathlib

import nbclient
import nbformat
import pytest
from quick import xla_flags
from tiny_models import BERT, random_params

from espalier.data.tokenizer import vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.models.hub import save_pretrained

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = {
    "论语": "子曰：“学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？”"
    "曾子曰：“吾日三省吾身：为人谋而不忠乎？与朋友交而不信乎？传不习乎？”子曰：“温故而知新，可以为师矣。”"
    "子曰：“学而不思则罔，思而不学则殆。”子曰：“三人行，必有我师焉。择其善者而从之，其不善者而改之。”",
    "道德经": "道可道，非常道。名可名，非常名。无名天地之始；有名万物之母。上善若水。水善利万物而不争，处众人之所恶，"
    "故几于道。合抱之木，生于毫末；九层之台，起于累土；千里之行，始于足下。知人者智，自知者明。胜人者有力，自胜者强。",
    "孙子": "孙子曰：兵者，国之大事，死生之地，存亡之道，不可不察也。知彼知己者，百战不殆；不知彼而知己，一胜一负；"
    "不知彼，不知己，每战必殆。故善战者，立于不败之地，而不失敌之败也。兵贵胜，不贵久。",
}


def number(path):
    return path.stem.split("-")[0]


def test_there_are_notebooks_and_the_readme_names_each():
    assert len(NOTEBOOKS) >= 3
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in README, f"{path.name} is not in the README"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=number)
def test_a_notebook_is_committed_as_it_was_written(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert set(notebook["metadata"]) == {"colab", "kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert notebook["cells"][0]["cell_type"] == "markdown" and notebook["cells"][0]["source"][0].startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=number)
def test_a_notebook_runs(path, tmp_path, shared_data, monkeypatch):
    texts = tmp_path / "corpus"
    texts.mkdir()
    if "中文" in path.stem:
        for name, text in CHINESE.items():
            (texts / f"{name}.txt").write_text(text * 40, encoding="utf-8")
    else:
        for book in sorted((shared_data / "books" / "train").glob("*"))[:3]:
            (texts / f"{book.stem}.txt").write_text(book.read_text(encoding="utf-8")[2000:42_000], encoding="utf-8")
    settings = {
        "ESPALIER_SMALL": "1",
        "ESPALIER_TEXT": str(texts),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(1),
        "HF_HUB_OFFLINE": "1",
        "JPY_SESSION_NAME": "",
        # What libraries say of themselves is kept out of the cells, though all of it is asked for.
        "PYTHONWARNINGS": "default",
    }
    if "hub" in path.stem:
        tokenizer = train_tokenizer([(ROOT / "README.md").read_text(encoding="utf-8")] * 2, "wordpiece", 400)
        config = dataclasses.replace(BERT, vocab_size=vocabulary_size(tokenizer))
        save_pretrained(tmp_path / "hub", config, random_params(config, ("masked_lm",)), tokenizer, head="masked_lm")
        settings["ESPALIER_MODEL"] = f"hf:{tmp_path / 'hub'}"
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    # Nothing but our own lines: no warnings of libraries, no orders to a terminal. That the tiny model of a few steps
    # learnt nothing is ours to say; whether it did depends on the processor's arithmetic.
    ours = "warning: every validation "
    others = [line for line in printed.splitlines() if not line.startswith(ours)]
    assert [line for line in others if "\033[" in line or "warning" in line.lower()] == []
    assert any("text/html" in output.get("data", {}) for output in outputs)
    if os.environ.get("ESPALIER_KEEP_NOTEBOOKS"):
        nbformat.write(notebook, pathlib.Path(os.environ["ESPALIER_KEEP_NOTEBOOKS"]) / path.name)


def test_words_of_libraries_that_work_for_us_go_to_a_log(tmp_path, monkeypatch):
    """The user's own words, and those of libraries that the user calls, stay in the cell."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "always")
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    cells = (
        "import espalier, optax, sys, warnings\nimport numpy as np",
        "print('mine'); warnings.warn('take care')",
        "optax.global_norm(np.ones(2))",
        # A function as if it stood in a file of ours.
        "exec(compile('def ours(): return optax.global_norm(np.ones(2))', espalier.__file__, 'exec')); float(ours())",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert "mine" in printed[1] and "UserWarning: take care" in printed[1]
    assert "optax.global_norm is deprecated" in printed[2]
    assert printed[3] == "" and notebook.cells[3].outputs[0]["data"]["text/plain"].startswith("1.41")
    (log,) = (tmp_path / "cache" / "logs").iterdir()
    assert log.read_text().count("optax.global_norm is deprecated") == 1
