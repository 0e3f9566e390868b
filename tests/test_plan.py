"""Plans by analysis: what is asked, what is answered, what is refused. Compiled ones: tests/test_plan_compiled.py."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from espalier import cli
from espalier.commands.plan.__main__ import main
from espalier.commands.plan.compile import peaks
from espalier.commands.plan.compile.slices import devices_of, parse_topology
from espalier.commands.plan.compile.step import lower_step
from espalier.commands.plan.objectives import objective_of
from espalier.commands.plan.planner import make_plan
from espalier.commands.plan.settings import PRESETS, PlanSettings, as_tokens
from espalier.data.loader import Rows
from espalier.data.packing import pack_best_fit, pack_split
from espalier.data.tokenizer import SpecialIds
from espalier.errors import UserError
from sharding.advice import Task, advise, layouts
from sharding.mesh import MeshConfig, build_mesh, off_torus, slice_count

KEYS = {
    *("fits", "peak_bytes_per_chip", "chip_bytes", "params", "model_flops_per_token", "step_seconds"),
    *("tokens_per_second_per_chip", "mfu", "compile_seconds", "mesh", "basis"),
}


def planned(preset: str, **changes):
    """The plan of a preset; nested settings by their flags' names with __ for the point."""
    config = PRESETS[preset]()
    nested: dict[str, dict] = {}
    for name in list(changes):
        if "__" in name:
            outer, inner = name.split("__")
            nested.setdefault(outer, {})[inner] = changes.pop(name)
    parts = {outer: dataclasses.replace(getattr(config, outer), **inner) for outer, inner in nested.items()}
    asked = {field.name: changes.pop(field.name) for field in dataclasses.fields(PlanSettings) if field.name in changes}
    return make_plan(dataclasses.replace(config, **changes, **parts), PlanSettings(**asked))


def run(capsys, tmp_path, *arguments: str) -> str:
    cli.run(main, PRESETS, prog="plan", description="", argv=[*arguments, "--run-dir", str(tmp_path)])
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        cli.run(main, PRESETS, prog="plan", description="", argv=list(arguments))
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_command_line_prints_one_json_object_and_draws_a_page(capsys, tmp_path):
    out = run(capsys, tmp_path, *"gpt2 --chip h100 --chips 8 --accumulation 4 --price 2 --tokens 10B --json".split())
    (line,) = out.strip().splitlines()
    plan = json.loads(line)
    assert plan.keys() >= KEYS
    assert plan["basis"] == "estimate" and plan["compile_seconds"] is None and plan["fits"] is True
    assert plan["params"] == 124_439_808  # Radford et al. 2019, counted by transformers
    assert plan["mesh"] == {"replica": 1, "data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    speed = plan["tokens_per_second_per_chip"]
    assert plan["step_seconds"] * speed * 8 == pytest.approx(512 * 1024)
    assert plan["mfu"] == pytest.approx(speed * plan["model_flops_per_token"] / 989e12)
    assert plan["chip_hours"] == pytest.approx(10e9 / speed / 3600) and plan["cost"] == pytest.approx(
        2 * plan["chip_hours"]
    )
    page = (tmp_path / "plan.html").read_text()
    assert "Memory of a device" in page and "Where the time of a step goes" in page and "kept for the backward" in page
    assert json.loads((tmp_path / "plan.json").read_text())["params"] == plan["params"]


def test_text_says_whether_it_fits_and_what_would(capsys, tmp_path):
    out = run(capsys, tmp_path, "llama-8b", "--chip", "h100", "--chips", "8")
    assert re.search(r"^does not fit: [\d.]+ of 79.65 GiB", out, re.M)
    flags = re.search(r"^fits: (.*)$", out, re.M)
    assert flags, out
    again = run(capsys, tmp_path, "llama-8b", "--chip", "h100", "--chips", "8", *flags[1].split())
    assert re.search(r"^fits: [\d.]+ of 79.65 GiB", again, re.M)


def test_what_the_search_names_is_the_fastest_that_fits():
    plan = planned("llama-8b", chip="h100", chips=8)
    assert not plan.asked.fits and plan.found and plan.found.fits and plan.tried > 10
    # By hand: rematerialisation and micro-batches are needed, but no more of them than that.
    fewer = planned(
        "llama-8b", chip="h100", chips=8, accumulation=plan.found.accumulation // 2, execution__remat=plan.found.remat
    )
    assert not fewer.asked.fits


def test_nothing_fits_is_said(capsys, tmp_path):
    out = run(capsys, tmp_path, "llama-70b", "--chip", "t4", "--chips", "8")
    assert "nothing that fits among" in out


def test_memory_of_the_state_is_sixteen_bytes_a_parameter_split_by_the_mesh():
    """Float32 parameters, two moments and the gradient, with the vocabulary padded to 128."""
    params = 85_056_000 + 50_304 * 768 + 1024 * 768
    for mesh, ways in ((MeshConfig(data=8), 1), (MeshConfig(data=1, fsdp=8), 8)):
        memory = planned("gpt2", chip="h100", chips=8, mesh=mesh, accumulation=1, search=False).asked.memory
        assert (memory.parameters + memory.optimizer + memory.gradients) * ways / params == pytest.approx(16, rel=0.01)


def test_rematerialisation_and_micro_batches_need_less_memory():
    sizes = [
        planned("gpt2", chip="h100", chips=8, execution__remat=remat, search=False).asked.memory.total
        for remat in ("none", "dots", "full")
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.5 * sizes[0]
    kept = [planned("gpt2", chip="h100", chips=8, accumulation=a, search=False).asked.memory.kept for a in (1, 4)]
    assert kept[0] == pytest.approx(4 * kept[1])


def test_muon_keeps_one_moment_of_a_matrix():
    adamw, muon = (
        planned("gpt2", chip="h100", chips=8, optimizer__name=name, search=False).asked.memory.optimizer
        for name in ("adamw", "muon")
    )
    matrices = 12 * 12 * 768**2
    assert adamw - muon == 4 * matrices


def test_a_plan_follows_the_attention_that_would_run():
    """Splash on TPU, the kernel for packed rows on GPUs; XLA's keeps probabilities, and moves its scores."""
    fused, asked, gpu, old = (
        planned("gpt2", chip=chip, chips=8, accumulation=4, execution__attention=kind, search=False)
        for chip, kind in (("v5p", "auto"), ("h100", "xla"), ("h100", "auto"), ("t4", "auto"))
    )
    assert [plan.asked.attention for plan in (fused, asked, gpu, old)] == ["splash", "xla", "triton", "xla"]
    assert "a kernel for packed rows" in gpu.attention_reason
    assert "see each other" not in gpu.attention_reason and "capability 8.0" in old.attention_reason
    # At least the probabilities of 12 layers, 12 heads, 16 rows: bfloat16 [T, T].
    assert asked.asked.memory.kept - fused.asked.memory.kept > 12 * 12 * 16 * 1024 * 1024 * 2
    assert asked.asked.memory.kept - gpu.asked.memory.kept > 12 * 12 * 16 * 1024 * 1024 * 2
    assert asked.asked.time.memory > 2 * gpu.asked.time.memory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gpt2", "no chips given; name a TPU slice"),
        ("gpt2 --topology v5e:4x4 --chip h100", "both --topology and --chip given"),
        ("gpt2 --topology v9:4x4", "unknown topology 'v9:4x4'; it is one of v4:AxBxC, v5e:AxB"),
        ("gpt2 --topology v5e", "v5e slices have 2 dimensions; for instance v5e:2x2"),
        ("gpt2 --topology v5e:4x4x4", "v5e slices have 2 dimensions; for instance v5e:2x2"),
        ("gpt2 --topology v5e:128x64", "8192 chips; at most 4096"),
        ("gpt2 --topology v5e:3x3", "no topology v5e:3x3"),
        ("gpt2 --topology v5e:4x4 --mesh.data 4", "mesh data=4 has 4 devices and v5e:4x4 has 16"),
        ("gpt2 --topology v5e:4x4 --mesh.data 3 --mesh.fsdp -1", "3 does not divide the 16 devices"),
        ("llama-8b --topology v5p:4x4x4 --mesh.tensor 16", "tensor=16 does not divide the model's 8 key/value heads"),
        ("gpt2 --topology v5e:4x4 --mesh.tensor 8", "tensor=8 does not divide the model's 12 key/value heads"),
        ("gpt2 --chip h100 --chips 2 --mesh.sequence 2 --data.sequence-length 1001", "1001 is not divisible by mesh"),
        ("gpt2 --chip h100 --chips 7", "batch_size=512 is not divisible by data×fsdp×accumulation=7×1×2=14"),
        ("gpt2 --chip h100 --slices 2", "--slices does not go with --chip"),
        ("gpt2 --topology v5e:4x4 --chips 2", "--chips does not go with --topology"),
        ("gpt2 --chip h100 --mesh auto --mesh.tensor 4", "--mesh auto chooses --mesh.tensor too"),
        ("gpt2 --chip h100 --chips 8 --mesh auto --batch-size 4 --accumulation 8", "try --batch-size 64"),
        ("gpt2 --chip h100 --execution.attention splash", "kernel for TPUs and this is a GPU"),
        ("gpt2 --chip h999", "unknown chip 'h999'; known are v2, v3"),
        ("gpt2 --chip h100 --chips 0", "chips=0 and slices=1 must be at least 1"),
        ("gpt2 --chip h100 --tokens lots", "tokens='lots' is not a number of tokens; write 10B"),
        ("gpt2 --chip h100 --price -1", "price=-1 must be at least 0"),
        ("gpt2 --chip h100 --data.sequence-length 2048", "exceeds the model's 1024 learned positions"),
        ("gpt3 --chip h100", "unknown preset 'gpt3'; did you mean gpt2"),
        ("demo --chip h100", "mlm-demo"),
    ],
)
def test_bad_input_is_one_line_before_any_compilation(capsys, monkeypatch, arguments, message):
    def compiled(*_):
        raise AssertionError("it compiles")

    monkeypatch.setattr("espalier.commands.plan.planner.compile_step", compiled)
    assert message in refused(capsys, *arguments.split())


def test_tokens():
    assert [as_tokens(text) for text in ("10B", "1.5T", "3e11", "300m", "1000")] == [1e10, 1.5e12, 3e11, 3e8, 1000]


def test_topologies():
    found = parse_topology("V5P:4x4x8", 2)
    assert (found.chips, found.devices, found.name) == (256, 256, "v5p:4x4x8")
    assert parse_topology("tpu7x:2x2x1").devices == 8  # two devices a chip


def test_only_replica_reaches_from_slice_to_slice():
    devices = devices_of(parse_topology("v5e:4x4", 2))
    mesh = build_mesh(MeshConfig(data=1, fsdp=-1, replica=2), devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="the devices are 2 slices.*try --mesh.replica 2"):
        build_mesh(MeshConfig(), devices)
    # JAX numbers nodes of GPUs as slices; their networks are fast enough for every axis.
    assert slice_count([SimpleNamespace(platform="gpu", slice_index=number // 8) for number in range(16)]) == 1


def test_compiling_for_absent_devices_leaves_the_cache_of_programs_alone(tmp_path):
    """JAX cannot read back what it would write there. A run's own programs are cached before and after."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    kept = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        jax.jit(lambda x: x + 1)(1.0)
        before = len(list(tmp_path.iterdir()))
        plan = planned("mlm-debug", topology="v5e:2x2", search=False)
        assert before and not list(tmp_path.glob("*train_step*")) and plan.asked.fits
        assert plan.asked.compiled and plan.asked.compiled.collectives.keys() == {"all-reduce"}
        jax.jit(lambda x: x + 2)(1.0)
        assert len(list(tmp_path.iterdir())) > before
    finally:
        compilation_cache.reset_cache()
        for name, value in kept.items():
            jax.config.update(name, value)


# ------------------------------------------------------------------------------------------------------------- advice

TASK = Task(devices=8, slices=1, batch_size=64, accumulation=1, length=1024, heads=4, width=768)


def test_every_layout_uses_all_devices_and_divides_the_task():
    found = list(layouts(TASK))
    assert found[0] == MeshConfig(data=8) and len(set(found)) == len(found)
    for mesh in found:
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence * mesh.replica == 8
        assert TASK.heads % mesh.tensor == 0 and TASK.batch_size % (mesh.data * mesh.fsdp) == 0
    slices = list(layouts(TASK._replace(slices=2)))
    assert {mesh.replica for mesh in slices} == {2}
    # Fewer rows than devices: something else must be split.
    assert all(mesh.tensor * mesh.sequence >= 4 for mesh in layouts(TASK._replace(batch_size=2)))


def test_advice_takes_the_simplest_that_fits_and_says_why():
    def need(mesh):
        return 100 * 2**30 / (mesh.fsdp * mesh.tensor)

    assert advise(TASK, need, None)[0] == MeshConfig(data=8)
    mesh, why = advise(TASK, need, 120 * 2**30)
    assert mesh == MeshConfig(data=8) and "100 GiB of the 120 GiB" in why
    mesh, why = advise(TASK, need, 60 * 2**30)
    assert mesh == MeshConfig(data=4, fsdp=2) and "data=8 would need 100 GiB" in why
    with pytest.raises(UserError, match="no mesh of 8 devices holds this.*try --execution.remat full"):
        advise(TASK, need, 5 * 2**30)
    odd = TASK._replace(batch_size=24, accumulation=5, heads=1, length=100)
    with pytest.raises(UserError, match="no mesh of 8 devices divides batch_size=24.*try --batch-size 40"):
        advise(odd, need, None)


def test_mesh_auto_is_a_word_on_the_command_line(capsys, tmp_path):
    arguments = "llama-1b --chip h100 --chips 8 --accumulation 8 --mesh auto --json".split()
    plan = json.loads(run(capsys, tmp_path, *arguments))
    assert plan["fits"] and plan["mesh"]["data"] * plan["mesh"]["fsdp"] == 8


class Store:
    """Three documents, for rows as the loader makes them."""

    offsets = np.array([0, 5, 9, 20])

    def take(self, index):
        return index.astype(np.int32)

    def word_starts(self, index):
        return index % 2 == 0


@pytest.mark.parametrize("word_starts", [False, True])
def test_a_planned_batch_has_the_arrays_of_the_loader(word_starts):
    specials = SpecialIds(pad=0, cls=1, sep=2, mask=3, bos=4, eos=5, all=(0, 1, 2, 3, 4, 5))
    framed = Rows(Store(), pack_best_fit(Store.offsets, 8), 8, specials, "framed", word_starts=word_starts)
    table = np.ones(30, np.int32)
    shifted = Rows(Store(), pack_split(Store.offsets, 8), 8, specials, "shifted", table)
    config = PRESETS["mlm-debug"]()
    config = dataclasses.replace(config, masking=dataclasses.replace(config.masking, whole_words=word_starts))
    for of, rows in ((config, framed), (PRESETS["clm-debug"](), shifted)):
        batch = rows.rows(np.arange(1))
        assert {name: str(values.dtype) for name, values in batch.items()} == objective_of(of).arrays(of)


def test_whole_words_are_planned_as_they_are_trained():
    """The loader then adds where words begin, and the step takes it."""
    config = PRESETS["mlm-debug"]()
    config = dataclasses.replace(config, masking=dataclasses.replace(config.masking, whole_words=True))
    program = lower_step(config, build_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert "word_starts" in program.arguments[1]


def test_a_peak_that_rises_by_three_percent_says_how_to_accept_it():
    known = {"gpt2 v4:2x2x2": peak_of(rows=512, peak=100 * 2**30)}
    assert peaks.raised("gpt2 v4:2x2x2", 102.9 * 2**30, known) is None
    said = peaks.raised("gpt2 v4:2x2x2", 103.2 * 2**30, known)
    assert said and "103.20 GiB a device, 3.2% more than the 100.00" in said
    assert f"{peaks.COMMAND} gpt2 v4:2x2x2" in said and peaks.wanted(["gpt2", "v4:2x2x2"]) == [("gpt2", "v4:2x2x2")]
    assert "not recorded" in (peaks.raised("gpt2 v5e:4x4", 1, known) or "")
    assert peaks.wanted(["llama-8b", "v5e"]) == [("llama-8b", "v5e:16x16")]


def test_recorded_peaks_are_of_the_presets_as_they_are():
    known = peaks.recorded()
    assert known and known.keys() <= set(peaks.names()) and peaks.documented() == peaks.table(known)
    # What two stacks take is not known to plan, which says so.
    large = {name for name in PRESETS if "debug" not in name and "demo" not in name}
    assert peaks.SLICES.keys() == {name for name in large if not PRESETS[name]().model.num_decoder_layers}
    for name, found in known.items():
        preset, topology = name.split()
        config, wanted = PRESETS[preset](), parse_topology(topology)
        given = (config.batch_size, config.data.sequence_length, config.accumulation, config.execution.remat)
        assert (found.rows, found.length, found.accumulation, found.remat) == given, f"{peaks.COMMAND} {name}"
        assert found.mesh == str(off_torus(config.mesh, wanted.shape).on(wanted.devices)), f"{peaks.COMMAND} {name}"
        assert found.fits == (found.peak <= found.limit) and (found.largest_peak or 0) <= found.limit


def test_the_largest_batch_is_found_by_a_line_through_what_was_compiled():
    assert peaks.largest_below(100, lambda rows: 10 + 5 * rows) == 18  # four binary digits: 16, 18, 20
    assert peaks.largest_below(10, lambda rows: 11) == 0
    line = peaks.line_through({4: 30.0, 16: 90.0}, 100)
    assert (line(4), line(18)) == (30.0, 100.0)


def peak_of(rows: int, peak: float) -> peaks.Peak:
    return peaks.Peak(1, "data=8", rows, 1024, 1, "none", peak, 128 * 2**30, True, rows, peak, "JAX 0.10.1")
