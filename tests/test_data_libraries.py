"""Data sets of Hugging Face and of tensorflow-datasets, prepared here and read back."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
import types
import warnings

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from espalier.data.config import DataConfig
from espalier.data.documents import Document, Reject
from espalier.data.hf import HfSource
from espalier.data.prepare import prepare
from espalier.data.sources import open_source
from espalier.data.tfds import TfdsSource
from espalier.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::Warning:(datasets|tensorflow_datasets|etils|fsspec|multiprocess).*")


@pytest.fixture(scope="module")
def lines(shared_data) -> list[str]:
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:40_000]
    return [scene for scene in text.split("\n\n") if scene.strip()]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def texts(source) -> list[str]:
    return [item.text for item in source if isinstance(item, Document)]


def test_a_saved_data_set_by_content_not_place(tmp_path, lines):
    datasets.Dataset.from_dict({"text": lines, "id": list(range(len(lines)))}).save_to_disk(tmp_path / "a")
    source = HfSource(f"{tmp_path}/a")
    assert texts(source) == lines == texts(source) and source.approximate is None
    assert next(iter(source)).name == f"{tmp_path}/a:1"
    assert (source.size() or 0) >= len("".join(lines))
    here = source.fingerprint()
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert HfSource(f"{tmp_path}/b").fingerprint() == here
    datasets.Dataset.from_dict({"text": lines[1:]}).save_to_disk(tmp_path / "c")
    assert HfSource(f"{tmp_path}/c").fingerprint() != here


def test_splits_and_columns(tmp_path, lines):
    parts = {"train": datasets.Dataset.from_dict({"body": lines}), "test": datasets.Dataset.from_dict({"body": ["x"]})}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "a")
    assert texts(HfSource(f"{tmp_path}/a?split=test", "body")) == ["x"]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        HfSource(f"{tmp_path}/a?split=dev", "body").fingerprint()
    with pytest.raises(UserError, match="no column 'text'; there are 'body'"):
        HfSource(f"{tmp_path}/a").fingerprint()
    with pytest.raises(UserError, match="expected hf:ID_OR_FOLDER"):
        HfSource(f"{tmp_path}/a?spilt=test")


def test_a_folder_of_files_and_a_stream(tmp_path, lines, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert texts(HfSource(f"{tmp_path}/a")) == lines
    stream = HfSource(f"{tmp_path}/a?streaming=true&take=5")
    assert texts(stream) == lines[:5]
    config = DataConfig(
        files=(f"hf:{tmp_path}/a?streaming=true&take=60",), tokenizer_kind="bpe", cache=str(tmp_path / "cache")
    )
    prepare(config, 400, for_masked_lm=False)
    assert "a resume is approximate" in capsys.readouterr().out


def test_bad_rows_are_told_of(tmp_path):
    raw = pyarrow.array([b"good", b"\xff", None, b"good"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers(), raw.null_count)
    (tmp_path / "a").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "id": [1, 2, 3, 4]}), tmp_path / "a" / "train.parquet")
    items = list(HfSource(f"{tmp_path}/a"))
    assert [item.text if isinstance(item, Document) else item.kind for item in items] == [
        "good",
        "utf-8",
        "field",
        "good",
    ]
    kinds = {item.kind for item in HfSource(f"{tmp_path}/a", "id") if isinstance(item, Reject)}
    assert kinds == {"type"}


def test_a_text_that_is_too_long(tmp_path):
    """Bytes are counted, not characters; the limit is part of what the text is."""
    some = ["good", "ä" * 600, "x" * 1000]
    datasets.Dataset.from_dict({"text": some}).save_to_disk(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    for spec in (f"hf:{tmp_path}/a", f"hf:{tmp_path}/b?streaming=true", f"tfds:{prepared(tmp_path, some, 'parquet')}"):
        source = open_source((spec,), DataConfig(files=(spec,), max_document_bytes=1000))
        rejects = [item for item in source if isinstance(item, Reject)]
        assert [item.kind for item in rejects] == ["long"] and "1,200 bytes; at most 1,000" in rejects[0].message
        assert sorted(map(len, texts(source))) == [4, 1000]
        assert source.fingerprint() != open_source((spec,), DataConfig(files=(spec,))).fingerprint()


def test_rows_in_another_order(tmp_path, lines):
    """A data set that was shuffled or cut before it was saved."""
    whole = datasets.Dataset.from_dict({"text": lines})
    chosen = list(range(len(lines) - 1, 2, -3))
    whole.select(chosen).save_to_disk(tmp_path / "a")
    assert texts(HfSource(f"{tmp_path}/a")) == [lines[number] for number in chosen]
    source = HfSource("whole")
    source._opened = whole.select(chosen)
    assert texts(source) == [lines[number] for number in chosen] and len(source.fingerprint()) == 64


@pytest.mark.parametrize("spec", ["hf:", "tfds:", "builtin:", "hf:?split=train", "tfds:?split=train"])
def test_a_library_with_nothing_behind_it(spec):
    with pytest.raises(UserError, match=rf"names no text; expected {spec.split(':')[0]}:"):
        open_source((spec,), DataConfig(files=(spec,)))


def test_what_is_asked_of_the_hub(monkeypatch):
    """An id that is no folder goes to `datasets` with all that was said; without network, no more can be tried."""
    asked, files = [], {"train": ["hf://datasets/somebody/some-text@abc123/a.parquet"]}

    class Builder:
        repo_id = "somebody/some-text"
        config = types.SimpleNamespace(data_files=files)

        def download_and_prepare(self):
            pass

        def as_dataset(self, split):
            asked[-1][1]["split"] = split
            return datasets.Dataset.from_dict({"body": ["one", "two"]})

    def load_dataset_builder(path, **options):
        asked.append((path, options))
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    spec = "hf:somebody/some-text?name=20231101.en&split=validation&revision=abc123"
    assert texts(open_source((spec,), DataConfig(files=(spec,), text_field="body"))) == ["one", "two"]
    options = {"name": "20231101.en", "split": "validation", "revision": "abc123"}
    assert asked == [("somebody/some-text", options)]
    asked.clear()
    HfSource("somebody/some-text", "body").fingerprint()
    assert asked == [("somebody/some-text", {"split": "train"})]
    # Its README.md may name any file, also of the machine that reads it.
    files["train"].append("/etc/passwd")
    with pytest.raises(UserError, match="names /etc/passwd, which is no file of it"):
        HfSource("somebody/some-text", "body").fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_the_memory_that_large_documents_need(tmp_path, shared_data, kind):
    """Documents of 1 MB, in one group of rows: 400 of them need hardly more than 100 (in memory of the process itself:
    pages of a mapped file are the system's, which takes them back where it needs them)."""
    book = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:1_000_000]
    peaks = []
    for number in (100, 400):
        table = pyarrow.table({"text": [f"{at} {book}" for at in range(number)]})
        if kind == "hf":
            datasets.Dataset(table).save_to_disk(tmp_path / f"{number}")
            spec = f"hf:{tmp_path}/{number}"
        else:
            # A page must be unpacked as a whole: here it is 16 documents, where Arrow by itself makes it 1,024.
            pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", write_batch_size=16)
            spec = f"{tmp_path}/{number}.parquet"
        del table
        code = (
            "import re; from espalier.data.config import DataConfig; from espalier.data.sources import open_source\n"
            f"config = DataConfig(files=({spec!r},)); peak = count = 0\n"
            "for item in open_source(config.files, config):\n"
            "    count += 1\n"
            "    status = open('/proc/self/status').read()\n"
            "    peak = max(peak, int(re.search(r'RssAnon:\\s+(\\d+)', status)[1]) * 1024)\n"
            "print(count, peak)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        count, peak = map(int, run.stdout.split()[-2:])
        assert count == number
        peaks.append(peak)
    assert peaks[1] < 400e6 and peaks[1] - peaks[0] < 30e6, peaks


def test_what_cannot_be_opened(tmp_path):
    for spec in ("nobody/nothing-of-this-name", str(tmp_path)):
        with pytest.raises(UserError) as error:
            HfSource(spec).fingerprint()
        assert "cannot be opened" in str(error.value) and "\n" not in str(error.value)


@functools.cache
def builder_class():
    """Of a data set with a line each example; a name may be registered once only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

    class Lines(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        lines: list[str] = []

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(self.lines), "test": self._generate_examples(self.lines[:3])}

        def _generate_examples(self, chosen):
            for number, line in enumerate(chosen):
                yield number, {"text": line, "number": number}

    tfds.disable_progress_bar()
    return Lines


def prepared(folder, lines, file_format) -> str:
    """The folder of a data set of these lines that tensorflow-datasets has prepared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = builder_class()(data_dir=str(folder), file_format=file_format)
        builder.lines = lines
        builder.download_and_prepare()
        return str(builder.data_dir)


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_a_prepared_data_set_without_tensorflow(tmp_path, lines, file_format):
    import sys

    lines = lines[:90]
    folder = prepared(tmp_path, lines, file_format)
    source = TfdsSource(folder)
    found = texts(source)
    # The library shuffles while it prepares; after that the order is fixed.
    assert sorted(found) == sorted(lines) and found == texts(TfdsSource(folder))
    assert texts(TfdsSource(f"{folder}?split=test")) != found
    assert "tensorflow" not in sys.modules
    shutil.copytree(folder, tmp_path / "copy" / "lines" / "1.0.0")
    assert TfdsSource(str(tmp_path / "copy" / "lines" / "1.0.0")).fingerprint() == source.fingerprint()
    assert TfdsSource(f"{folder}?split=test").fingerprint() != source.fingerprint()
    assert {item.kind for item in TfdsSource(folder, "number") if isinstance(item, Reject)} == {"type"}
    with pytest.raises(UserError, match="no split 'dev'; there are"):
        TfdsSource(f"{folder}?split=dev").fingerprint()
    with pytest.raises(UserError, match="no feature 'body'; there are"):
        list(TfdsSource(folder, "body"))


def test_examples_that_its_writer_lost(tmp_path, lines):
    assert len(lines) > 100
    with pytest.raises(UserError, match=r"holds \d+ of its \d+ examples.*array_record"):
        list(TfdsSource(prepared(tmp_path, lines, "parquet")))


def test_tfrecord_wants_tensorflow(tmp_path, lines):
    folder = prepared(tmp_path, lines[:3], "array_record")
    info = tmp_path / "lines" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match='needs TensorFlow: install it, or prepare.*file_format="array_record"'):
        list(TfdsSource(folder))


def test_a_name_that_tfds_does_not_know():
    with pytest.raises(UserError, match="cannot be opened"):
        TfdsSource("nothing_of_this_name").fingerprint()
    with pytest.raises(UserError, match="expected tfds:NAME"):
        TfdsSource("wikipedia?spilt=train")


def test_as_sources_of_a_mixture(tmp_path, lines):
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "hf")
    folder = prepared(tmp_path / "tfds", lines, "array_record")
    config = DataConfig(
        sources=(f"a=hf:{tmp_path}/hf", f"b=tfds:{folder}"),
        mixture="a=0.5,b=0.5",
        tokenizer_kind="bpe",
        cache=str(tmp_path / "cache"),
    )
    stores = prepare(config, 400, for_masked_lm=False)
    assert list(stores.train) == ["a", "b"] == list(stores.validation)
    sizes = [stores.train[name].manifest["bytes"] + stores.validation[name].manifest["bytes"] for name in "ab"]
    assert sizes == [len("".join(lines).encode())] * 2
    with pytest.raises(UserError, match="give each a name"):
        open_source((f"hf:{tmp_path}/hf", "a.txt"), config)
    with pytest.raises(UserError, match="builtin:nothing is unknown"):
        open_source(("builtin:nothing",), config)
