"""The mesh that a run opens: as asked for, or chosen, and said once."""

import dataclasses

import pytest

import clm.presets
from espalier.errors import UserError
from espalier.models.layout import memory_of, open_mesh
from sharding.mesh import MeshConfig

CONFIG = clm.presets.debug()
MODEL = CONFIG.model.fitted(1024, 64)


def opened(mesh: MeshConfig, **options):
    config = dataclasses.replace(CONFIG, mesh=mesh, batch_size=16)
    return open_mesh(config, MODEL, "causal_lm", 64, **options).shape


def test_as_asked_for():
    assert opened(MeshConfig(2, 2, 2)) == {"replica": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    with pytest.raises(UserError, match="batch_size=16 is not divisible by data×fsdp×accumulation=1×3"):
        opened(MeshConfig(1, 3, 1))


def test_where_memory_is_unknown_each_device_has_a_copy(capsys):
    assert opened(MeshConfig(auto=True))["data"] == 8
    assert "mesh data=8: the simplest" in capsys.readouterr().out


def test_where_a_copy_is_too_large_it_is_split(capsys, monkeypatch):
    whole = memory_of(
        dataclasses.replace(CONFIG, batch_size=16),
        MODEL,
        "causal_lm",
        MeshConfig(data=8),
        64,
        attention="xla",
        dtype="float32",
        scan=False,
    ).total
    monkeypatch.setattr("espalier.models.layout._limit", lambda device: whole)
    shape = opened(MeshConfig(auto=True))
    assert shape["fsdp"] > 1 and shape["sequence"] == 1
    assert "data=8 would need" in capsys.readouterr().out
    monkeypatch.setattr("espalier.models.layout._limit", lambda device: whole / 1000)
    with pytest.raises(UserError, match="no mesh of 8 devices holds this"):
        opened(MeshConfig(auto=True), split=False)
