"""Files from others are data: no pickle is opened, no code is run, no name leads out of its folder."""

import importlib
import json
import os
import pathlib
import shutil
import stat

import datasets
import jax
import numpy as np
import pyarrow.parquet
import pytest
from malicious import nothing_unpickled, pickles
from tiny_models import BERT, random_params
from tiny_runs import write_run

import espalier
from espalier import cli
from espalier.__main__ import _private
from espalier.commands import replay
from espalier.data.chat import render
from espalier.data.config import DataConfig
from espalier.data.documents import Document
from espalier.data.filters import Decisions
from espalier.data.sources import open_source
from espalier.data.store import TokenStore
from espalier.data.tfds import TfdsSource
from espalier.data.tokenizer import load_tokenizer, save_tokenizer
from espalier.errors import MachineError, UserError
from espalier.features.saved import read_autoencoder
from espalier.files import inside, replacing, sha256_of_file, write_json
from espalier.models.hub import load_pretrained, save_pretrained
from espalier.models.peft import read_adapter
from espalier.models.sentence_transformers import read_modules
from espalier.models.tensor_files import TensorFiles
from espalier.report.render import write_report
from espalier.training.manifest import MANIFEST, _seal
from espalier.training.restore import read_config, restore_params
from espalier.training.run import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore::Warning:(datasets|tensorflow_datasets|etils|fsspec|multiprocess).*")
TEXTS = ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine", "to be, or not to be"] * 20


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and the same model as a folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("made")
    run = write_run(folder / "run", BERT, TEXTS)
    tokenizer = load_tokenizer(run / "tokenizer")
    config = espalier.load(run).config
    save_pretrained(folder / "hf", config, random_params(config, ("masked_lm",)), tokenizer)
    return folder


@pytest.fixture
def mine(made, tmp_path):
    """A copy of both to spoil."""
    for name in ("run", "hf"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def refused(act, *arguments) -> str:
    """The line with which it is refused; an error of another kind fails the test."""
    with pytest.raises((UserError, MachineError)) as caught:
        act(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.txt"),
    *("added_tokens.json", "chat_template.jinja", "vocab.pkl"),
)


# Pickles


def resealed(step: pathlib.Path) -> None:
    """The manifest of who has changed the files of a checkpoint: its sums are right."""
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["sha256"] = {
        str(path.relative_to(step)): sha256_of_file(path)
        for path in step.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    manifest["bytes"] = {name: (step / name).stat().st_size for name in manifest["sha256"]}
    sealed(step / MANIFEST, manifest)


def sealed(path: pathlib.Path, manifest: dict) -> None:
    held = {name: value for name, value in manifest.items() if name != "seal"}
    write_json(path, held | {"seal": _seal(held)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's readers
def test_no_file_of_a_checkpoint_is_ever_unpickled(made, tmp_path):
    """Each file in turn, with sums that fit: Orbax and tensorstore read JSON and arrays, or give up."""
    step = made / "run" / "checkpoints" / "0"
    names = [path.relative_to(step) for path in step.rglob("*") if path.is_file() and path.name != MANIFEST]
    marker = tmp_path / "ran"
    content = pickles(marker)["pickle"]
    with nothing_unpickled():
        restore_params(made / "run")
        for name in names:
            copy = tmp_path / "checkpoints" / "0"
            shutil.copytree(step, copy)
            (copy / name).write_bytes(content)
            (copy / name.parent / "params.pkl").write_bytes(content)
            resealed(copy)
            read = restore_params if name.parts[0] == "params" else read_config
            try:
                read(tmp_path)
            except Exception as error:  # of many kinds, of Orbax and tensorstore
                assert "pickl" not in type(error).__name__.lower()
            shutil.rmtree(copy)
    assert not marker.exists()


def test_no_weights_are_unpickled(mine, tmp_path):
    marker = tmp_path / "ran"
    for kind, content in pickles(marker).items():
        for name in ("model.safetensors", "pytorch_model.bin", "model.pt", "x.ckpt"):
            folder = tmp_path / f"{kind}-{name}"
            shutil.copytree(mine / "hf", folder)
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(content)
            with nothing_unpickled():
                line = refused(load_pretrained, folder)
            # Nor is it said to be something else, where there is a way to have it read.
            if kind in ("pickle", "torch"):
                assert "is a pickle" in line or "AutoModel.from_pretrained" in line
        sae = tmp_path / f"sae-{kind}"
        write_json_in(sae / "cfg.json", {"architecture": "jumprelu", "normalize_activations": "none"})
        (sae / "sae_weights.safetensors").write_bytes(content)
        adapter = tmp_path / f"adapter-{kind}"
        write_json_in(adapter / "adapter_config.json", {"peft_type": "LORA"})
        (adapter / "adapter_model.safetensors").write_bytes(content)
        with nothing_unpickled():
            refused(read_autoencoder, sae)
            refused(read_adapter, adapter, BERT, "masked_lm", {})
    assert not marker.exists()


def write_json_in(path: pathlib.Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def test_no_tokenizer_is_unpickled_and_none_brings_code(mine, tmp_path):
    """Each of its files as a pickle, beside a Python file and an auto_map that asks for it."""
    marker = tmp_path / "ran"
    evil = f"import os\nos.mkdir({str(marker)!r})\nclass Evil:\n    pass\n"
    kinds = pickles(marker)
    for source in ("hf", "run/tokenizer"):
        for name in TOKENIZER_FILES:
            folder = tmp_path / "broken"
            shutil.copytree(mine / source, folder)
            if name == "tokenizer.model":
                (folder / "tokenizer.json").unlink()
            (folder / name).write_bytes(kinds["pickle"])
            with nothing_unpickled():
                try:
                    load_tokenizer(folder)
                except UserError as error:
                    assert "\n" not in str(error)
            shutil.rmtree(folder)
        folder = tmp_path / "code"
        shutil.copytree(mine / source, folder)
        (folder / "tokenization_evil.py").write_text(evil)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}}
        for kind in (settings["tokenizer_class"], "Evil"):
            write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": kind})
            try:
                load_tokenizer(folder)
            except UserError as error:
                assert "\n" not in str(error)
        shutil.rmtree(folder)
    write_json(mine / "hf" / "config.json", json.loads((mine / "hf" / "config.json").read_text()) | {
        "auto_map": {"AutoModel": "modeling_evil.Evil"}})  # fmt: skip
    (mine / "hf" / "modeling_evil.py").write_text(evil)
    assert "which is never run" in refused(load_pretrained, mine / "hf")
    assert not marker.exists()


def test_no_data_is_unpickled_and_none_brings_code(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    marker = tmp_path / "ran"
    kinds = pickles(marker)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (folder / "train.pkl").write_bytes(kinds["pickle"])
    for kind, content in kinds.items():
        for suffix in (".jsonl", ".txt", ".csv", ".parquet", ".jsonl.gz", ".txt.zst"):
            path = tmp_path / f"{kind.replace(' ', '-')}{suffix}"
            path.write_bytes(content)
            with nothing_unpickled():
                found = [item for item in open_source((str(path),), DataConfig()) if isinstance(item, Document)]
            # The oldest form is text, and is read as text.
            assert not found or kind == "old pickle" and suffix in (".txt", ".csv")
    table = pyarrow.table({"text": pyarrow.array(["one", "two"])})
    # An extension type of Arrow is a name with bytes: those of pyarrow's own used to be a pickle.
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": kinds["pickle"]}
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    pyarrow.parquet.write_table(table.cast(pyarrow.schema([field])), tmp_path / "extension.parquet")
    with nothing_unpickled():
        assert "cannot be opened" in refused(open_source((f"hf:{folder}",), DataConfig()).fingerprint)
        (folder / "data.py").unlink()
        for path in (f"hf:{folder}", str(tmp_path / "extension.parquet")):
            source = open_source((path,), DataConfig())
            assert [item.text for item in source if isinstance(item, Document)] == ["one", "two"]
    for name in ("npy", "npz"):
        (tmp_path / name).write_bytes(kinds[name])
        with nothing_unpickled():
            assert Decisions.load(tmp_path / name) is None
    assert not marker.exists()


def test_a_batch_that_was_collected_is_arrays_alone(tmp_path):
    from espalier.training.collected import Collector
    from sharding.mesh import MeshConfig, build_mesh

    marker, folder = tmp_path / "ran", tmp_path / "collected"
    folder.mkdir()
    (folder / "0.npz").write_bytes(pickles(marker)["npz"])
    record = {"step": 0, "sha256": sha256_of_file(folder / "0.npz"), "dtypes": {"objects": "float32"}}
    (folder / "log.jsonl").write_text(json.dumps(record) + "\n")
    collector = Collector(lambda *arguments: {}, folder, build_mesh(MeshConfig()))
    with nothing_unpickled(), pytest.raises(ValueError, match="allow_pickle"):
        collector(None, {}, 0)  # type: ignore[arg-type]
    assert not marker.exists()


def test_classes_that_a_data_set_names_are_not_imported(tmp_path, monkeypatch):
    """tensorflow-datasets imports the classes of features.json, and fetches the code of a namespace."""
    marker, code = tmp_path / "ran", tmp_path / "code"
    code.mkdir()
    (code / "evil_features.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(str(code))
    folder = tmp_path / "data" / "1.0.0"
    folder.mkdir(parents=True)
    write_json(folder / "dataset_info.json", {"name": "x", "version": "1.0.0", "fileFormat": "array_record"})
    inner = {"pythonClassName": "evil_features.Evil", "text": {}}
    features = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                "featuresDict": {"features": {"text": inner}}}  # fmt: skip
    write_json(folder / "features.json", features)
    assert "the class evil_features.Evil" in refused(TfdsSource(f"{folder}").fingerprint)
    assert "is code that would be run" in refused(TfdsSource("somebody:their_data").fingerprint)
    assert not marker.exists()


# Names that lead elsewhere

ELSEWHERE = (
    "../outside.safetensors",
    "/etc/passwd",
    "a/../../outside.safetensors",
    "",
    "..",
    "a\\..\\b",
    "a\0b",
    3,
    None,
)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_does_not_lead_out_of_its_folder(tmp_path, name):
    assert "only files within its folder" in refused(inside, tmp_path, name, "an index")


def test_links_lead_no_further_than_the_folder_or_the_blobs_of_its_repository(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in (blobs / "0123", tmp_path / "secret", snapshot / "plain"):
        path.write_text("x")
    (snapshot / "blob").symlink_to("../../blobs/0123")
    (snapshot / "near").symlink_to("plain")
    (snapshot / "far").symlink_to(tmp_path / "secret")
    (snapshot / "folder").symlink_to(tmp_path)
    for name in ("plain", "blob", "near", "not-there-yet"):
        assert inside(snapshot, name, "x") == snapshot / name
    for name in ("far", "folder/secret"):
        assert "a link that leads out" in refused(inside, snapshot, name, "x")
    # A folder may itself be reached by a link.
    (tmp_path / "link").symlink_to(snapshot)
    assert inside(tmp_path / "link", "blob", "x").read_text() == "x"


def index_of_weights(folder: pathlib.Path, name) -> str:
    (folder / "hf" / "model.safetensors").rename(folder / "outside.safetensors")
    write_json(folder / "hf" / "model.safetensors.index.json", {"weight_map": {"a": name}})
    return refused(TensorFiles, folder / "hf")


def manifest_of_a_checkpoint(folder: pathlib.Path, name) -> str:
    path = folder / "run" / "checkpoints" / "0" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["sha256"][f"params/{'x/' * 3}{name}"] = "0" * 64
    sealed(path, manifest)
    return refused(restore_params, folder / "run")


def pooling_of_sentence_transformers(folder: pathlib.Path, name) -> str:
    (folder / "outside").mkdir()
    write_json(folder / "outside" / "config.json", {"pooling_mode": "mean"})
    modules = [{"idx": 0, "path": "", "type": "x.Transformer"}, {"idx": 1, "path": name, "type": "x.Pooling"}]
    (folder / "hf" / "modules.json").write_text(json.dumps(modules))
    return refused(read_modules, folder / "hf")


def versions_of_a_tokenizer(folder: pathlib.Path, name) -> str:
    path = folder / "hf" / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"fast_tokenizer_files": [name]})
    return refused(load_tokenizer, folder / "hf")


def vocabulary_of_a_tokenizer(folder: pathlib.Path, name) -> str:
    (folder / "outside.json").write_text("{}")
    path = folder / "hf" / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"vocab_file": name.replace("x.json", "outside.json")})
    return refused(load_tokenizer, folder / "hf")


def shards_of_tokens(folder: pathlib.Path, name) -> str:
    from espalier.data.store import _sum_of_manifest

    store = folder / "store"
    store.mkdir()
    np.zeros(2, np.int64).tofile(store / "offsets.bin")
    (folder / "outside.bin").write_bytes(b"\0" * 8)
    manifest = {"dtype": "uint16", "shards": [{"file": name, "tokens": 4}], "documents": 1}
    manifest["sha256"] = {"offsets.bin": sha256_of_file(store / "offsets.bin"), name: "0"}
    write_json(store / "manifest.json", manifest | {"sum": _sum_of_manifest(manifest)})
    return refused(TokenStore(store).take, np.zeros(1, int))


def files_of_a_saved_data_set(folder: pathlib.Path, name) -> str:
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(folder / "saved")
    path = folder / "saved" / "state.json"
    write_json(path, json.loads(path.read_text()) | {"_data_files": [{"filename": name}]})
    return refused(open_source((f"hf:{folder}/saved",), DataConfig()).fingerprint)


def splits_of_a_saved_data_set(folder: pathlib.Path, name) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one"]})}).save_to_disk(folder / "saved")
    write_json(folder / "saved" / "dataset_dict.json", {"splits": [name]})
    return refused(open_source((f"hf:{folder}/saved",), DataConfig()).fingerprint)


def files_that_a_data_set_describes(folder: pathlib.Path, name) -> str:
    (folder / "described").mkdir()
    (folder / "outside.jsonl").write_text('{"text": "secret"}\n')
    name = name.replace("x.json", "outside.jsonl")
    (folder / "described" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n---\n"
    )
    return refused(open_source((f"hf:{folder}/described",), DataConfig()).fingerprint)


def runs_that_a_report_compares(folder: pathlib.Path, name) -> str:
    write_json(folder / "run" / "comparison.json", {"rows": [{"name": "a", "value": 0.5, "run": name}]})
    return refused(write_report, folder / "run")


@pytest.mark.parametrize("place", [
    index_of_weights, manifest_of_a_checkpoint, pooling_of_sentence_transformers, versions_of_a_tokenizer,
    vocabulary_of_a_tokenizer, shards_of_tokens, files_of_a_saved_data_set, splits_of_a_saved_data_set,
    files_that_a_data_set_describes, runs_that_a_report_compares,
])  # fmt: skip
def test_every_list_of_files_is_held_to_its_folder(mine, monkeypatch, place):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", mine / "hf-cache")
    name = {
        index_of_weights: "../outside.safetensors",
        manifest_of_a_checkpoint: "../" * 9 + "etc/passwd",
        pooling_of_sentence_transformers: "../outside",
        versions_of_a_tokenizer: "../../tokenizer.4.0.json",
        shards_of_tokens: "../outside.bin",
        splits_of_a_saved_data_set: "../run",
    }.get(place, "../x.json")
    line = place(mine, name)
    damaged = "manifest.json is not as it was written"
    assert "within its folder" in line or "beside it" in line or place == manifest_of_a_checkpoint and damaged in line


def test_a_chat_template_is_sandboxed_and_its_name_no_path(mine):
    path = mine / "hf" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name in ("../../evil", "/evil", "", ".hidden", 3):
        write_json(path, settings | {"chat_template": [{"name": name, "template": "x"}]})
        assert "a chat template called" in refused(load_tokenizer, mine / "hf")
    write_json(path, settings)
    tokenizer = load_tokenizer(mine / "hf")
    message = [{"role": "user", "content": "x"}]
    for template in (
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ):
        tokenizer.chat_template = template
        assert "does not take this chat" in refused(render, tokenizer, message)
    tokenizer.chat_template = "{{ ''.format.__globals__ }}{{ self.__init__ }}"
    assert render(tokenizer, message) == "", "what may not be seen is nothing"
    # What is written stays in the folder.
    tokenizer.chat_template = {"default": "a", "../../evil": "b"}
    with pytest.raises((UserError, ValueError)):
        save_tokenizer(tokenizer, mine / "run2" / "tokenizer")
    assert not list(mine.rglob("evil*"))


def test_an_adapter_brings_no_endless_expression(tmp_path):
    for pattern in ("(a+)+$", "(a|a)*b", ".*.*.*.*", "a{1,99}", "x" * 501):
        write_json_in(tmp_path / "adapter_config.json", {"peft_type": "LORA", "alpha_pattern": {pattern: 1}})
        assert "has alpha_pattern" in refused(read_adapter, tmp_path, BERT, "masked_lm", {})


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "modules.json"])
def test_json_of_any_depth_is_one_line(mine, name):
    (mine / "hf" / name).write_text(DEEP)
    refused(espalier.load, f"hf:{mine / 'hf'}")


def test_other_json_of_any_depth_is_one_line(mine, capsys):
    (mine / "hf" / "model.safetensors").unlink()
    (mine / "hf" / "model.safetensors.index.json").write_text(DEEP)
    refused(load_pretrained, mine / "hf")
    (mine / "run" / "config.json").write_text(DEEP)
    refused(write_report, mine / "run")
    with pytest.raises(SystemExit):
        _call("mlm.pretrain", "--from-config", str(mine / "run"))
    assert "is not JSON" in capsys.readouterr().err
    (mine / "run" / "checkpoints" / "0" / MANIFEST).write_text(DEEP)
    refused(restore_params, mine / "run")
    (mine / "text.jsonl").write_text(DEEP + '\n{"text": "one"}\n')
    found = list(open_source((str(mine / "text.jsonl"),), DataConfig()))
    assert [item.text for item in found if isinstance(item, Document)] == ["one"] and len(found) == 2


# Code of a user's own


def _call(module: str, *arguments: str) -> None:
    command = importlib.import_module(module)
    cli.run(command.main, command.PRESETS, prog=module.split(".")[0], description="", argv=list(arguments))


def test_no_code_is_run_because_a_run_names_it(mine, capsys, monkeypatch):
    """What someone sends as a run names their objective, their masking and their text: it is run for nobody."""
    monkeypatch.chdir(mine)
    marker = mine / "ran"
    evil = mine / "run" / "evil.py"
    evil.write_text(f"import os\nos.mkdir({str(marker)!r})\ndef x(*a):\n    return []\n")
    code = {"file": str(evil), "name": "x", "sha256": "0"}
    said = {
        "objective": f"{evil}:x",
        "user_code": {"objective": code},
        "masking": {"function": f"{evil}:x"},
        "report": {"title": f"{evil}:x"},
    }
    path = mine / "run" / "config.json"
    saved = json.loads(path.read_text()) | said
    write_json(path, saved)
    step = mine / "run" / "checkpoints" / "0"
    for item in step.glob("config/*"):
        item.write_text(json.dumps(saved | {"format_version": 1}))
    resealed(step)
    model = espalier.load(mine / "run")
    assert model.saved["objective"] == f"{evil}:x" and model.fill("the [MASK] fox")
    write_report(mine / "run")
    for named in (
        {"objective": f"{evil}:x"},
        {"masking": {"function": f"{evil}:x"}},
        {"data": {"files": [f"python:{evil}:x"]}},
        {"data": {"sources": [f"a=python:{evil}:x"]}},
        {"data": {"validation_files": [f"python:{evil}:x"]}},
    ):
        write_json(mine / "saved.json", named | {"task": "masked_lm", "command": "./launch.sh mlm debug --objective x"})
        with pytest.raises(SystemExit) as ended:
            _call("mlm.pretrain", "--from-config", "saved.json", "--steps", "1")
        line = capsys.readouterr().err
        assert ended.value.code == 2 and "names code to be run" in line and "name it yourself: add --" in line, line
    assert not marker.exists() and not (mine / "runs").exists()
    write_json(path, saved | {"command": "./launch.sh mlm debug", "steps": 1})
    with pytest.raises(UserError, match="names code to be run: .*evil.py:x; if you know it, add --trust-code"):
        replay._replayed(RunDirectory(mine / "run"), 0, 1, False)
    # Named on the command line, it is the user who asks for it.
    write_json(mine / "saved.json", {"task": "masked_lm", "objective": f"{evil}:x"})
    with pytest.raises(SystemExit):
        _call("mlm.pretrain", "--from-config", "saved.json", "--objective", f"{evil}:x", "--data.files", "none.txt")
    assert marker.exists()


# Files that are written


def test_what_is_written_has_the_permissions_that_the_user_chose(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as file:
            names = [path.name for path in tmp_path.iterdir()]
            file.write("x")
        write_json(tmp_path / "file.json", {})
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "file.json")] == [0o640, 0o640]
    # A name that nobody can have put there before.
    assert len(names) == 1 and names[0].startswith(".file.") and len(names[0]) >= len(".file.") + 12


def test_compiled_programs_are_ones_own(tmp_path):
    """Machine code is run as it is found: its folder is nobody else's to read or write."""
    folder = tmp_path / "cache" / "compiled" / "jax-1-cpu"
    assert _private(str(folder)) == {"JAX_COMPILATION_CACHE_DIR": str(folder)}
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    folder.parent.chmod(0o777)
    assert _private(str(folder)) and stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    # That of someone else, or what only looks like one's own.
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache" / f"compiled-{os.getuid()}" / "jax-1-cpu")}
    if os.getuid() == 0:
        os.chown(folder.parent, 12345, 12345)
        assert _private(str(folder)) == own
        os.chown(folder.parent, 0, 0)
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, 12345)
        folder.parent.rename(tmp_path / "gone")
        folder.parent.symlink_to(tmp_path / "theirs")
        assert _private(str(folder)) == own
        os.chown(tmp_path / "cache" / f"compiled-{os.getuid()}", 12345, 12345)
        assert _private(str(folder)) == {}
    else:
        folder.parent.rename(tmp_path / "gone")
        folder.parent.symlink_to("/usr")
        assert _private(str(folder)) == own
