"""From text to tokens on disk and back, what is cached, and what an interruption leaves behind."""

import json
import os
import pathlib

import numpy as np
import pytest

import data.prepare
from cli import UserError
from data.config import DataConfig
from data.prepare import prepare
from data.store import TokenStore, exists, write_store
from data.tokenizer import fingerprint, save_tokenizer, train_tokenizer


@pytest.fixture
def config(shared_data, tmp_path) -> DataConfig:
    """A few scenes of Shakespeare as documents, with a cache of its own."""
    scenes = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:60_000].split("\n\n")
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(scenes[number::6]))
    files = tuple(str(tmp_path / f"{number}.txt") for number in range(4))
    held_out = tuple(str(tmp_path / f"{number}.txt") for number in (4, 5))
    return DataConfig(files=files, validation_files=held_out, tokenizer_kind="bpe", cache=str(tmp_path / "cache"))


def run(config, vocab_size=500, for_masked_lm=True, of_weights=None):
    return prepare(config, vocab_size, for_masked_lm=for_masked_lm, of_weights=of_weights)


def text_of(store, tokenizer) -> list[str]:
    return [
        tokenizer.decode(store.take(np.arange(a, b))) for a, b in zip(store.offsets, store.offsets[1:], strict=False)
    ]


def no_tokenizing(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("text is tokenized again")

    monkeypatch.setattr(data.prepare, "encode", refuse)
    monkeypatch.setattr("data.tokenizer.train_tokenizer", refuse)


def test_the_text_comes_back(config):
    prepared = run(config)
    for store, files in ((prepared.train, config.files), (prepared.validation, config.validation_files)):
        texts = [pathlib.Path(path).read_text() for path in files]
        assert text_of(store, prepared.tokenizer) == texts
        assert store.manifest["bytes"] == sum(len(text.encode()) for text in texts)
        assert store.manifest["dtype"] == "uint16"
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
        config = DataConfig(**{**vars(config), "tokenizer_kind": "wordpiece"})
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
    given = DataConfig(**{**vars(config), "tokenizer": str(tmp_path / "given")})
    assert run(given).fingerprints["tokenizer"] == fingerprint(tokenizer)


def test_the_tokenizer_of_the_weights_comes_first(config, tmp_path):
    tokenizer = train_tokenizer(["a few words of another text"] * 3, "bpe", 400)
    assert run(config, of_weights=tokenizer).fingerprints["tokenizer"] == fingerprint(tokenizer)
    save_tokenizer(train_tokenizer(["yet other words"], "bpe", 400), tmp_path / "given")
    given = DataConfig(**{**vars(config), "tokenizer": str(tmp_path / "given")})
    with pytest.raises(UserError, match="given is not the tokenizer that the weights were trained with"):
        run(given, of_weights=tokenizer)


def test_an_interruption_leaves_nothing(config, monkeypatch, tmp_path):
    encode = data.prepare.encode

    def interrupted(texts, tokenizer):
        for number, item in enumerate(encode(texts, tokenizer)):
            if number == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(data.prepare, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(left) == 1 and left[0].startswith("tokenizer-"), left
    monkeypatch.undo()
    assert text_of(run(config).train, run(config).tokenizer)[0] == pathlib.Path(config.files[0]).read_text()


@pytest.mark.parametrize("damage", ["gone", "empty", "shortened"])
@pytest.mark.parametrize("name", ["manifest.json", "offsets.npy", "tokens-00000.bin"])
def test_damaged_tokens_are_made_again(config, name, damage):
    path = run(config).train.folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2] if damage == "shortened" else b"")
    prepared = run(config)
    assert text_of(prepared.train, prepared.tokenizer)[0] == pathlib.Path(config.files[0]).read_text()


def test_a_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*--data.cache"):
        run(DataConfig(**{**vars(config), "cache": str(tmp_path / "file" / "cache")}))


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
        ("training a bpe tokenizer", *train),
        ("tokenizing train text", *train),
        ("tokenizing validation text", *validation),
    ]


def documents(lengths):
    return [(np.arange(length) + 10 * number, length) for number, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [[5, 9, 0, 30, 1], [21], [7, 7], [1]])
def test_shards_are_one_stream(tmp_path, lengths):
    expected = np.concatenate([tokens for tokens, _ in documents(lengths)])
    store = write_store(tmp_path / "store", iter(documents(lengths)), "uint32", {"about": 1}, shard_tokens=7)
    assert len(list(store.folder.glob("tokens-*.bin"))) == -(-len(expected) // 7)
    index = np.random.default_rng(0).permutation(len(expected))
    for opened in (store, TokenStore(tmp_path / "store")):
        np.testing.assert_array_equal(opened.take(index), expected[index])
        assert opened.take(index).dtype == np.int32
        np.testing.assert_array_equal(opened.counts(100), np.bincount(expected, minlength=100))
        assert np.diff(opened.offsets).tolist() == lengths


def test_the_faster_process_wins(tmp_path):
    """While this one tokenizes, another finishes: its folder is in use and must stay as it is."""
    folder = tmp_path / "store"

    def slow():
        yield from documents([3])
        write_store(folder, iter(documents([3, 4])), "uint16", {})
        (folder / "mark").touch()
        yield from documents([3, 4])[1:]

    store = write_store(folder, slow(), "uint16", {})
    assert (folder / "mark").exists() and exists(folder) and store.offsets[-1] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_empty_store(tmp_path):
    store = write_store(tmp_path / "store", iter([]), "uint16", {})
    assert exists(tmp_path / "store") and store.offsets.tolist() == [0] and not store.counts(9).any()


def test_command_line(config, run_cli, tmp_path):
    result = run_cli(
        *("data.prepare", "--data.files", *config.files, "--data.validation-files", *config.validation_files),
        *("--data.cache", config.cache, "--vocab-size", 500, "--json"),
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["train"]["documents"] == 4 and summary["vocab_size"] == 500
    assert "bytes a token" in result.stdout
