"""From text to tokens on disk and back, what is cached, and what an interruption leaves behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import espalier.data.encode
from espalier.data.config import DataConfig
from espalier.data.documents import Reject
from espalier.data.filters import FilterConfig
from espalier.data.packing import fill, pack_best_fit, pack_split
from espalier.data.prepare import prepare
from espalier.data.sources import FileSource
from espalier.data.store import Encoded, TokenStore, exists
from espalier.data.store_writer import write_store
from espalier.data.summary import draw_lengths
from espalier.data.tokenizer import WORDPIECE_SPECIALS, fingerprint, plain_backend, save_tokenizer, wrap
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"

ROOT = pathlib.Path(__file__).resolve().parent.parent


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


def flip(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


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


def test_verify_names_the_damaged_file(config, run_cli):
    arguments = (
        *("espalier.data.prepare", "--data.files", *config.files, "--data.validation-files", *config.validation_files),
        *("--data.tokenizer-kind", "bpe", "--data.cache", config.cache, "--vocab-size", 500, "--verify"),
    )
    assert "verified: 2 stores and their tokenizer" in run_cli(*arguments).stdout
    folder = run(config).train["text"].folder
    manifest = (folder / "manifest.json").read_text()
    size = json.loads(manifest)["bytes"]
    (folder / "manifest.json").write_text(manifest.replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    assert f"{folder}/manifest.json is damaged" in run_cli(*arguments, code=2).stderr
    (folder / "manifest.json").write_text(manifest)
    flip(folder / "tokens-00000.bin", 1000)
    result = run_cli(*arguments, code=2)
    assert f"{folder}/tokens-00000.bin" in result.stderr and len(result.stderr.splitlines()) == 1


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
def test_nothing_left_to_train_a_tokenizer_on(config, kind, run_cli):
    result = run_cli(
        *("espalier.data.prepare", "--data.files", *config.files, "--data.tokenizer-kind", kind, "--vocab-size", 500),
        *("--data.cache", config.cache, "--data.filters.min-characters", 10**6),
        code=2,
    )
    assert "train text makes no row of tokens: the filters have dropped 4 by characters" in result.stderr
    assert len(result.stderr.splitlines()) == 1


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


def documents(lengths):
    return [(np.arange(length) + 10 * number, length) for number, length in enumerate(lengths)]


def items(documents):
    """What write_store asks for: the documents behind the first `done`, each in a list of its own."""
    return lambda done: ([Encoded(tokens, size, size, begins_of(tokens))] for tokens, size in documents[done:])


def begins_of(tokens: np.ndarray) -> np.ndarray:
    return tokens * 7 % 5 < 2


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


def test_command_line(config, run_cli, tmp_path):
    result = run_cli(
        *("espalier.data.prepare", "--data.files", *config.files, "--data.validation-files", *config.validation_files),
        *("--data.cache", config.cache, "--vocab-size", 500, "--json"),
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["train"]["documents"] == 4 and summary["vocab_size"] == 500
    assert "bytes a token" in result.stdout


def test_the_lengths_as_a_picture(config, run_cli):
    result = run_cli(
        *("espalier.data.prepare", "--data.files", *config.files, "--data.validation-files", *config.validation_files),
        *("--data.cache", config.cache, "--data.tokenizer-kind", "bpe", "--vocab-size", 500, "--json"),
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    picture = pathlib.Path(summary["picture"])
    assert picture == run(config).train["text"].folder / "lengths.svg"
    texts = ["".join(element.itertext()).strip() for element in ElementTree.parse(picture).iter(f"{SVG}text")]
    assert "row of 128 tokens" in texts and "tokens in a document" in texts
    assert f"lengths:    {picture}" in result.stdout


def test_the_names_of_sources_stand_in_the_picture_in_any_script(config, tmp_path, recwarn):
    stores = run(config).train
    path = draw_lengths({"故事": stores["text"], "网页": stores["text"]}, 128, tmp_path / "lengths.svg")
    texts = ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter(f"{SVG}text")]
    documents = len(stores["text"].offsets) - 1
    assert {f"故事: {documents} documents", f"网页: {documents} documents"} <= set(texts)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


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


def test_a_killed_preparation_goes_on_with_the_same_bytes(shared_data, tmp_path, start_cli, run_cli):
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

    def command(cache: str) -> tuple:
        return (
            *("espalier.data.prepare", "--data.files", tmp_path / "a.jsonl"),
            *("--data.validation-files", tmp_path / "b.txt"),
            *("--data.tokenizer", tmp_path / "tokenizer", "--data.cache", tmp_path / cache, "--vocab-size", 1000),
        )

    run_cli(*command("whole"))
    for entries in (2, 5):
        process = start_cli(*command("killed"))
        while True:
            assert process.poll() is None, process.communicate()
            journals = list((tmp_path / "killed").glob(".tokens-*.unfinished/journal.jsonl"))
            if journals and journals[0].read_bytes().count(b"\n") >= entries:
                break
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not list((tmp_path / "killed").glob("tokens-*"))
    again = run_cli(*command("killed"))
    assert "tokenizing train text: going on behind" in again.stdout
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


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(shared_data, tmp_path):
    """Four times the text, in fresh processes: less than a tenth of what was added stays in memory."""
    texts = [path.read_text()[:20_000] for path in sorted((shared_data / "books" / "train").iterdir())]
    save_tokenizer(train_tokenizer(["the words of some text"] * 9, "bpe", 400), tmp_path / "tokenizer")
    peaks, sizes = [], []
    for number, times in enumerate((20, 80)):
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
