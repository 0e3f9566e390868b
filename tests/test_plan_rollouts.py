"""plan rollouts: drawing against closed forms and published speeds, a step of an 8B model, and what does not fit."""

import dataclasses
import json
from pathlib import Path

import pytest

from espalier import cli
from espalier.commands.plan.objectives import PRESETS
from espalier.commands.plan.rollouts import rollouts
from espalier.commands.plan.rollouts.__main__ import as_text, main
from espalier.commands.plan.rollouts.rollouts import STEADY, plan
from espalier.commands.plan.rollouts.settings import RolloutsConfig
from espalier.errors import UserError
from espalier.models.counts import products
from sharding.topology import chip_named

LLAMA = PRESETS["clm"]["llama-8b"]().model
LLAMA_2 = dataclasses.replace(LLAMA, num_key_value_heads=32, intermediate_size=11008, vocab_size=32000)
"""The 7B model of Touvron et al. 2023."""


def test_the_bound_is_bytes_by_bandwidth():
    """Llama 3 8B in the numbers of its paper: 32 layers, 4096 wide, 14336 in the MLP, 8 heads of 128 for keys."""
    found = plan(RolloutsConfig(chips=8, prompts=16, samples=4, prompt_length=100, max_new_tokens=299))
    weights = 2 * (32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256)
    assert found.weight_bytes == weights == 15_009_316_864
    assert found.cache_bytes_per_token == 2 * 2 * 8 * 128 * 32 == 131_072
    # Eight copies draw eight completions each, which have 100 tokens of the prompt and from 1 to 299 of their own.
    assert (found.tensor, found.copies, found.slots, found.turns) == (1, 8, 64, 299)
    assert found.cache_bytes == 8 * 131_072 * (100 + 150)
    seconds = (weights + found.cache_bytes) / 3350e9
    assert found.bound_tokens_per_second == pytest.approx(64 / seconds)
    assert 0.4 < found.tokens_per_second / found.bound_tokens_per_second < 0.85
    assert found.step == found.prefill + found.decode + found.training
    assert found.decode == pytest.approx(64 * 299 / found.tokens_per_second)
    # A forward pass is 2 FLOPs a weight and token, the head at one of them; 660 TFLOP/s and two prompts a device.
    flops = 100 * (weights - 2 * 4096 * 128256) + 2 * 4096 * 128256
    assert found.prefill == pytest.approx(2 * flops / (989e12 * 0.66), rel=0.03)


@pytest.mark.parametrize(
    ("model", "chip", "tensor", "published"),
    [
        # gpt-fast, README of pytorch-labs/gpt-fast: one row, bfloat16, A100-80GB limited to 330 W.
        (LLAMA_2, "a100", 1, 104.9),
        (LLAMA_2, "a100", 2, 168.84),
        (LLAMA_2, "a100", 4, 254.02),
        (LLAMA_2, "a100", 8, 328.43),
        # The same on an H100 (pull request 158 there).
        (LLAMA, "h100", 1, 165.0),
    ],
)
def test_speeds_of_one_row_are_those_that_were_published(model, chip, tensor, published):
    chip = chip_named(chip)
    weights = 2 * sum(product.inputs * product.outputs * product.times for product in products(model))
    cache = rollouts.cache_bytes_per_token(model) * 100
    assert 1 / rollouts.bound_seconds(chip, tensor, weights, cache) > published
    expected = 1 / rollouts.turn_seconds(model, chip, tensor, 1, weights, cache, 100)
    assert expected == pytest.approx(published, rel=0.15)


def test_slots_draw_what_answers_have_and_no_more():
    """Answers of 256 tokens on average, 1024 at most: a quarter of the turns of a batch, and the end of the last."""
    batch = plan(RolloutsConfig(chips=8, mean_new_tokens=256))
    slots = plan(RolloutsConfig(chips=8, mean_new_tokens=256, slots=256))
    assert batch.slots == batch.rows == 512 and batch.turns == 1024
    assert slots.slots == 256 and slots.turns == 512 * 256 // 256 + 1024 - 256
    # What does not fit the memory is drawn in slots, too.
    full = plan(RolloutsConfig(chips=8, prompts=512, prompt_length=8000))
    each = 131_072 * (8000 + 1024)
    room = 81_559 * 2**20 * 0.9 - 16 * full.params / 8 - full.weight_bytes
    assert full.slots == int(room / each) * 8 // 8 * 8 < full.rows
    assert full.turns == -(-full.rows * 1024 // full.slots)


def test_an_8b_step_on_two_kinds_of_chips_is_printed(capsys):
    for chip in ("h100", "v5p"):
        config = RolloutsConfig(chip=chip, chips=16, price=3.0)
        found = plan(config)
        text = as_text(config, found)
        assert f"llama-8b (8.03B parameters) on 16 × {chip}" in text and f"{found.step:8.1f} s" in text
        assert found.decode > found.prefill and 5 < found.step < 500
        assert found.cost == pytest.approx(found.step * 1000 / 3600 * 16 * 3)
    cli.run_config(main, RolloutsConfig, "plan rollouts", ["--chip", "v5p", "--chips", "16", "--json"])
    assert json.loads(capsys.readouterr().out)["chips"] == 16


def test_micro_batches_of_the_training_hold_so_many_tokens():
    """Weights are gathered once for each, so that their number matters."""
    one, more = (plan(RolloutsConfig(chips=8, prompts=prompts)) for prompts in (64, 128))
    assert more.training == pytest.approx(2 * one.training, rel=0.1)
    flops = 6 * one.weight_bytes / 2 * one.rows * 1536
    assert one.training > flops / (8 * 989e12) and STEADY == 16_384


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(preset="bert-base"), "is no decoder; there are"),
        (dict(chip="h1000"), "unknown chip 'h1000'; did you mean h100"),
        (dict(chips=1), "with the state of its training does not fit 1 × h100"),
        (dict(tensor=3), "tensor=3 must divide 8 devices and the model's 8 key/value heads; try --tensor 8"),
        (dict(samples=0), "samples=0 must be at least 1"),
        (dict(mean_new_tokens=2000), "must lie between 1 and max_new_tokens=1024"),
        (dict(slots=3), "slots=3 hold no group of samples=8"),
        (dict(chips=2, tensor=1, prompt_length=10**6), "hold no 8 completions of 1,001,024 tokens"),
    ],
)
def test_what_will_not_do_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(RolloutsConfig(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chip", ["h100", "v5p"])
def test_the_page_shows_what_is_printed(chip, capsys):
    text = (Path(__file__).parents[1] / "docs/plan.md").read_text()
    command = f"--preset llama-8b --chip {chip} --chips 16"
    shown = text.split(f"$ ./launch.sh plan rollouts {command}\n")[1].split("\n$ ")[0].split("\n```")[0]
    cli.run_config(main, RolloutsConfig, "plan rollouts", command.split())
    assert capsys.readouterr().out.rstrip() == shown, "paste the new output into docs/plan.md"
