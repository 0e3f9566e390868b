"""Files are whole or not there, whenever the writer dies; sums are those of coreutils' sha256sum."""

import json
import os
import subprocess

import pytest

from espalier import files
from espalier.errors import UserError


@pytest.mark.parametrize("mode, old, half", [("w", "é\n", "new"), ("wb", b"\x00", b"\xff")])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path, mode, old, half):
    path = tmp_path / "file"
    with files.replacing(path, mode) as file:
        file.write(old)
    with pytest.raises(ZeroDivisionError), files.replacing(path, mode) as file:
        file.write(half)
        file.flush()
        assert path.read_bytes() == (old.encode() if mode == "w" else old)
        raise ZeroDivisionError
    assert path.read_bytes() == (old.encode() if mode == "w" else old)
    assert os.listdir(tmp_path) == ["file"]


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """After a power cut the name leads to the old contents or to the new, never to an empty file."""
    events = []
    synced, renamed = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(os.fstat(number).st_size), synced(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), renamed(*paths)))
    files.write_json(tmp_path / "value.json", {"a": ["é", 1.5]})
    assert events == [(tmp_path / "value.json").stat().st_size, "renamed"]
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == {"a": ["é", 1.5]}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "parent" / "folder"
    with pytest.raises(ZeroDivisionError), files.appearing(folder) as unfinished:
        (unfinished / "a").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(folder.parent) == []
    with files.appearing(folder) as slower:
        (slower / "a").write_text("slower")
        with files.appearing(folder) as faster:
            (faster / "deep").mkdir()
            (faster / "deep" / "b").write_text("faster")
    assert os.listdir(folder.parent) == ["folder"] and os.listdir(folder) == ["deep"]


def test_a_folder_that_cannot_be_made_is_an_error_for_people(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file .*Not a directory.*--data\.cache"):
        files.make_folder(tmp_path / "file" / "folder")


def test_sums_are_those_of_sha256sum(tmp_path):
    text = "eins\nzwei é\n\n中文"
    (tmp_path / "file").write_text(text, encoding="utf-8")
    expected = subprocess.check_output(["sha256sum", tmp_path / "file"], text=True).split()[0]
    found = files.sha256_of_file(tmp_path / "file"), files.sha256_of_text(text)
    assert {*found, files.sha256_of_lines(iter(text.split("\n")))} == {expected}
    assert f"{files.hash_of_text(text):016x}" == expected[:16]


def test_cache_keys_are_those_of_older_versions():
    """Another key would prepare every text anew. Computed with `echo -n "('a', 1, None)" | sha256sum`."""
    assert files.cache_key("a", 1, None) == "c6fd636f923c6bdcb85bac0f"
