"""Runs of reinforcement: adapters and their reference, a reward run as reward, prompts drawn anew, rounding."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from labelled_words import write_jsonl
from test_reinforce import FLOAT, config, started  # noqa: F401
from tiny_models import close
from toy import metrics_of, quick_compilation  # noqa: F401

import espalier
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.training.config import CheckpointConfig
from espalier.training.restore import saved_paths
from finetune.config import FinetuneOptimizer, LoraConfig
from finetune.tasks.reinforce import rollouts
from finetune.tasks.reinforce.objective import completion_logprobs
from finetune.tasks.reinforce.prompts import Asked
from finetune.tasks.reinforce.record import PolicyGradient, ReinforceConfig, ReinforceData
from finetune.tasks.reinforce.rewards import Group, Rewards
from finetune.tasks.reinforce.rollouts import Rollouts
from finetune.tasks.reward.record import RewardConfig, RewardData
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh


def kept(run, number: int) -> dict[str, np.ndarray]:
    with np.load(run / "collected" / f"{number}.npz") as file:
        return dict(file)


def logged(run) -> list[dict]:
    return [row for row in metrics_of(run) if "loss" in row]


def by_training(model, batch) -> np.ndarray:
    scored = jax.jit(lambda params, batch: completion_logprobs(model.config, params, batch, 1.0, FLOAT))
    return np.asarray(scored(model.params, batch))


@pytest.mark.soak
def test_the_reference_of_adapters_is_their_base(started, tmp_path):  # noqa: F811
    """Log-probabilities of the model that was loaded, whatever the adapters have learnt; there is no second copy."""
    policy = PolicyGradient(samples=3, max_new_tokens=4, beta=0.2, cut="scored")
    run = tmp_path / "run"
    optimizer = FinetuneOptimizer(learning_rate=3e-2, warmup=0.0)
    main(config(started, run, policy, lora=LoraConfig(rank=2), optimizer=optimizer))
    paths = saved_paths(run / "frozen")
    assert paths and not [path for path in paths if path.startswith("reference")]
    batch = kept(run, 3)
    there = batch["weights"] > 0
    base = by_training(espalier.load(started / "clm"), batch)
    close(batch["reference_logprobs"][there], base[there])
    assert np.abs(batch["first_logprobs"] - base)[there].max() > 1e-2
    rows = logged(run)
    assert abs(rows[0]["kl"]) < 1e-6 < 1e-4 < rows[-1]["kl"]
    with pytest.raises(UserError, match="leave out one of both, or train adapters"):
        ReinforceConfig(policy=policy, freeze=("embeddings",))


def test_a_reward_run_gives_the_rewards(started, tmp_path):  # noqa: F811
    rows = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(9 - a)} for a in range(4)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    main(
        RewardConfig(
            init_from=str(started / "clm"), run_dir=str(tmp_path / "reward"), steps=3, batch_size=4, eval_every=3,
            data=RewardData(train=file, validation=file), mesh=MeshConfig(1, 1, 1),
            optimizer=FinetuneOptimizer(learning_rate=1e-2), checkpoint=CheckpointConfig(every=100),
        )
    )  # fmt: skip
    name, model = f"model:{tmp_path}/reward", espalier.load(tmp_path / "reward")
    long = "123456789 " * 60
    asked = [Group(Asked("f:1", "1+1=", [1], {}, ""), ["2", long]), Group(Asked("f:2", "", [1], {}, ""), ["2", "3"])]
    found = Rewards(ReinforceData(reward=(name,)))(asked)
    close(found, np.array([model.score(group.completions, group.asked.text) for group in asked]))
    # In a run, under the mesh of the run.
    policy = PolicyGradient(samples=2, max_new_tokens=4, cut="scored")
    run = tmp_path / "run"
    main(config(started, run, policy, steps=1, mesh=MeshConfig(2, 2, 2), data=dict(reward=(name,))))
    written = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert {row["which"] for row in written} == {"best", "worst", "random"}
    for row in written:
        assert row["reward"] == pytest.approx(model.score([row["completion"]], row["prompt"])[0], abs=1e-4)


class ByPrompt:
    """Completions of even prompts are worth their place, of others one and the same."""

    error = ""

    def __init__(self, lively=lambda number: number % 2 == 0):
        self.lively, self.asked = lively, 0

    def __call__(self, groups):
        self.asked += 1
        places = np.arange(3.0)
        return np.array([places if self.lively(int(group.asked.text)) else np.ones(3) for group in groups])


def test_prompts_whose_completions_are_all_worth_the_same_are_replaced(started):  # noqa: F811
    """DAPO's dynamic sampling: others in their place, tokens, log-probabilities and rewards together."""
    model, mesh = espalier.load(started / "clm"), build_mesh(MeshConfig(1, 1, 1))
    side = [Asked(f"f:{at}", str(at), [1, *range(20, 21 + at)], {}, "") for at in range(8)]
    state = SimpleNamespace(complete=model.params, frozen={}, step=0)

    def collected(resample, rewards, held_out=0, key=3):
        policy = PolicyGradient(samples=3, max_new_tokens=4, cut="scored", resample=resample)
        given = {"prompt": np.arange(4, dtype=np.int32), "held_out": np.full(4, held_out, np.int32)}
        with jax.set_mesh(mesh):
            found = Rollouts(model, policy, mesh, side, side, rewards, (2,)).collect(state, given, jax.random.key(key))
            return {name: np.asarray(array) for name, array in found.items()}

    before, after = (collected(resample, ByPrompt()) for resample in (0, 4))
    odd = np.arange(4) % 2 == 1
    np.testing.assert_array_equal(before["prompt"][::3], np.arange(4))
    np.testing.assert_array_equal(before["equal"][::3], odd)
    assert not after["equal"].any() and (after["prompt"] % 2 == 0).all()
    stay = np.repeat(~odd, 3)
    for name, array in after.items():
        assert array.shape == before[name].shape
        if name not in ("held_out",):
            np.testing.assert_array_equal(array[stay], before[name][stay])
    np.testing.assert_array_equal(after["advantages"].reshape(4, 3), np.tile([-1, 0, 1], (4, 1)))
    for row, number in enumerate(after["prompt"]):
        shown = after["input_ids"][row, : -after["completions"].shape[1]]
        np.testing.assert_array_equal(shown[after["segment_ids"][row, : len(shown)] > 0], side[number].ids)
    there = after["weights"] > 0
    close(after["drawn_logprobs"][there], by_training(model, after)[there], 1e-4)
    again = collected(4, ByPrompt())
    for name in after:
        np.testing.assert_array_equal(after[name], again[name])

    # Prompts that are measured on stay; where no other is better, it ends after so many rounds, and not before.
    np.testing.assert_array_equal(collected(4, ByPrompt(), held_out=1)["prompt"][::3], np.arange(4))
    for lively, calls in ((lambda number: False, 1 + 4), (lambda number: True, 1)):
        rewards = ByPrompt(lively)
        np.testing.assert_array_equal(collected(4, rewards)["prompt"][::3], np.arange(4))
        assert rewards.asked == calls


def test_the_difference_between_drawing_and_training_is_reported(started, tmp_path, monkeypatch):  # noqa: F811
    """In bfloat16: nats a token as logged, here with 0.03 on top of what rounding makes; nothing is dropped for it."""
    real = rollouts.continued

    def further(*given):
        drawn = real(*given)
        return drawn._replace(drawn_logprobs_BG=drawn.drawn_logprobs_BG - 0.03)

    monkeypatch.setattr(rollouts, "continued", further)
    policy = PolicyGradient(samples=4, max_new_tokens=4, cut="scored", updates=2)
    run = tmp_path / "run"
    main(config(started, run, policy, steps=1, execution=Execution(dtype="bfloat16")))
    batch, (row,) = kept(run, 0), logged(run)
    weights = batch["weights"]
    gap = np.abs(batch["first_logprobs"] - batch["drawn_logprobs"]) * weights
    assert row["mismatch"] == pytest.approx(gap.sum() / weights.sum(), rel=1e-4)
    assert row["mismatch"] == pytest.approx(0.03, abs=0.01) and row["dropped"] == 0
    # It is bfloat16: a pass in float32 finds others, by its rounding.
    rounding = np.abs(batch["first_logprobs"] - by_training(espalier.load(started / "clm"), batch)) * weights
    assert 1e-5 < rounding.sum() / weights.sum() < 0.02
