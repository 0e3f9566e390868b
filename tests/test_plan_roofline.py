"""The time model: against published runs, limits that are known, and what must hold of any such model. No compiling."""

import dataclasses
import json
import pathlib
import re

import pytest

from espalier.commands.plan import time as plan_time
from espalier.commands.plan.time.amounts import Job, parameters
from espalier.commands.plan.time.published import FIT_HALF, HELD_OUT, documented, error, errors, fit, table
from espalier.commands.plan.time.roofline import FITTED, SPREAD, bill, step_time
from espalier.commands.plan.time.runs import UNITS, models, runs, sources
from espalier.errors import UserError
from espalier.models.counts import count_params, flops_per_token
from espalier.models.families.bert import BERT_BASE
from espalier.models.families.gpt2 import GPT2
from espalier.models.families.llama import LLAMA_1B, LLAMA_8B
from espalier.models.families.modernbert import MODERNBERT_BASE
from sharding.mesh import AXES
from sharding.topology import CHIPS, chip_named, chip_of

LLAMA = Job(LLAMA_8B, chip_named("h100"), 4096, 256, {"fsdp": 64}, remat="dots")


def changed(job: Job, **changes) -> Job:
    return dataclasses.replace(job, **changes)


def test_held_out_runs_are_predicted():
    """The targets of the plan; the fit half is there only so that nobody mistakes which is which."""
    found = errors(HELD_OUT)
    assert found.median < 0.15 and found.worst < 0.35
    assert set(map(id, FIT_HALF)).isdisjoint(map(id, HELD_OUT)) and len(FIT_HALF) + len(HELD_OUT) == len(runs()) >= 20


def test_the_printed_range_holds_nine_of_ten_held_out_runs():
    off = sorted(abs((1 / (1 + error(run))) - 1) for run in HELD_OUT)
    assert off[int(0.9 * len(off))] <= SPREAD < off[-1] + 0.05
    time = step_time(LLAMA)
    assert (time.low, time.high) == (time.step * (1 - SPREAD), time.step * (1 + SPREAD))


def test_the_efficiencies_are_those_of_the_fit():
    """Rounded, they fit as well as what the search finds from them."""
    found = fit(FIT_HALF)
    for field in dataclasses.fields(FITTED):
        assert getattr(found, field.name) == pytest.approx(getattr(FITTED, field.name), rel=0.1), field.name
        assert 0 < getattr(FITTED, field.name) <= 1


def test_the_docs_have_the_table_of_the_code():
    assert documented() == table(), "run `python -m espalier.commands.plan.time.published --write`"


def test_the_table_of_runs_is_complete_and_has_no_stray_key():
    table = json.loads((pathlib.Path(plan_time.__file__).parent / "runs.json").read_text())
    needed = {"model", "source", "chip", "mesh", "rows", "length", "head", "speed"}
    others = {"micro_batches", "recomputed", "predicted", "attention", "scan", "says", "steps"}
    others |= {"fast_domain", "slow_bandwidth", "memory_bandwidth"}
    used = {"sources": set(), "models": set(), "recomputed": set()}
    for row in table["runs"]:
        assert needed <= row.keys() <= needed | others, row
        value, unit = row["speed"]
        assert unit in UNITS and value > 0 and row.keys() >= ({"steps"} if unit == "hours" else set()), row
        used["sources"].add(row["source"])
        used["models"].add(row["model"])
        used["recomputed"] |= {row["recomputed"]} if "recomputed" in row else set()
    assert used == {part: set(table[part]) for part in used}
    assert all(url.startswith("https://") for url in sources().values())


def test_units_of_published_speeds():
    """By hand: 8 GPUs, steps of 512 rows of 1,024 tokens."""
    job = changed(LLAMA, sequence_length=1024, batch_rows=512, mesh={"data": 8})
    assert UNITS["tokens/s/chip"](905, job, {}) == 905
    assert UNITS["sequences/s"](100, job, {}) == 100 * 1024 / 8
    assert UNITS["s/step"](0.5, job, {}) == 2 * 512 * 1024 / 8
    assert UNITS["hours"](2, job, {"steps": 7200}) == 512 * 1024 / 8
    # MaxText's convention: 6 × the parameters in products, and all keys of a causal row.
    flops = 6 * (parameters(LLAMA_8B) - 128_256 * 4096) + 12 * 32 * 4096 * 1024
    assert UNITS["TFLOP/s/chip"](400, job, {}) == pytest.approx(400e12 / flops, rel=1e-3)


def test_parts_add_up_and_nothing_beats_the_peak():
    for run in runs():
        time = step_time(run.job)
        assert sum(time.parts.values()) == pytest.approx(time.step, rel=1e-12), run
        assert all(seconds >= 0 for seconds in time.parts.values()), run
        assert 0 < time.mfu < 1 and 0 <= time.network <= sum(time.communication.values()), run
        assert time.tokens_per_second_per_chip * run.job.chips * time.step == pytest.approx(run.job.tokens), run


def test_models_have_the_parameters_of_their_names():
    """MPT-70b, Llama-3.1-405B, GPT-2 774M … Names of MPT models leave out their 65,536 positions, and 1b means 1.3."""
    sizes = {name: re.search(r"(\d+)([BM])$", name.upper()) for name in models() if "MaxText" not in name}
    found = {name: float(size[1]) * {"B": 1e9, "M": 1e6}[size[2]] for name, size in sizes.items() if size}
    assert len(found) >= 18
    for name, size in (found | {"MPT-1b": 1.3e9}).items():
        config = models()[name]
        positions = config.max_position_embeddings * config.hidden_size if "MPT" in name else 0
        assert parameters(config) - positions == pytest.approx(size, rel=0.15), name


@pytest.mark.parametrize("scale", [16, 32, 64, 128, 256, 512, 1024])
def test_models_of_maxtext_follow_its_rule(scale):
    """`get_individual_scales` of `global_parameter_scale`: width, depth, heads and MLP double in turn."""
    base, rest = divmod(scale.bit_length() - 1, 3)
    found = models()[f"MaxText-{scale}B"]
    assert parameters(found) / 1e9 == pytest.approx(scale, rel=0.03)
    assert (found.hidden_size, found.num_hidden_layers) == (2048 << (base + (rest > 1)), 16 << base)
    wide = base + (rest > 0)
    assert (found.num_attention_heads, found.intermediate_size) == (16 << wide, 7168 << wide)


def test_parameters_equal_those_of_the_model():
    assert parameters(models()["Llama-3.1-405B"]) / 1e9 == pytest.approx(405.8, rel=1e-3)
    for config, head in ((GPT2, "causal_lm"), (LLAMA_1B, "causal_lm"), (BERT_BASE, None), (MODERNBERT_BASE, None)):
        assert parameters(config) == pytest.approx(count_params(config, head), rel=2e-3)


def test_large_products_tend_to_peak_times_efficiency():
    wide = dataclasses.replace(
        LLAMA_8B, hidden_size=65_536, intermediate_size=262_144, head_dim=128, num_attention_heads=512
    )
    for name, reached in (("v5p", FITTED.tpu), ("a100", FITTED.ampere), ("h100", FITTED.hopper)):
        job = Job(wide, chip_named(name), 2048, 64, {}, head="stored")
        assert reached * 0.93 < step_time(job).mfu < reached


def test_recomputation_costs_what_is_computed_again():
    """Of six products' worth a layer, full adds two less `down`, which is dead code; a post-norm layer needs it too."""
    none, full = (step_time(changed(LLAMA, remat=remat)).matmul for remat in ("none", "full"))
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    again = layer - 4096 * 14_336
    head = 4096 * 128_256 * (1 + 1 / 3)  # formed again by chunks
    assert full / none == pytest.approx((32 * (3 * layer + again) + 3 * head) / (32 * 3 * layer + 3 * head), rel=1e-6)
    bert = Job(BERT_BASE, chip_named("v6e"), 512, 64, {}, predicted_fraction=1e-9)
    times = [step_time(changed(bert, remat=remat)).matmul for remat in ("none", "full")]
    assert times[1] / times[0] == pytest.approx(4 / 3, rel=1e-6)
    assert step_time(changed(LLAMA, remat="dots")).matmul == none


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_more_chips_are_not_slower(axis):
    times = [step_time(changed(LLAMA, mesh={axis: n})).step for n in (1, 2, 4, 8, 16, 32, 64)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("axis", AXES)
def test_a_slower_network_is_not_faster(axis):
    job = changed(LLAMA, mesh={axis: 16})
    for field in ("fast_bandwidth", "slow_bandwidth"):
        chip = dataclasses.replace(job.chip, **{field: getattr(job.chip, field) / 100})
        assert step_time(changed(job, chip=chip)).step >= step_time(job).step
    chip = dataclasses.replace(job.chip, fast_bandwidth=1e9, slow_bandwidth=1e8)
    assert step_time(changed(job, chip=chip)).step > 1.5 * step_time(job).step


@pytest.mark.parametrize("field", ["flops", "memory_bandwidth"])
def test_a_better_chip_is_faster(field):
    chip = dataclasses.replace(LLAMA.chip, **{field: 2 * getattr(LLAMA.chip, field)})
    assert step_time(changed(LLAMA, chip=chip)).step < step_time(LLAMA).step


def test_bytes_over_the_links():
    """8.03e9 parameters on four GPUs of a node: weights twice in bfloat16, gradients in float32, 3/4 from others."""
    job = Job(LLAMA_8B, chip_named("h100"), 4096, 16, {"fsdp": 4})
    latency = 3 * 32 * 5e-6 * 2
    expected = 0.75 * 8.03e9 * (2 + 2 + 4) / (450e9 * FITTED.network)
    assert step_time(job).communication["fsdp"] - latency == pytest.approx(expected, rel=1e-3)
    # Two nodes, one copy on each: each GPU sends its quarter's gradients, and an all-reduce passes them twice.
    job = changed(job, mesh={"replica": 2, "fsdp": 8}, fast_domain=8)
    expected = 0.5 * 2 * 4 * 8.03e9 / 8 / (50e9 * FITTED.network)
    assert step_time(job).communication["replica"] - 2 * 5e-6 == pytest.approx(expected, rel=1e-3)


def test_what_is_written_to_memory_costs():
    time = step_time(LLAMA).step
    assert step_time(changed(LLAMA, attention="stored")).step > time
    assert step_time(changed(LLAMA, accumulation=4)).step > time
    assert step_time(changed(LLAMA, scan=True)).step > time
    assert step_time(changed(LLAMA, head="stored")).step < time


def test_windows_and_masked_heads_save_time():
    modern = Job(MODERNBERT_BASE, chip_named("v6e"), 8192, 64, {}, predicted_fraction=0.3)
    everywhere = dataclasses.replace(MODERNBERT_BASE, layer_period=("global",))
    assert step_time(modern).attention < 0.5 * step_time(changed(modern, model=everywhere)).attention
    assert step_time(modern).step < step_time(changed(modern, predicted_fraction=1.0)).step
    assert step_time(modern).model_flops_per_token == flops_per_token(MODERNBERT_BASE, 8192, 0.3)


def test_muon_costs_its_newton_schulz_steps():
    """By hand for GPT-2: 15 products of 768³ for each of four square matrices, 45 for each of the two of the MLP; AdamW
    keeps one moment more, which is read and written."""
    adamw = Job(GPT2, chip_named("h100"), 1024, 16, {})
    more = step_time(changed(adamw, optimizer="muon")).step - step_time(adamw).step
    flops = 12 * 2 * 768**3 * (4 * 15 + 2 * 45)
    moment = 2 * 4 * parameters(GPT2) / (3.35e12 * 0.85)
    assert more == pytest.approx(flops / (989e12 * FITTED.hopper) - moment, rel=1e-6)
    # DESIGN, "Known traps": a fifth of the FLOPs at 16k tokens a step, 0.6 % at half a million.
    assert 0.1 < flops / (flops_per_token(GPT2, 1024) * 16_384) < 0.25
    assert flops / (flops_per_token(GPT2, 1024) * 524_288) < 0.01


def test_the_bill():
    time = step_time(LLAMA)
    found = bill(time, LLAMA, time.tokens_per_second * 86_400 * 2, price_per_chip_hour=3.0)
    assert (found.days, found.chip_hours, found.cost) == pytest.approx((2, 2 * 24 * 64, 2 * 24 * 64 * 3))
    halves = Job(LLAMA_8B, chip_named("tpu7x"), 4096, 256, {"fsdp": 64})
    time = step_time(halves)
    found = bill(time, halves, time.tokens_per_second * 3600)
    assert found.chip_hours == pytest.approx(32) and found.cost is None


def test_chips_are_found_by_name_alias_and_device():
    assert chip_named("A100") is chip_named("a100-80gb")
    assert chip_of(type("Device", (), {"device_kind": "NVIDIA A100-SXM4-40GB"})) is chip_named("a100-40gb")
    assert chip_of(type("Device", (), {"device_kind": "cpu"})) is None
    names = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
    assert len(names) == len(set(names))


def test_an_unknown_chip_is_refused_with_those_that_are_known():
    with pytest.raises(UserError) as refused:
        chip_named("h10")
    message = str(refused.value)
    assert message.startswith("unknown chip 'h10'; did you mean h100?; known are v2, v3, v4, v5e, ")
    assert "\n" not in message and all(chip.name in message for chip in CHIPS)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_chip_is_plausible(chip):
    """Compute outruns memory, memory outruns links, links outrun the network: a slip of a unit would show."""
    assert 60 < chip.flops / chip.memory_bandwidth < 700
    assert 2 < chip.memory_bandwidth / chip.fast_bandwidth < 60
    assert 2 < chip.fast_bandwidth / chip.slow_bandwidth < 100
    assert 7e9 < chip.memory < 200e9
