"""Tokens on disk: one stream in shards, what an interruption leaves behind, and damage that is found."""

import json
import pathlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from prepared import begins_of, documents, flip, items, run, scenes, text_of
from tokenizers import Tokenizer, models, pre_tokenizers

import espalier.data.encode
from espalier.data.config import DataConfig
from espalier.data.documents import Reject
from espalier.data.store import TokenStore, exists
from espalier.data.store_writer import write_store
from espalier.data.tokenizer import WORDPIECE_SPECIALS, save_tokenizer, wrap
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError


@pytest.fixture
def config(shared_data, tmp_path) -> DataConfig:
    return scenes(shared_data, tmp_path)


def test_an_interruption_loses_only_the_last_moments(config, monkeypatch, tmp_path):
    """Stopped after two batches of text, the same again begins with the third and ends with the same files."""
    monkeypatch.setattr("espalier.data.encode.BATCH_CHARACTERS", 5_000)
    whole = run(replace(config, cache=str(tmp_path / "undisturbed")))
    encode, seen = espalier.data.encode.encode, []

    def interrupted(items, tokenizer, words):
        for number, batch in enumerate(encode(items, tokenizer, words)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    def watched(items, tokenizer, words):
        for batch in encode(items, tokenizer, words):
            seen.append(len(batch))
            yield batch

    monkeypatch.setattr("espalier.data.encode.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not [path for path in (tmp_path / "cache").glob("tokens-*")]
    monkeypatch.setattr("espalier.data.encode.encode", watched)
    again = run(config)
    assert sum(seen) == 4 - 2 + 2, "documents: two of the four in training, and the two held-out ones"
    for side in ("train", "validation"):
        for here, there in zip(getattr(again, side).values(), getattr(whole, side).values(), strict=True):
            assert here.manifest == there.manifest and here.folder.name == there.folder.name


def test_a_torn_journal_and_a_torn_shard(config, monkeypatch, tmp_path):
    """What was written behind the last whole entry of the journal is cut off again."""
    monkeypatch.setattr("espalier.data.encode.BATCH_CHARACTERS", 5_000)
    encode = espalier.data.encode.encode

    def interrupted(items, tokenizer, words):
        for number, batch in enumerate(encode(items, tokenizer, words)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr("espalier.data.encode.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr("espalier.data.encode.encode", encode)
    (unfinished,) = (tmp_path / "cache").glob(".tokens-*.unfinished")
    journal = (unfinished / "journal.jsonl").read_bytes()
    (unfinished / "journal.jsonl").write_bytes(journal[:-20])
    with (unfinished / "tokens-00000.bin").open("ab") as file:
        file.write(b"torn")
    assert text_of(run(config).train["text"], run(config).tokenizer) == [
        pathlib.Path(path).read_text() for path in config.files
    ]


@pytest.mark.parametrize("damage", ["gone", "short", "torn"])
@pytest.mark.parametrize(
    "name",
    [
        *("tokens-00000.bin", "tokens-00002.bin", "offsets.bin", "rejects.jsonl", "journal.jsonl"),
        *("starts-00000.bin", "starts-00002.bin"),
    ],
)
def test_an_interrupted_store_that_lost_something(tmp_path, name, damage):
    """An earlier shard, the current one, borders, rejects, the journal itself: the end is the same, byte for byte."""
    wanted = [40, 3, 21, 30, 8, 17]

    def lists(done, end=None):
        every = [
            [*found, Reject(f"a:{number}", "json", "bad")] for number, found in enumerate(items(documents(wanted))(0))
        ]
        flat = [item for found in every for item in found]
        for at in range(done, len(flat) if end is None else end):
            yield [flat[at]]

    def interrupted(done):
        yield from lists(done, 8)
        raise KeyboardInterrupt

    about = {"words": {"Chinese": "a segmenter"}} if name.startswith("starts") else {}
    whole = write_store(tmp_path / "whole", lists, "uint16", about, shard_tokens=41)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", interrupted, "uint16", about, shard_tokens=41)
    path = tmp_path / ".store.unfinished" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 3] if damage == "short" else content[:-1])
    again = write_store(tmp_path / "store", lists, "uint16", about, shard_tokens=41)
    assert {path.name for path in again.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    for path in whole.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert not again.damaged() and len(again.manifest["shards"]) == 3


@pytest.mark.parametrize("name", ["tokens-00000.bin", "offsets.bin"])
def test_a_flipped_bit_is_found_at_first_use(config, name):
    prepared = run(config)
    path = prepared.train["text"].folder / name
    flip(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256.*prepare the text again"):
        run(config).train["text"].take(np.arange(3))


def test_only_the_shard_in_use_is_read(tmp_path):
    store = write_store(tmp_path / "store", items(documents([40])), "uint16", {}, shard_tokens=10)
    flip(store.folder / "tokens-00002.bin", 7)
    assert store.damaged() == [store.folder / "tokens-00002.bin"]
    opened = TokenStore(store.folder)
    assert opened.take(np.array([0, 19, 35])).tolist() == [0, 19, 35]
    with pytest.raises(UserError, match="tokens-00002.bin is damaged"):
        opened.take(np.array([20]))


def test_damaged_word_starts_are_found(tmp_path):
    about = {"words": {"Chinese": "a segmenter"}}
    store = write_store(tmp_path / "store", items(documents([40])), "uint16", about, shard_tokens=10)
    path = store.folder / "starts-00002.bin"
    flip(path, 1)
    assert store.damaged() == [path]
    opened = TokenStore(store.folder)
    opened.word_starts(np.array([0, 35]))
    with pytest.raises(UserError, match="starts-00002.bin is damaged"):
        opened.word_starts(np.array([20]))
    path.write_bytes(path.read_bytes()[:1])
    assert not exists(store.folder)


@pytest.mark.parametrize("damage", ["gone", "empty", "shortened"])
@pytest.mark.parametrize("name", ["manifest.json", "offsets.bin", "tokens-00000.bin", "rejects.jsonl"])
def test_damaged_tokens_are_made_again(config, name, damage):
    bad = pathlib.Path(config.files[0]).with_name("bad.jsonl")
    bad.write_text("no JSON\n")
    config = replace(config, files=(*config.files, str(bad)), max_rejected=0.5)
    path = run(config).train["text"].folder / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2] if damage == "shortened" else b"")
    prepared = run(config)
    assert path.read_bytes() == whole
    assert text_of(prepared.train["text"], prepared.tokenizer)[0] == pathlib.Path(config.files[0]).read_text()


@pytest.mark.parametrize("lengths", [[5, 9, 0, 30, 1], [21], [7, 7], [1]])
def test_shards_are_one_stream(tmp_path, lengths):
    expected = np.concatenate([tokens for tokens, _ in documents(lengths)])
    about = {"words": {"Chinese": "a segmenter"}}
    store = write_store(tmp_path / "store", items(documents(lengths)), "uint32", about, shard_tokens=7)
    assert len(list(store.folder.glob("tokens-*.bin"))) == -(-len(expected) // 7)
    index = np.random.default_rng(0).permutation(len(expected))
    for opened in (store, TokenStore(tmp_path / "store")):
        np.testing.assert_array_equal(opened.take(index), expected[index])
        assert opened.take(index).dtype == np.int32
        np.testing.assert_array_equal(opened.word_starts(index), begins_of(expected)[index])
        np.testing.assert_array_equal(opened.counts(100), np.bincount(expected, minlength=100))
        assert np.diff(opened.offsets).tolist() == lengths


def test_a_second_process_waits_and_takes_what_the_first_wrote(tmp_path):
    folder, begun, go_on = tmp_path / "store", threading.Event(), threading.Event()

    def slow(done):
        begun.set()
        assert go_on.wait(60)
        yield from items(documents([3, 4]))(done)

    def never(done):
        raise AssertionError("both write")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(write_store, folder, slow, "uint16", {})
        assert begun.wait(60)
        second = pool.submit(write_store, folder, never, "uint16", {})
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        assert first.result().manifest == second.result().manifest
    assert exists(folder)


def test_an_empty_store(tmp_path):
    store = write_store(tmp_path / "store", items([]), "uint16", {})
    assert exists(tmp_path / "store") and store.offsets.tolist() == [0] and not store.counts(9).any()


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_as_many_tokens_as_two_bytes_hold_and_one_more(tmp_path, size, dtype):
    """The greatest id comes back."""
    specials = list(WORDPIECE_SPECIALS.values())
    vocabulary = {token: number for number, token in enumerate(specials)}
    vocabulary |= {f"w{number}": number for number in range(len(specials), size)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    save_tokenizer(wrap(backend, WORDPIECE_SPECIALS), tmp_path / "tokenizer")
    numbers = [size - 1, 5, size - 2, 1000]
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in numbers))
    (tmp_path / "b.txt").write_text("w7")
    config = DataConfig(
        files=(f"{tmp_path}/a.txt",),
        validation_files=(f"{tmp_path}/b.txt",),
        tokenizer=str(tmp_path / "tokenizer"),
        cache=str(tmp_path / "cache"),
    )
    store = run(config).train["text"]
    assert store.manifest["dtype"] == dtype and store.take(np.arange(4)).tolist() == numbers
    assert (store.folder / "tokens-00000.bin").stat().st_size == 4 * np.dtype(dtype).itemsize


def test_a_killed_preparation_goes_on_with_the_same_bytes(shared_data, tmp_path, start_cli, capsys):
    """A real process, really killed in the middle of its tokens; twice."""
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(6):
            for at in range(0, len(text), 2000):
                file.write(
                    json.dumps({"text": f"{number} {text[at : at + 2000]}"}) + "\n" + "bad\n" * (at % 99_000 == 0)
                )
    (tmp_path / "b.txt").write_text(text[:5000])
    save_tokenizer(train_tokenizer([text[:100_000]], "bpe", 1000), tmp_path / "tokenizer")

    def settings(cache: str) -> DataConfig:
        files, held_out, tokenizer, folder = (str(tmp_path / name) for name in ("a.jsonl", "b.txt", "tokenizer", cache))
        return DataConfig(files=(files,), validation_files=(held_out,), tokenizer=tokenizer, cache=folder)

    command = (
        *("espalier.data.prepare", "--data.files", tmp_path / "a.jsonl", "--data.validation-files", tmp_path / "b.txt"),
        *("--data.tokenizer", tmp_path / "tokenizer", "--data.cache", tmp_path / "killed", "--vocab-size", 1000),
    )
    run(settings("whole"), 1000)
    for entries in (2, 5):
        process = start_cli(*command)
        while True:
            assert process.poll() is None, process.communicate()
            journals = list((tmp_path / "killed").glob(".tokens-*.unfinished/journal.jsonl"))
            if journals and journals[0].read_bytes().count(b"\n") >= entries:
                break
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not list((tmp_path / "killed").glob("tokens-*"))
    run(settings("killed"), 1000)
    assert "tokenizing train text: continuing after" in capsys.readouterr().out
    whole, killed = (
        {
            str(path.relative_to(tmp_path / cache)): path.read_bytes()
            for path in (tmp_path / cache).glob("tokens-*/*")
            if path.name != "lengths.svg"
        }
        for cache in ("whole", "killed")
    )
    assert killed == whole and len(whole) == 8
    assert not list((tmp_path / "killed").glob(".tokens-*.unfinished"))
