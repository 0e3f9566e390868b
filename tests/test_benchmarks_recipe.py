"""The driver of recipes: its commands are configurations, differ as their names say, and tokens are counted right."""

import dataclasses
import pathlib

import pytest

import clm.presets
import mlm.presets
from benchmarks import recipe
from espalier import cli
from espalier.errors import UserError
from espalier.models.hf_config import to_hf

ENTRIES = {"mlm": (mlm.presets.PRESETS, "masked_lm"), "clm": (clm.presets.PRESETS, "causal_lm")}
OF_NO_STOCK_CLASS = {"bert-pre", "modern-muon-masks-qk", "gpt2-qk"}


def configured(task: str, variant: str, seed: int = 3, width: int = 64):
    folder, books = pathlib.Path("runs"), pathlib.Path("books")
    flags = "--data.sequence-length 64"
    name, *arguments = recipe.command_of(folder, books, task, variant, 2e-3, seed, 100, width, flags)
    seen = []
    cli.run(lambda config, call: seen.append(config), ENTRIES[name][0], name, "", arguments)
    return seen[0]


@pytest.mark.parametrize("task", recipe.VARIANTS)
def test_every_variant_is_a_run_and_most_are_of_stock_classes(task, monkeypatch):
    monkeypatch.setattr(cli, "_take_the_terminal", lambda: None)
    base = configured(task, recipe.BASELINES[task])
    assert (base.optimizer.name, base.optimizer.learning_rate, base.seed, base.steps) == ("adamw", 2e-3, 3, 100)
    seen = {recipe.BASELINES[task]: base}
    for variant in recipe.VARIANTS[task]:
        config = seen[variant] = configured(task, variant)
        assert config.data.sequence_length == 64, "what is given for every run outdoes the variant's"
        assert ("muon" in variant) == (config.optimizer.name == "muon"), variant
        if "muon" in variant:
            assert config.optimizer.muon_learning_rate == recipe.MUON_RATIO * 2e-3
        # All see the same text, in rows of the same length and batches of the same size.
        assert (config.data, config.batch_size, config.eval_rows) == (base.data, base.batch_size, base.eval_rows)
        model = dataclasses.replace(config.model, vocab_size=4096)
        try:
            to_hf(model, ENTRIES[task][1])
            assert variant not in OF_NO_STOCK_CLASS
        except UserError:
            assert variant in OF_NO_STOCK_CLASS
        if task == "mlm":
            # An evaluation hides the part of the tokens that the last step does.
            assert (config.masking.final_rate or config.masking.rate) == 0.15, variant
    assert len({str(config) for config in seen.values()}) == len(recipe.VARIANTS[task])


def test_steps_to_a_loss():
    curve = [(10, 6.0), (20, 5.0), (30, 4.5)]
    assert recipe.steps_to(curve, 6.5) == 10
    assert recipe.steps_to(curve, 5.25) == 17.5
    assert recipe.steps_to(curve, 4.5) == 30
    assert recipe.steps_to(curve, 4.4) is None


def test_ratios_are_against_the_best_rate_of_the_baseline_at_its_greatest_length():
    def run(variant, rate, seed, steps, *losses):
        curve = [(steps * (at + 1) // len(losses), loss) for at, loss in enumerate(losses)]
        return dict(task="mlm", variant=variant, rate=rate, seed=seed, steps=steps, loss=losses[-1], curve=curve)

    runs = [
        run("bert", 1e-3, 0, 100, 6.0, 5.0),
        run("bert", 1e-3, 1, 100, 6.0, 5.2),
        run("bert", 2e-3, 0, 100, 6.0, 5.5),
        run("bert", 4e-3, 0, 50, 6.0, 4.0),
        run("modern", 1e-3, 0, 50, 5.6, 4.6),
        run("modern-muon", 1e-3, 0, 50, 5.6, 5.3),
    ]
    # The loss is 5.1, the mean of two seeds; modern is there half way from step 25 to step 50.
    assert "| mlm | modern | 0.001 | 50 | 38 | 2.67 |" in recipe.ratios(runs)
    assert "| mlm | modern-muon | 0.001 | 50 | 1 of 1 not reached |  |" in recipe.ratios(runs)


def test_pairs_are_of_the_same_seed_at_the_best_rate_of_those_with_the_most_seeds():
    def run(variant, seed, loss, rate=1e-3):
        return dict(task="mlm", variant=variant, rate=rate, seed=seed, steps=100, loss=loss)

    changes = (-0.1, -0.2, -0.3, -0.2, -0.2)
    runs = [run("modern", seed, 5 + seed / 10) for seed in range(1, 6)] + [run("modern", 1, 4.0, 2e-3)]
    runs += [run("modern", seed, 6 + seed / 10, 5e-4) for seed in range(1, 6)]
    runs += [run("modern-muon", seed, 5 + seed / 10 + change) for seed, change in enumerate(changes, 1)]
    # t = -0.2 ÷ (√0.005 ÷ √5) = -6.325 with 4 degrees of freedom: t² = 40 and p = 1 - x(3 - x²) ÷ 2 with
    # x = √(40 ÷ 44), Student's closed form for 4; t₀.₉₇₅ = 2.776. The deviations are √0.025 and √0.02.
    assert "| 1, 2, 3, 4, 5 | 5.300 ± 0.158 | 5.100 ± 0.141 | -0.200 (-0.288 to -0.112) | 0.0032 |" in recipe.pairs(
        runs
    )
    assert "modern-muon" not in recipe.pairs(runs[:12]), "one seed is no pair"
