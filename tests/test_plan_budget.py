"""plan budget: the laws against their papers' tables and brute force, the plan against arithmetic, and its errors."""

import json
import math
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from espalier import cli
from espalier.commands.plan.budget import scaling_laws as laws
from espalier.commands.plan.budget.__main__ import main
from espalier.commands.plan.budget.budget import plan, sizes
from espalier.commands.plan.budget.settings import BudgetConfig
from espalier.commands.plan.budget.text import as_text
from espalier.commands.plan.numbers import short
from espalier.commands.plan.objectives import PRESETS
from espalier.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def close(tolerance: float, *pairs: tuple[float, float]) -> bool:
    return all(abs(found / expected - 1) <= tolerance for found, expected in pairs)


@pytest.mark.parametrize("law", [laws.CHINCHILLA_FIT, laws.BESIROGLU], ids=lambda law: law.source)
@pytest.mark.parametrize("flops", [1e18, 5.76e23, 1e26])
def test_the_optimum_is_the_least_loss_that_a_budget_can_buy(law, flops):
    sizes = np.geomspace(1e6, 1e13, 700_001)
    cheapest = sizes[np.argmin(law.loss(sizes, flops / (6 * sizes)))]
    assert close(1e-4, (law.at_flops(flops).parameters, cheapest), (law.at_flops(flops).flops, flops))


@pytest.mark.parametrize("law", [*laws.CAUSAL_LAWS, *laws.ENCODER_HABITS], ids=lambda law: law.name)
def test_size_tokens_and_compute_lead_to_each_other(law):
    a = law.at_flops(3e20)
    for other in (law.at_parameters(a.parameters), law.at_tokens(a.tokens)):
        assert close(1e-9, (other.parameters, a.parameters), (other.tokens, a.tokens), (other.flops, 3e20))


@pytest.mark.parametrize(
    "law, tolerance, parameters, flops, tokens",
    [
        # Hoffmann et al. 2022, table 3 (approach 1): the ratio of 20 is a round number of theirs.
        (laws.CHINCHILLA, 0.08, 400e6, 1.92e19, 8.0e9),
        (laws.CHINCHILLA, 0.08, 1e9, 1.21e20, 20.2e9),
        (laws.CHINCHILLA, 0.08, 10e9, 1.23e22, 205.1e9),
        (laws.CHINCHILLA, 0.08, 175e9, 3.85e24, 3.7e12),
        (laws.CHINCHILLA, 0.08, 10e12, 1.30e28, 216.2e12),
        # Table A3 (approach 3), made with more digits of the constants than are printed.
        (laws.CHINCHILLA_FIT, 0.12, 400e6, 2.21e19, 9.2e9),
        (laws.CHINCHILLA_FIT, 0.12, 1e9, 1.62e20, 27.1e9),
        (laws.CHINCHILLA_FIT, 0.12, 10e9, 2.46e22, 410.1e9),
        # Table A3 (approach 2), with which the corrected fit should agree.
        (laws.BESIROGLU, 0.25, 400e6, 1.84e19, 7.7e9),
        (laws.BESIROGLU, 0.25, 1e9, 1.20e20, 20.0e9),
        (laws.BESIROGLU, 0.25, 10e9, 1.32e22, 219.5e9),
    ],
)
def test_the_tables_of_hoffmann(law, tolerance, parameters, flops, tokens):
    a = law.at_parameters(parameters)
    assert close(tolerance, (a.flops, flops), (a.tokens, tokens)), a


def test_the_models_that_were_trained_by_these_laws():
    chinchilla = laws.BESIROGLU.at_flops(5.76e23)
    assert close(0.06, (chinchilla.parameters, 70e9), (chinchilla.tokens, 1.4e12))
    # The paper extrapolates to 402B and 16.55T with more digits than 0.299 and 0.537.
    llama = laws.LLAMA3.at_flops(3.8e25)
    assert close(0.04, (llama.parameters, 402e9), (llama.tokens, 16.55e12))


def test_the_loss_of_the_corrected_fit():
    # 482.01 / 10^(10.84510 × 0.3478) + 2085.43 / 10^(12.14613 × 0.3658), by logarithms; a = β / (α + β).
    assert laws.BESIROGLU.loss is not None
    assert laws.BESIROGLU.loss(70e9, 1.4e12) == pytest.approx(1.8172 + 0.0815 + 0.0752, abs=1e-4)
    assert (
        laws.CHINCHILLA_FIT.loss is not None and round(laws.CHINCHILLA_FIT.loss.E, 2) == 1.69
    )  # as their text rounds it
    assert laws.BESIROGLU.exponent == pytest.approx(0.5126, abs=1e-3)


def test_the_other_half_of_deepseeks_equation():
    for flops in (1e17, 3e20, 1e24):
        assert close(0.001, (laws.DEEPSEEK.at_flops(flops).tokens, 5.8316 * flops**0.4757))


def test_published_compute():
    """GPT-3's table D.1, the Llama 3 report, and BERT's own count of epochs."""
    flops = {model.name: model.allocation.flops for model in laws.PUBLISHED}
    assert close(0.005, (flops["GPT-3"], 3.14e23), (flops["Llama 3 405B"], 3.8e25))
    assert close(0.05, (flops["RoBERTa-large"], 4.26e21), (flops["Chinchilla"], 5.76e23))
    assert close(0.005, (laws.Allocation(109e6, 250e9).flops, 1.64e20), (laws.Allocation(13e9, 300e9).flops, 2.34e22))
    assert laws.BERT.tokens / 3.3e9 == pytest.approx(40, abs=0.5)
    ratios = {model.name: model.allocation.ratio for model in laws.PUBLISHED}
    assert close(0.01, (ratios["Chinchilla"], 20), (ratios["Llama 3 8B"], 1875), (ratios["GPT-3"], 1.72))


def test_published_encoders_have_the_size_of_our_presets_and_the_tokens_of_their_phases():
    models = {model.name: model for model in laws.PUBLISHED}
    for name, preset in [("BERT-base", "bert-base"), ("BERT-large", "bert-large"), ("ModernBERT-base", "modern-base")]:
        assert close(0.02, (models[name].parameters, sizes("mlm")[preset]))
    phases = 1.719e12 + 250e9 + 50e9  # Warner et al. 2024, table of pretraining settings
    assert close(0.02, (models["ModernBERT-base"].tokens, phases), (models["ModernBERT-large"].tokens, phases))
    assert models["BERT-large"].tokens == models["BERT-base"].tokens
    assert close(0.01, (models["Llama 3 70B"].allocation.ratio, 214), (models["ModernBERT-large"].parameters, 395e6))


@pytest.mark.parametrize("millions", [85, 302, 1200])
def test_the_critical_batch_agrees_with_the_papers_other_fits(millions):
    # With D = 20·N they fit 93.20·N^0.47 rows of 512, N in millions; the exponent of N at a fixed D is 0.087.
    assert close(0.01, (laws.critical_batch(20e6 * millions), 512 * 93.20 * millions**0.47))
    assert 512 * 621.34 * millions**0.087 == pytest.approx(laws.critical_batch(3.07e9), rel=0.16)


def test_batches_and_repetition():
    # 4^(1/0.21) = 2^9.524 = 736; 10^9 to the power of 0.571 is 10^5.139; 10^20 to the power of 0.3271 is 10^6.542.
    assert close(0.01, (laws.critical_batch_at_loss(4.0), 2e8 / 736), (laws.best_batch(1e9), 0.58 * 10**5.139))
    assert close(0.01, (laws.best_batch_at_flops(1e20), 0.292 * 10**6.542), (laws.BYTES_PER_TOKEN, 4.4))
    repeated = np.linspace(0, 3, 30_001)
    assert close(1e-4, (laws.worth_of_epochs(4), 1 + np.trapezoid(np.exp(-repeated / 15.39), repeated)))
    assert laws.worth_of_epochs(1) == 1 and laws.worth_of_epochs(1000) == pytest.approx(16.39)


@pytest.mark.parametrize(
    "given",
    [dict(params="124M"), dict(flops="1e21"), dict(gb="10"), dict(params="10M", objective="mlm"), dict(params="2T")],
)
def test_the_figures_of_a_plan_fit_together(given):
    b = plan(BudgetConfig(**given, chip="v5p", chips=16, mfu=0.5, sequence_length=2048, bytes_per_token=4.0))
    batch = b.batch_size * 2048
    assert (b.steps - 1) * batch < b.tokens <= b.steps * batch
    assert batch <= b.critical_batch_tokens < 2 * batch or b.batch_size == 1
    assert math.log2(b.batch_size).is_integer()
    assert close(1e-9, (b.flops, 6 * b.parameters * b.tokens), (b.text_gb, b.tokens * 4 / 1e9))
    assert close(1e-9, (b.unique_text_gb, b.text_gb / 4), (b.tokens_per_parameter, b.tokens / b.parameters))
    assert b.hours == pytest.approx(b.flops / (16 * 459e12 * 0.5) / 3600)


@pytest.mark.parametrize("flops, beyond", [("5e18", True), ("7e18", False), ("0.9e22", False), ("1.1e22", True)])
def test_a_plan_beyond_the_fitted_runs_says_so(flops, beyond):
    b = plan(BudgetConfig(flops=flops))
    assert b.extrapolated is beyond and ("this is beyond" in " ".join(as_text(b).split())) is beyond


def test_a_time_limit_is_the_compute_of_the_chips():
    b = plan(BudgetConfig(hours="24", chip="h100", chips=8))
    assert b.flops == pytest.approx(24 * 3600 * 8 * 989e12 * 0.35) and b.hours == pytest.approx(24)
    assert all(row.flops == pytest.approx(b.flops) for row in b.laws)
    # Two of JAX's devices are one rented chip.
    assert plan(BudgetConfig(hours="1", chip="v3", mfu=1.0)).flops == pytest.approx(3600 * 123e12)


def test_text_at_hand_is_read_four_times():
    b = plan(BudgetConfig(gb="10"))
    assert b.tokens == pytest.approx(4 * 10e9 / 4.4) and b.unique_text_gb == pytest.approx(10)
    assert all(row.tokens == pytest.approx(b.tokens) for row in b.laws)


@pytest.mark.parametrize(
    "preset, objective, parameters, length",
    [("gpt2", "clm", 124_439_808, 1024), ("bert-base", "mlm", 109_514_298, 512)],
)
def test_a_preset_brings_its_size_objective_and_length(preset, objective, parameters, length):
    b = plan(BudgetConfig(preset=preset))
    assert (b.objective, b.parameters, b.sequence_length) == (objective, pytest.approx(parameters), length)
    assert f"./launch.sh {objective} {preset} " in b.command


def test_encoders_are_told_that_there_is_no_law():
    b = plan(BudgetConfig(preset="bert-base"))
    assert b.loss is None and "no compute-optimal law" in as_text(b)
    assert b.tokens == pytest.approx(131e9, rel=0.01)  # what BERT-base had
    assert "nothing here tells what lies beyond" in as_text(plan(BudgetConfig(params="10B", objective="mlm")))


@pytest.mark.parametrize("given", [dict(params="124M", sequence_length=2048), dict(flops="1e20", objective="mlm")])
def test_the_suggested_command_is_one(given):
    b = plan(BudgetConfig(**given))
    _, command, *arguments = shlex.split(b.command)
    seen = []
    cli.run(lambda config, call: seen.append(config), PRESETS[b.objective], command, "", arguments)
    config = seen[0]
    assert (config.steps, config.batch_size) == (b.steps, b.batch_size)
    config.model.fitted(config.model.vocab_size, config.data.sequence_length)  # positions suffice


def run(*argv: str) -> None:
    cli.run_config(main, BudgetConfig, "plan budget", argv)


def test_json_is_one_object(capsys):
    run("--flops", "1e21", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["law"] == laws.BESIROGLU.name and found["hours"] is None and found["extrapolated"] is False
    keys = "parameters tokens flops loss steps batch_size critical_batch_tokens text_gb unique_text_gb command"
    assert set(keys.split()) <= set(found)
    assert [row["name"] for row in found["laws"]] == [law.name for law in laws.CAUSAL_LAWS]
    assert {"name", "parameters", "tokens", "tokens_per_parameter", "flops", "loss", "source"} == set(found["laws"][0])
    assert {"BERT-base", "GPT-3", "Llama 3 405B"} <= {row["name"] for row in found["published"]}


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "nothing given to plan from; exactly one"),
        ("--params 124M --flops 1e21", "--params 124M and --flops 1e21 given"),
        ("--preset gpt2 --gb 3", "--preset gpt2 and --gb 3 given"),
        ("--params 124Q", "params=124Q is not a number; accepted are figures like 12.5, 1e9 or 124M"),
        ("--params -5", "params=-5 is -5, which must lie between 1000 and"),
        ("--flops=-1e21", "must lie between"),
        ("--flops 1e400", "must lie between"),
        ("--flops nan", "flops=nan is not a number"),
        ("--gb 0", "must lie between"),
        ("--hours 24", "without a chip; add --chip h100"),
        ("--hours soon --chip h100", "hours=soon is not a number"),
        ("--hours 24 --chip h1000", "unknown chip 'h1000'; did you mean h100?; known are"),
        ("--preset gtp2", "unknown preset 'gtp2'; did you mean gpt2?; known are mlm: debug, demo, "),
        ("--preset demo", "preset demo is in mlm and clm; add --objective mlm or --objective clm"),
        ("--preset gpt2 --objective mlm", "known are mlm: debug"),
        ("--params 7B --mfu 40", "mfu=40.0"),
        ("--params 7B --chips 0", "chips=0"),
        ("--params 7B --sequence-length 0", "sequence_length=0"),
        ("--params 7B --bytes-per-token 0", "bytes_per_token=0"),
        ("--size 7B", "unknown flag --size"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        run(*argv.split())
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    "text, value", [("124M", 124e6), ("1.5b", 1.5e9), ("7e9", 7e9), ("2T", 2e12), ("5_000", 5e3), (".5M", 5e5)]
)
def test_numbers_as_people_write_them(text, value):
    assert plan(BudgetConfig(params=text)).parameters == pytest.approx(value)


@pytest.mark.parametrize(
    "value, text", [(123_940_000, "124M"), (999.6e6, "1B"), (1.234e12, "1.23T"), (5e16, "50,000T")]
)
def test_numbers_as_they_are_printed(value, text):
    assert short(value) == text


def test_a_configuration_refuses_two_starts_from_python_too():
    with pytest.raises(UserError, match="exactly one"):
        BudgetConfig(params="1B", hours="3", chip="h100")


def test_the_example_in_the_docs_is_what_is_printed(capsys):
    text = (ROOT / "docs/plan-budget.md").read_text()
    command, _, shown = text.split("```\n$ ./launch.sh plan budget ")[1].split("\n```")[0].partition("\n")
    run(*command.split())
    assert capsys.readouterr().out.rstrip() == shown, "paste the new output into docs/plan-budget.md"


def test_help_comes_without_anything_heavy():
    heavy = {"jax", "flax", "numpy", "transformers"}
    code = f"import espalier.commands.plan.budget.__main__, sys; print(*({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
