"""The command `prepare`: what it says, verifies and draws."""

import json
import pathlib
from xml.etree import ElementTree

import pytest
from prepared import flip, run, scenes

from espalier.data.config import DataConfig
from espalier.data.prepare.__main__ import PrepareConfig, main
from espalier.data.summary import draw_lengths
from espalier.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def config(shared_data, tmp_path) -> DataConfig:
    return scenes(shared_data, tmp_path)


def test_verify_names_the_damaged_file(config, capsys):
    verify = PrepareConfig(config, 500, verify=True)
    main(verify)
    assert "verified: 2 stores and their tokenizer" in capsys.readouterr().out
    folder = run(config).train["text"].folder
    manifest = (folder / "manifest.json").read_text()
    size = json.loads(manifest)["bytes"]
    (folder / "manifest.json").write_text(manifest.replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    with pytest.raises(UserError, match=f"{folder}/manifest.json is damaged"):
        main(verify)
    (folder / "manifest.json").write_text(manifest)
    flip(folder / "tokens-00000.bin", 1000)
    with pytest.raises(UserError, match=f"{folder}/tokens-00000.bin"):
        main(verify)


def test_command_line(config, run_cli, tmp_path):
    result = run_cli(
        *("espalier.data.prepare", "--data.files", *config.files, "--data.validation-files", *config.validation_files),
        *("--data.cache", config.cache, "--vocab-size", 500, "--json"),
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["train"]["documents"] == 4 and summary["vocab_size"] == 500
    assert "bytes a token" in result.stdout


def test_the_lengths_as_a_picture(config, capsys):
    picture = pathlib.Path(main(PrepareConfig(config, 500))["picture"])
    assert picture == run(config).train["text"].folder / "lengths.svg"
    texts = ["".join(element.itertext()).strip() for element in ElementTree.parse(picture).iter(f"{SVG}text")]
    assert "row of 128 tokens" in texts and "tokens in a document" in texts
    assert f"lengths:    {picture}" in capsys.readouterr().out


def test_the_names_of_sources_stand_in_the_picture_in_any_script(config, tmp_path, recwarn):
    stores = run(config).train
    path = draw_lengths({"故事": stores["text"], "网页": stores["text"]}, 128, tmp_path / "lengths.svg")
    texts = ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter(f"{SVG}text")]
    documents = len(stores["text"].offsets) - 1
    assert {f"故事: {documents} documents", f"网页: {documents} documents"} <= set(texts)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
