"""The race against PyTorch is run on the same work by all, and says what came out of it."""

import json

import pytest

from benchmarks import race
from benchmarks.work import WORKS, flops, model_of, write
from espalier.models.counts import flops_per_token

OURS, LOOP = race.CONTENDERS[0], next(c for c in race.CONTENDERS if c.name == "loop")


@pytest.fixture
def here(monkeypatch, capsys):
    """Contenders run in this process: starting one takes longer than its fifty steps."""
    import benchmarks.ours
    import benchmarks.pytorch

    modules = {"benchmarks.ours": benchmarks.ours, "benchmarks.pytorch": benchmarks.pytorch}

    def run(contender, folder, steps):
        module, *rest = contender.arguments
        capsys.readouterr()
        modules[module].main(str(folder), str(steps), *rest)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(race, "run", run)
    return run


@pytest.mark.parametrize("name", ["tiny-masked", "tiny-causal"])
def test_fifty_losses_agree_whoever_computes_them(name, tmp_path, here):
    """Ours, a loop of PyTorch and the trainer of transformers; the trainer rounds what it logs to four digits."""
    write(WORKS[name], tmp_path, race.CHECKED)
    trainer = next(c for c in race.CONTENDERS if c.name == "Trainer")
    far = race.check([OURS, LOOP, trainer], tmp_path)
    assert far["loop"] < 1e-5 and far["Trainer"] < 5e-4
    losses = here(OURS, tmp_path, race.CHECKED)["losses"]
    assert len(losses) == race.CHECKED and losses[-1] < losses[0] - 0.5


def test_other_work_ends_the_race(tmp_path, here, monkeypatch):
    write(WORKS["tiny-masked"], tmp_path, 3)
    monkeypatch.setattr(race, "CHECKED", 3)
    monkeypatch.setattr("benchmarks.pytorch.BETAS", (0.5, 0.98))
    with pytest.raises(SystemExit, match="loop does other work"):
        race.check([OURS, LOOP], tmp_path)


def test_what_came_out_is_written_down(tmp_path, here, capsys):
    race.main(
        ["tiny-masked", "--rounds", "1", "--steps", "4", "--contenders", "^(Espalier|loop)$", "--folder", str(tmp_path)]
    )
    found = json.loads((tmp_path / "race.json").read_text())
    work = found["works"]["tiny-masked"]
    assert set(work["timings"]) == set(work["differences"]) == {"Espalier", "loop"}
    for timing in work["timings"].values():
        assert timing["step"] > 0 and timing["first"] > 0 and timing["bytes"] > 1e7
    assert "| Espalier |" in (tmp_path / "race.md").read_text()
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_runs_in_a_process_of_its_own(tmp_path):
    write(WORKS["tiny-causal"], tmp_path, 3)
    said = race.run(OURS, tmp_path, 3)
    assert len(said["losses"]) == len(said["ends"]) == 3 and sorted(said["ends"]) == said["ends"]
    assert said["versions"]["jax"]


def test_the_floor_counts_what_is_computed():
    """W1 by hand: four layers, the head for 19 of 128 tokens, keys that are all seen."""
    D, F, V, T, L = 256, 1024, 8192, 128, 4
    forward = 2 * L * (4 * D * D + 2 * D * F) + 4 * L * D * T + 19 / 128 * 2 * (D * D + D * V)
    assert flops(WORKS["W1"]) == pytest.approx(32 * T * 3 * forward)
    assert flops(WORKS["W2"]) == 16 * 256 * flops_per_token(model_of(WORKS["W2"]), 256)


def test_wrong_arguments_are_told(capsys):
    for arguments in (["W1", "--contenders", "nobody"], ["W1", "--steps", "1"], ["W9"]):
        with pytest.raises(SystemExit) as ended:
            race.main(arguments)
        assert ended.value.code == 2
