"""From text to tokens on disk and back, and what is cached."""

import json
import os
import pathlib
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from prepared import flip, run, scenes, text_of

import espalier.data.encode
from espalier.data.config import DataConfig
from espalier.data.filters import FilterConfig
from espalier.data.packing import fill, pack_best_fit, pack_split
from espalier.data.sources import FileSource
from espalier.data.store_writer import write_store
from espalier.data.tokenizer import fingerprint, plain_backend, save_tokenizer
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def config(shared_data, tmp_path) -> DataConfig:
    return scenes(shared_data, tmp_path)


def no_tokenizing(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("text is tokenized again")

    monkeypatch.setattr("espalier.data.encode.encode", refuse)
    monkeypatch.setattr("espalier.data.train_tokenizer.train_tokenizer", refuse)


def test_the_text_comes_back(config):
    prepared = run(config)
    for store, files in (
        (prepared.train["text"], config.files),
        (prepared.validation["validation"], config.validation_files),
    ):
        texts = [pathlib.Path(path).read_text() for path in files]
        assert text_of(store, prepared.tokenizer) == texts
        assert store.manifest["bytes"] == sum(len(text.encode()) for text in texts)
        assert store.manifest["dtype"] == "uint16"
        side = "train" if files is config.files else "validation"
        assert store.manifest["source"] == prepared.fingerprints[side]
        assert store.manifest["source"] == FileSource(files).fingerprint()
        assert store.manifest["tokenizer"] == fingerprint(prepared.tokenizer) == prepared.fingerprints["tokenizer"]
        counts = store.counts(500)
        assert counts.sum() == store.offsets[-1] and counts[prepared.tokenizer.encode("the")[1]] > 0


def test_the_same_again_is_read_from_the_cache(config, monkeypatch):
    first = run(config)
    no_tokenizing(monkeypatch)
    assert run(config).fingerprints == first.fingerprints


@pytest.mark.parametrize("change", ["text", "validation", "kind", "size", "specials"])
def test_whatever_changes_is_made_again(config, change):
    first = run(config).fingerprints
    size, for_masked_lm = 500, True
    if change in ("text", "validation"):
        path = (config.files if change == "text" else config.validation_files)[0]
        with open(path, "a") as file:
            file.write(" Exeunt, pursued by a bear.")
    if change == "kind":
        config = replace(config, tokenizer_kind="wordpiece")
    if change == "size":
        size = 450
    if change == "specials":
        for_masked_lm = False
    second = run(config, size, for_masked_lm).fingerprints
    changed = {name for name in first if first[name] != second[name]}
    # Held-out text must not reach the tokenizer.
    expected = {"text": {"tokenizer", "train"}, "validation": {"validation"}}
    assert changed == expected.get(change, {"tokenizer"})


def test_a_given_tokenizer_is_used(config, tmp_path):
    tokenizer = train_tokenizer(["a few words of another text"] * 3, "bpe", 400)
    save_tokenizer(tokenizer, tmp_path / "given")
    given = replace(config, tokenizer=str(tmp_path / "given"))
    assert run(given).fingerprints["tokenizer"] == fingerprint(tokenizer)


def test_the_tokenizer_of_the_weights_comes_first(config, tmp_path):
    tokenizer = train_tokenizer(["a few words of another text"] * 3, "bpe", 400)
    assert run(config, of_weights=tokenizer).fingerprints["tokenizer"] == fingerprint(tokenizer)
    save_tokenizer(train_tokenizer(["yet other words"], "bpe", 400), tmp_path / "given")
    given = replace(config, tokenizer=str(tmp_path / "given"))
    with pytest.raises(UserError, match="given is not the tokenizer that the weights were trained with"):
        run(given, of_weights=tokenizer)


def test_rejects_that_are_gone_and_too_many(config, tmp_path):
    """What cannot be shown is written again, and the command ends by its reason."""
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    config = replace(config, files=(*config.files, f"{tmp_path}/bad.jsonl"), max_rejected=0.5)
    store = run(config).train["text"]
    (store.folder / "rejects.jsonl").unlink()
    with pytest.raises(UserError, match="1 of 5 records are bad.*bad.jsonl:1: not JSON"):
        run(replace(config, max_rejected=0.1))
    flip(run(config).train["text"].folder / "rejects.jsonl", 5)
    assert store.damaged() == [store.folder / "rejects.jsonl"]


@pytest.mark.parametrize("damage", ["shortened", "altered", "one file gone"])
def test_a_damaged_tokenizer_is_trained_again(config, damage, tmp_path, capsys):
    first = run(config)
    (path,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    whole = path.read_text()
    if damage == "shortened":
        path.write_text(whole[: len(whole) // 2])
    elif damage == "altered":
        path.write_text(whole.replace('"Ġthe"', '"Ġteh"'))
    else:
        path.with_name("tokenizer_config.json").unlink()
    capsys.readouterr()
    again = run(config)
    assert again.fingerprints == first.fingerprints and path.read_text() == whole
    assert again.train["text"].folder == first.train["text"].folder
    assert f"{path.parent} is damaged: its SHA-256 sums are not" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*--data.cache"):
        run(replace(config, cache=str(tmp_path / "file" / "cache")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": FilterConfig(min_characters=10**6)}, "train text of plays makes no row.*dropped 4 by characters"),
        (
            {"filters": FilterConfig(max_tokens_per_character=1e-6)},
            "train text of plays makes no row.*dropped 4 by tokens per character; change --data.filters",
        ),
        (
            {"validation_fraction": 0.999},
            "train text of plays makes no row.*too short to hold a part of 0.999 out.*--data.validation-fraction",
        ),
        ({"validation_fraction": 1e-9}, "validation text of plays makes no row.*a part of 1e-09 out"),
    ],
)
def test_nothing_left_is_told_of_with_source_and_side(config, settings, message, tmp_path):
    """Other sources may have plenty."""
    save_tokenizer(train_tokenizer(["the words of a text"] * 9, "bpe", 400), tmp_path / "given")
    if "validation_fraction" in settings:
        many = 40 if settings["validation_fraction"] > 0.5 else 1
        lines = [[f"{number}-{line}" for line in range(many)] for number in range(4)]
        for path, some in zip(config.files, lines, strict=True):
            pathlib.Path(path).with_suffix(".jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in some))
        config = replace(config, files=tuple(path.replace(".txt", ".jsonl") for path in config.files))
    books = tuple(f"books={path}" for path in config.validation_files)
    plays = tuple(f"plays={path}" for path in config.files)
    without = replace(config, files=(), validation_files=(), sources=plays + books, tokenizer=str(tmp_path / "given"))
    with pytest.raises(UserError, match=message) as error:
        run(replace(without, **settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_nothing_left_to_train_a_tokenizer_on(config, kind, capfd):
    config = replace(config, validation_files=(), tokenizer_kind=kind, filters=FilterConfig(min_characters=10**6))
    with pytest.raises(UserError, match="train text makes no row of tokens: the filters have dropped 4 by characters"):
        run(config)
    assert not capfd.readouterr().err, "the library that trains tokenizers has something to say"


def test_progress_bars_know_the_whole(config, monkeypatch):
    """Training the tokenizer and tokenizing both parts: each bar ends where it said that it would."""
    bars = []

    class Bar:
        def __init__(self, desc, total, **options):
            self.desc, self.total, self.n = desc, total, 0

        def update(self, n):
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *error):
            bars.append((self.desc, self.n, self.total))

    monkeypatch.setattr("tqdm.tqdm", Bar)
    run(config)
    sizes = [sum(os.path.getsize(path) for path in files) for files in (config.files, config.validation_files)]
    train, validation = ((size, size) for size in sizes)
    assert bars == [
        ("reading text for the tokenizer", *train),
        ("tokenizing train text", *train),
        ("tokenizing validation text", *validation),
    ]


def test_real_books_fill_their_rows(shared_data, tmp_path):
    """As masked LM and causal LM read them; books cut at blank lines, as documents of some 2,000 characters, too."""
    books = [path for path in sorted((shared_data / "books" / "train").iterdir())[:8]]
    with (tmp_path / "parts.jsonl").open("w") as file:
        for path in books[:4]:
            text = path.read_text()
            for at in range(0, len(text), 2000):
                file.write(json.dumps({"text": text[at : at + 2000]}) + "\n")
    save_tokenizer(train_tokenizer([books[0].read_text()], "wordpiece", 4000), tmp_path / "tokenizer")
    for files in (tuple(map(str, books)), (f"{tmp_path}/parts.jsonl",)):
        config = DataConfig(files=files, tokenizer=str(tmp_path / "tokenizer"), cache=str(tmp_path / "cache"))
        offsets = run(config).train["text"].offsets
        assert offsets[-1] > 200_000
        for length in (128, 512):
            assert fill(pack_best_fit(offsets, length), length) >= 0.99
            assert fill(pack_split(offsets, length), length) >= 0.99


def test_books_fill_their_rows(shared_data):
    """Best fit and split, at usual lengths; lengths are estimated as four characters a token."""
    sizes = [path.stat().st_size // 4 for path in sorted((shared_data / "books" / "train").iterdir())]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    for length in (128, 512, 1024):
        assert fill(pack_best_fit(offsets, length), length) >= 0.99
        assert fill(pack_split(offsets, length), length) >= 0.99


@pytest.mark.slow
def test_tokenizing_is_as_fast_as_the_library(shared_data, tmp_path):
    """With reading, parsing and writing, at least nine tenths of what encode_batch alone does; the best of three."""
    texts = [path.read_text() for path in sorted((shared_data / "books" / "train").iterdir())[:20]]
    chunks = [text[at : at + 2000] for text in texts for at in range(0, len(text), 2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chunk}) + "\n" for chunk in chunks))
    tokenizer = train_tokenizer(texts[:2], "wordpiece", 8000)
    backend, source = plain_backend(tokenizer), FileSource((f"{tmp_path}/a.jsonl",))
    raw, ours = [], []
    for number in range(3):
        begun = time.perf_counter()
        for at in range(0, len(chunks), 1000):
            backend.encode_batch(chunks[at : at + 1000], add_special_tokens=False)
        raw.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        write_store(tmp_path / f"{number}", lambda done: espalier.data.encode.encode(source, tokenizer), "uint16", {})
        ours.append(time.perf_counter() - begun)
    assert min(raw) / min(ours) >= 0.9


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_text(shared_data, tmp_path):
    """Seven times the text, in fresh processes: less than a tenth of what was added stays in memory.

    As much is added as puts the tenth beyond what one run differs from another, 10 MB.
    """
    texts = [path.read_text()[:20_000] for path in sorted((shared_data / "books" / "train").iterdir())]
    save_tokenizer(train_tokenizer(["the words of some text"] * 9, "bpe", 400), tmp_path / "tokenizer")
    peaks, sizes = [], []
    for number, times in enumerate((20, 140)):
        path = tmp_path / f"{number}.jsonl"
        # No two are the same, or all copies of a text would fall to the same side.
        lines = (json.dumps({"text": f"{copy} {text}"}) + "\n" for copy in range(times) for text in texts)
        path.write_text("".join(lines))
        sizes.append(path.stat().st_size)
        code = (
            "import re; from espalier.data.config import DataConfig; from espalier.data.prepare import prepare\n"
            f"prepare(DataConfig(files=({str(path)!r},), tokenizer={str(tmp_path / 'tokenizer')!r}, "
            f"cache={str(tmp_path / f'cache{number}')!r}), 400, for_masked_lm=False)\n"
            # Not ru_maxrss, which begins with what the parent process had.
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(int(run.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 0.1 * (sizes[1] - sizes[0]), (peaks, sizes)


@pytest.mark.slow
def test_the_device_hardly_waits_for_data(run_cli, tmp_path):
    result = run_cli("mlm.pretrain", "debug", "--steps", 300, "--run-dir", tmp_path / "run", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["data_wait"] < 0.02
