"""Training on text of one's own, end to end: mixtures and what is told of them, and text that is not what it was."""

import json
import pathlib
import re
import shutil

import pytest

QUICK = ("--eval-rows", 8, "--log-every", 1, "--eval-every", 4, "--checkpoint.every", 2, "--json")


@pytest.fixture
def texts(tmp_path, shared_data) -> pathlib.Path:
    """Two sources: the beginning of Shakespeare, and a book, of which there is less."""
    folder = tmp_path / "texts"
    folder.mkdir()
    play = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:120_000]
    book = next(path for path in sorted((shared_data / "books" / "train").iterdir())).read_text()[:40_000]
    for name, text in (("plays", play), ("books", book)):
        lines = (json.dumps({"text": text[at : at + 1000]}) + "\n" for at in range(0, len(text), 1000))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def last_json(result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mixture", ["books=0.75,plays=0.25", None])
def test_a_mixture_from_text_to_report(call_cli, tmp_path, texts, mixture):
    """Each source's share and epochs, in the summary and in the report for people."""
    steps, batch = 12, 8
    result = call_cli(
        *("mlm.pretrain", "debug", "--run-dir", tmp_path / "run", *QUICK, "--steps", steps),
        *("--data.sources", f"plays={texts}/plays.jsonl", f"books={texts}/books.jsonl", "--data.cache", tmp_path / "c"),
        *(("--data.mixture", mixture) if mixture else ()),
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"] == last_json(result)["data"] and list(summary["data"]) == ["plays", "books"]
    entries = summary["data"]
    rows = {name: entry["rows"] for name, entry in entries.items()}
    assert rows["plays"] > 2 * rows["books"] > 0
    expected = {"plays": 0.25, "books": 0.75} if mixture else {name: n / sum(rows.values()) for name, n in rows.items()}
    for name, entry in entries.items():
        assert entry["share"] == pytest.approx(expected[name], abs=2 / (steps * batch) if mixture else 1e-9)
        assert entry["epochs"] == pytest.approx(entry["share"] * steps * batch / entry["rows"]) and entry["epochs"] > 0
    report = (tmp_path / "run" / "report.html").read_text()
    for name, entry in entries.items():
        shown = re.search(rf"<summary>{name}</summary>.*?<dt>epochs</dt><dd[^>]*>(.*?)</dd>", report, re.DOTALL)
        assert shown and float(shown[1]) == pytest.approx(entry["epochs"], rel=1e-3)
    assert summary["loss"] < 8 and "loss" in summary["eval"]


@pytest.mark.parametrize("change", ["text", "given tokenizer", "tokenizer of the run"])
def test_another_text_or_tokenizer_is_refused_before_a_step(call_cli, tmp_path, texts, change):
    run_dir = tmp_path / "run"

    def pretrain(*flags, **options):
        return call_cli(
            *("mlm.pretrain", "debug", "--run-dir", run_dir, *QUICK, "--steps", 4, "--data.cache", tmp_path / "cache"),
            *("--data.files", f"{texts}/plays.jsonl", *flags),
            **options,
        )

    assert last_json(pretrain("--stop-at", 2))["step"] == 2
    before = contents(run_dir)
    flags: tuple = ()
    if change == "text":
        with (texts / "plays.jsonl").open("a") as file:
            file.write('{"text": "Exeunt, pursued by a bear."}\n')
        message = "fingerprints.train was"
    elif change == "given tokenizer":
        shutil.copytree(run_dir / "tokenizer", tmp_path / "other")
        path = tmp_path / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace('"the"', '"teh"', 1))
        flags, message = ("--data.tokenizer", tmp_path / "other"), "tokenizer"
    else:
        path = run_dir / "tokenizer" / "tokenizer.json"
        path.write_text(path.read_text().replace('"the"', '"teh"', 1))
        before["tokenizer/tokenizer.json"] = path.read_bytes()
        message = "tokenizer"
    result = pretrain(*flags, code=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    after = contents(run_dir)
    assert after == before and any(name.startswith("checkpoints/2/") for name in after)
    assert "step 3" not in result.stdout
