"""A sweep gives what single runs give."""

import dataclasses

import jax
import numpy as np
import pytest
import toy
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.training.config import OptimizerConfig
from espalier.training.start import run_keys
from espalier.training.sweep import sweep
from sharding.mesh import MeshConfig, build_mesh

SEEDS, RATES = (0, 5), (0.003, 0.03)


def batch(seed: int, step: int) -> dict:
    return toy.batch(1000 * seed + step)


def swept(config, **changes):
    arguments = dict(
        seeds=SEEDS,
        learning_rates=RATES,
        params_of=lambda seed: toy.init_params(run_keys(seed)[0]),
        matrix_axes=toy.matrix_axes,
        objective=toy.objective(noise=0.1),
        batch_of=batch,
        mesh=build_mesh(MeshConfig(1, 1, 1)),
        eval_batches=[toy.batch(10_000 + i) for i in range(3)],
    )
    return sweep(config, **arguments | changes)


@pytest.mark.parametrize("name, vmapped", [("adamw", True), ("muon", True), ("adamw", False)])
def test_a_sweep_gives_what_single_runs_give(tmp_path, name, vmapped):
    """Every loss to 1e-5 of it, parameters to 1e-5, the same evaluation; with dropout, drawn masks, data by seed.
    By threads, where each run has the program of a single one, bit by bit."""
    # A small eps would let Adam blow rounding up where a gradient is nearly zero.
    optimizer = OptimizerConfig(name=name, learning_rate=0.01, eps=1e-3)
    config = toy.config(tmp_path, optimizer=optimizer, steps=4, accumulation=2, mesh=MeshConfig(1, 1, 1))
    result = swept(config, vmapped=vmapped)
    assert [(row["seed"], row["learning_rate"]) for row in result.rows] == [(s, r) for s in SEEDS for r in RATES]
    for number, row in list(enumerate(result.rows))[:: 1 if name == "adamw" else 3]:
        s, r = divmod(number, len(RATES))
        rates = dict(learning_rate=RATES[r], muon_learning_rate=optimizer.muon_learning_rate * RATES[r] / 0.01)
        folder = tmp_path / f"{name}-{s}-{r}"
        single = dataclasses.replace(
            config, seed=SEEDS[s], run_dir=str(folder), optimizer=dataclasses.replace(optimizer, **rates)
        )
        alone = toy.run(
            single,
            objective=toy.objective(noise=0.1),
            batches_from=lambda step, seed=SEEDS[s]: (batch(seed, at) for at in range(step, 99)),
        )
        losses = [record["loss"] for record in toy.metrics_of(folder) if "learning_rate" in record]
        np.testing.assert_allclose(result.loss_SRs[s, r], losses, rtol=1e-5 if vmapped else 0)
        assert row["train_loss"] == result.loss_SRs[s, r, -1]
        for metric, value in alone.eval.items():
            assert row[metric] == pytest.approx(value, rel=1e-5)
        mine = jax.tree.map(lambda leaf, s=s, r=r: leaf[s, r], result.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine, alone.state.params)
    assert result.best == min(result.rows, key=lambda row: row["loss"])
    assert len({row["loss"] for row in result.rows}) == 4


@pytest.mark.parametrize("vmapped", [True, False])
def test_a_run_that_diverges_is_a_row_and_the_others_go_on(tmp_path, vmapped):
    rates = (0.01, float("inf"))
    result = swept(toy.config(tmp_path, steps=3), learning_rates=rates, eval_batches=(), vmapped=vmapped)
    assert np.isfinite(result.loss_SRs).tolist() == [[[True] * 3, [True, False, False]]] * 2
    assert result.best["learning_rate"] == 0.01


def test_an_error_in_one_run_ends_all_of_them(tmp_path):
    def broken(seed: int, step: int) -> dict:
        if (seed, step) == (SEEDS[1], 2):
            raise UserError("row 7 cannot be read")
        return batch(seed, step)

    with pytest.raises(UserError, match="row 7"):
        swept(toy.config(tmp_path, steps=10_000), batch_of=broken)


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="one or more seeds"):
        swept(toy.config(tmp_path), seeds=())
