"""Presets compiled for TPU slices by the TPU's own compiler: they fit, and have its attention kernel."""

import dataclasses

import pytest

from espalier.commands.plan.compile import peaks
from espalier.commands.plan.planner import make_plan
from espalier.commands.plan.settings import PRESETS, PlanSettings
from sharding.mesh import MeshConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
GIB = 2**30
# The smallest slice that each preset is meant for: one that stops fitting fails here.
FITS = {
    "bert-base": "v5e:4x4",
    "modern-base": "v6e:4x4",
    "gpt2": "v4:2x2x2",
    "llama-8b": "v5p:4x4x4",
    "llama-70b": "v5p:8x8x8",
}


OFTEN = ("gpt2", "llama-8b")
"""Those that .ci/run compiles; the compiler takes minutes for all of them."""


def compiled(name: str, **changes):
    config = dataclasses.replace(PRESETS[name](), **changes)
    return make_plan(config, PlanSettings(topology=FITS[name], search=False))


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.soak) for name in FITS]
)
def test_preset_fits_its_slice(name):
    plan = compiled(name)
    program = plan.asked.compiled
    answer = plan.as_json()
    assert program and plan.asked.fits and answer["basis"] == "compiled" and answer["compile_seconds"] > 0
    assert 0 < program.arguments < program.peak <= program.limit
    assert answer["chip_bytes"] == program.limit and answer["peak_bytes_per_chip"] == program.peak
    # State and batch, exactly: float32 parameters and two moments as they are split, three or six arrays of tokens.
    split = plan.asked.mesh.fsdp * plan.asked.mesh.tensor
    state = 12 * plan.params / split
    assert state < program.arguments < 1.1 * state + 2**20 * 64
    # BERT drops out attention probabilities, which no kernel holds; the others have the TPU's own.
    assert (program.kernels > 0) == (name != "bert-base") == (plan.asked.attention == "splash")
    assert "attention_dropout=0.1" in plan.attention_reason if name == "bert-base" else program.largest
    # Weights that are split are gathered: the presets' meshes are not the whole of a 3-D torus.
    assert ("all-gather" in program.collectives) == (split > 1) and plan.hint is None
    assert split == 1 or plan.asked.mesh.data == 2
    # No more than recorded.
    name = peaks.name_of(name, FITS[name])
    assert not (said := peaks.raised(name, program.peak, peaks.recorded())), said
    assert plan.asked.memory.total == pytest.approx(plan.asked.peak, rel=0.25)


@pytest.mark.soak
def test_over_the_whole_of_a_3d_torus_weights_are_gathered_by_reducing_as_the_plan_says():
    model = dataclasses.replace(PRESETS["llama-1b"]().model, num_hidden_layers=2)
    whole, half = (
        compiled("llama-8b", model=model, mesh=mesh) for mesh in (MeshConfig(data=1, fsdp=64), MeshConfig(fsdp=-1))
    )
    assert "all-gather" not in whole.as_json()["collectives"]
    assert whole.hint and "--mesh.data 2 --mesh.fsdp 32" in whole.hint
    assert "all-gather" in half.as_json()["collectives"] and half.hint is None


def test_what_does_not_fit_is_said_with_what_takes_the_most():
    plan = compiled("gpt2", batch_size=1024, accumulation=1)
    program = plan.asked.compiled
    assert program and not plan.asked.fits and program.peak > program.limit == pytest.approx(30.75 * GIB)
    assert "kept for the backward pass by 12 layers" in program.largest[0].name
    assert not plan.as_json()["fits"]
