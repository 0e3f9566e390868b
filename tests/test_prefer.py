"""Learning from preferences: losses against their papers' equations, references, runs that pause and are cut apart."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from labelled_words import TEXTS, WORDS, write_jsonl
from tiny_models import LLAMA, close
from tiny_runs import write_run
from toy import quick_compilation  # noqa: F401

import espalier
from espalier.data.chat import DEFAULT
from espalier.data.examples import Example, LabelledBatches
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.models.transformer import init_params
from espalier.training.config import CheckpointConfig
from espalier.training.step import micro_batches
from finetune.config import FinetuneOptimizer, LoraConfig
from finetune.preferences import Verdict, read_preferences
from finetune.tasks.prefer import losses
from finetune.tasks.prefer.examples import mismatched, with_template
from finetune.tasks.prefer.record import PreferConfig, PreferData
from finetune.tasks.prefer.reference import NAME
from finetune.tasks.prefer.task import encode, preference_objective
from finetune.train import main
from sharding.mesh import MeshConfig, build_mesh, place_batch

MODEL = dataclasses.replace(LLAMA, num_hidden_layers=1)
FLOAT32 = Execution(dtype="float32")


def random_sums(seed=0, rows=6):
    random = np.random.default_rng(seed)
    size = random.integers(2, 9, (rows, 2)).astype(np.float32)
    policy, reference = (-size * random.uniform(0.5, 3, (2, rows, 2)).astype(np.float32)) + 0.0
    return policy, reference, size


def test_losses_are_the_equations_of_their_papers():
    """Written again in float64, from the papers alone."""
    policy, reference, size = random_sums()
    (pw, pl), (rw, rl), (nw, nl) = (array.astype(np.float64).T for array in (policy, reference, size))

    def log_sigmoid(x):
        return torch.nn.functional.logsigmoid(torch.tensor(x)).numpy()

    h = (pw - rw) - (pl - rl)
    close(losses.dpo(policy, reference, 0.3), -log_sigmoid(0.3 * h))
    close(losses.ipo(policy, reference, 0.3), (h - 1 / 0.6) ** 2)
    close(losses.simpo(policy, size, 2.5, 1.2), -log_sigmoid(2.5 * pw / nw - 2.5 * pl / nl - 1.2))
    probability_w, probability_l = np.exp(pw / nw), np.exp(pl / nl)
    odds = (probability_w / (1 - probability_w)) / (probability_l / (1 - probability_l))
    close(losses.orpo(policy, size, 0.4), -pw / nw - 0.4 * log_sigmoid(np.log(odds)))
    # KTO: good answers are to lie above z, others below it.
    ratio, good, beta = pw - rw, np.array([1, 0, 1, 1, 0, 0]), 0.2
    z = float(losses.kto_kl(jnp.float32(sum(pl - rl)), jnp.float32(6)))
    assert z == pytest.approx(max(0.0, (pl - rl).mean()), rel=1e-5)
    assert float(losses.kto_kl(jnp.float32(-3), jnp.float32(6))) == 0
    sigmoid = 1 / (1 + np.exp(-beta * (ratio - 0.7) * np.where(good, 1, -1)))
    expected = np.where(good, 1.5 * (1 - sigmoid), 0.5 * (1 - sigmoid))
    close(losses.kto(np.float32(ratio), good, jnp.float32(0.7), beta, 1.5, 0.5), expected)


def test_first_losses_are_known():
    policy, _, size = random_sums()
    close(losses.dpo(policy, policy, 0.3), np.full(6, math.log(2)))
    close(losses.ipo(policy, policy, 0.25), np.full(6, 4.0))
    close(losses.kto(jnp.zeros(6), jnp.arange(6) % 2, jnp.float32(0), 0.1, 1.0, 1.0), np.full(6, 0.5))
    # Twice as long an answer of the same tokens has the same mean, which ORPO and SimPO compare, and twice the sum.
    for loss in (lambda p, n: losses.orpo(p, n, 0.1), lambda p, n: losses.simpo(p, n, 2.0, 1.0)):
        close(loss(policy, size), loss(2 * policy, 2 * size))
    assert not np.allclose(losses.dpo(policy, 0 * policy, 0.3), losses.dpo(2 * policy, 0 * policy, 0.3))


def tiny_rows(verdicts: bool):
    """Eight rows of two answers, the last empty, with log-probabilities of a reference."""
    random = np.random.default_rng(1)
    examples = []
    for number, size in enumerate(random.integers(4, 15, size=14)):
        weights = (np.arange(size) >= random.integers(1, size)).astype(np.float32)
        of_row = {"index": number} | ({"good": int(number // 2 % 2)} if verdicts else {})
        ids = random.integers(5, 200, size).tolist()
        examples.append(Example(ids, [0] * int(size), of_row=of_row, of_tokens={"loss_weights": weights}))
    rows = LabelledBatches(examples, 16, 0, pad_id=0, max_length=16, examples_per_row=2, together=2).fixed()[0]
    reference = random.uniform(-40, -10, 14).astype(np.float32)
    rows["reference"] = np.where(rows["example_weights"] > 0, reference[rows["index"]], 0).astype(np.float32)
    return examples, reference, rows


def summed(model, params, example) -> float:
    """log p of an answer from the logits of its example alone, by PyTorch."""
    from espalier.models.heads import causal_lm_head
    from espalier.models.transformer import apply
    from espalier.models.vocabulary import logits

    size = len(example.ids)
    batch = {"input_ids": np.zeros((1, 16), np.int32), "positions": np.arange(16, dtype=np.int32)[None]}
    batch["input_ids"][0, :size] = example.ids
    batch["segment_ids"] = (np.arange(16) < size).astype(np.int32)[None]
    batch["token_type_ids"] = np.zeros((1, 16), np.int32)
    scores = _logits(model, params, batch, apply, causal_lm_head, logits)
    logprobs = torch.log_softmax(torch.tensor(np.array(scores[0])), -1)
    return sum(
        float(logprobs[at - 1, example.ids[at]]) for at in range(1, size) if example.of_tokens["loss_weights"][at]
    )


def _logits(model, params, batch, apply, head, logits, made={}):  # noqa: B006 (compiled once)
    if "f" not in made:
        made["f"] = jax.jit(
            lambda params, batch: logits(
                *head(model, params, apply(model, params, batch, execution=FLOAT32), FLOAT32), model.vocab_size
            )
        )
    return made["f"](params, batch)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_objectives_are_sums_of_answers_accumulated_and_sharded_alike(loss):
    """Rows of two answers against each answer by itself; KTO's divergence is that of the whole batch, however cut."""
    params = init_params(MODEL, jax.random.key(0), heads=("causal_lm",))
    examples, reference, rows = tiny_rows(loss == "kto")
    objective = preference_objective(MODEL, PreferConfig(loss=loss, beta=0.2), execution=FLOAT32)
    key = jax.random.key(0)
    _, norms = objective.prepare(rows, key, 0, True)
    assert float(norms) == 7

    @jax.jit
    def whole_gradient(batch):
        return jax.value_and_grad(lambda params: objective.loss(params, batch, key, norms, True), has_aux=True)(params)

    (value, sums), gradient = whole_gradient(rows)
    policy = np.array([summed(MODEL, params, example) for example in examples])
    ratio = (policy - reference).reshape(7, 2)
    if loss == "dpo":
        expected = np.logaddexp(0, -0.2 * (ratio[:, 0] - ratio[:, 1])).mean()
        assert float(sums["kl"][0] / sums["kl"][1]) == pytest.approx(-ratio.mean(), rel=1e-4)
    else:
        z = max(0, ratio[:, 1].mean())
        sides = np.where(np.arange(7) % 2, 1, -1)
        expected = (1 - 1 / (1 + np.exp(-0.2 * sides * (ratio[:, 0] - z)))).mean()
        assert float(sums["kl"][0] / sums["kl"][1]) == pytest.approx(z, rel=1e-4)
    assert float(value) == pytest.approx(expected, rel=1e-4)

    if loss == "kto":
        assert not objective.divisible
        (again, counted), parts = jax.jit(
            lambda batch: objective.gradient(lambda params: params, params, batch, key, norms, 4)
        )(rows)
        assert float(again) == pytest.approx(float(value), rel=1e-5)
        close(jax.tree.map(lambda pair: pair, dict(sums)), dict(counted))
    else:
        part = micro_batches(rows, 4)
        parts = [whole_gradient({name: array[at] for name, array in part.items()})[1] for at in range(4)]
        parts = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    close(gradient, parts)
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        close(gradient, whole_gradient(place_batch(rows, mesh))[1])


@pytest.mark.parametrize("loss", ["dpo", "kto", "simpo"])
def test_pairs_that_share_a_row_are_learnt_as_each_by_itself(loss):
    """Seven pairs in eight rows, and in two rows of four, of which they see nothing of each other."""
    params = init_params(MODEL, jax.random.key(0), heads=("causal_lm",))
    examples, reference, rows = tiny_rows(loss == "kto")
    full = LabelledBatches(examples, 16, 0, pad_id=0, max_length=16, examples_per_row=8, together=2).fixed()[0]
    full["reference"] = np.where(full["example_weights"] > 0, reference[full["index"]], 0).astype(np.float32)
    assert rows["input_ids"].shape[0] == 8 and full["input_ids"].shape[0] == 2
    objective = preference_objective(MODEL, PreferConfig(loss=loss, beta=0.2), execution=FLOAT32)
    key, found = jax.random.key(0), []
    for batch in (rows, full):
        _, norms = objective.prepare(batch, key, 0, True)
        learnt = jax.jit(
            lambda batch, norms=norms: jax.value_and_grad(
                lambda params: objective.loss(params, batch, key, norms, True), has_aux=True
            )(params)
        )
        found.append(learnt(batch))
    close(*found)
    assert float(found[0][0][1]["loss"][1]) == 7


@pytest.mark.parametrize("loss", ["ipo", "orpo", "simpo"])
def test_other_objectives_take_what_their_losses_do(loss):
    """IPO whole answers beside the reference, ORPO and SimPO means over tokens and no reference."""
    params = init_params(MODEL, jax.random.key(0), heads=("causal_lm",))
    examples, reference, rows = tiny_rows(False)
    policy = np.float32([summed(MODEL, params, example) for example in examples]).reshape(7, 2)
    size = np.float32([example.of_tokens["loss_weights"][1:].sum() for example in examples]).reshape(7, 2)
    expected, config = {
        "ipo": (losses.ipo(policy, reference.reshape(7, 2), 0.2), PreferConfig(loss="ipo", beta=0.2)),
        "orpo": (losses.orpo(policy, size, 0.1), PreferConfig(loss="orpo")),
        "simpo": (losses.simpo(policy, size, 2.0, 0.5), PreferConfig(loss="simpo", gamma=0.5)),
    }[loss]
    objective = preference_objective(MODEL, config, execution=FLOAT32)
    if loss != "ipo":
        del rows["reference"]
    value, sums = jax.jit(lambda batch: objective.loss(params, batch, jax.random.key(0), 7.0, True))(rows)
    assert float(value) == pytest.approx(float(expected.mean()), rel=1e-4)
    assert ("kl" in sums) == (loss == "ipo")


def preferred(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        {
            "prompt": "we saw the ",
            "chosen": f"{random.choice(WORDS['fruit'])} here",
            "rejected": f"{random.choice(WORDS['bird'])} here",
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("prefer")
    write_run(root / "decoder", MODEL, TEXTS)
    return (
        root,
        write_jsonl(root / "train.jsonl", preferred(16)),
        write_jsonl(root / "validation.jsonl", preferred(8, 1)),
    )


def config_for(there, run_dir, **changes) -> PreferConfig:
    root, train, validation = there
    defaults = dict(
        init_from=str(root / "decoder"),
        run_dir=str(run_dir),
        steps=6,
        batch_size=8,
        log_every=1,
        eval_every=6,
        data=PreferData(train=train, validation=validation, max_length=32),
        optimizer=FinetuneOptimizer(learning_rate=3e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(1, 1, 1),
    )
    return PreferConfig(**defaults | changes)


def losses_of(run) -> list[float]:
    return [
        line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]


def test_a_decoder_learns_what_is_preferred_and_resumes_bit_for_bit(there, tmp_path):
    summary = main(config_for(there, tmp_path / "whole", export=str(tmp_path / "exported")))
    metrics = summary["metrics"]
    assert losses_of(tmp_path / "whole")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["accuracy"] == 1.0 and metrics["margin"] > 0.1 and metrics["pairs"] == 8
    assert "Tuned to preferences" in (tmp_path / "whole/report.html").read_text()
    main(config_for(there, tmp_path / "parts", stop_at=3))
    parts = main(config_for(there, tmp_path / "parts"))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole") and parts["metrics"] == metrics
    # From Python and by others: the log-probabilities that the run has written down.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (tmp_path / "whole/predictions.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    end = tokenizer.eos_token_id
    prompt, ids = (tokenizer(text, add_special_tokens=False).input_ids
                   for text in ("we saw the", f"we saw the {rows[0]['chosen']}"))  # fmt: skip
    with torch.no_grad():
        logprobs = torch.log_softmax(theirs(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0], -1)
    found = sum(float(logprobs[at, token]) for at, token in enumerate([*ids, end]) if at >= len(prompt))
    assert rows[0]["logprob_chosen"] == pytest.approx(found, abs=1e-3)
    assert espalier.load(tmp_path / "whole").generate("we saw the", max_new_tokens=2, temperature=0.0)[0]
    # Without its reference a run does not go on.
    (tmp_path / "parts" / NAME).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read .* without the log-probabilities of its reference"):
        main(config_for(there, tmp_path / "parts"))


def test_a_run_whose_pairs_share_rows_learns_the_same(there, tmp_path):
    """And as many share one as suit their length, where that is not said."""
    plain = main(config_for(there, tmp_path / "plain"))
    data = dataclasses.replace(config_for(there, "").data, pairs_per_row=0)
    packed = main(config_for(there, tmp_path / "packed", data=data))
    assert json.loads((tmp_path / "packed/config.json").read_text())["data"]["pairs_per_row"] == 8
    assert losses_of(tmp_path / "packed") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    assert packed["metrics"] == pytest.approx(plain["metrics"], rel=1e-4, abs=1e-5)
    with pytest.raises(UserError, match="data.pairs_per_row=3: 8 pairs do not make 1 equal parts .* try --data.pairs-"):
        main(config_for(there, tmp_path / "three", data=dataclasses.replace(data, pairs_per_row=3)))


def test_adapters_switched_off_are_the_reference(there, tmp_path):
    lora = dict(lora=LoraConfig(rank=2), optimizer=FinetuneOptimizer(learning_rate=2e-2), steps=4, eval_every=4)
    once = main(config_for(there, tmp_path / "once", **lora))
    live = main(config_for(there, tmp_path / "live", **lora, reference="live"))
    assert losses_of(tmp_path / "live") == pytest.approx(losses_of(tmp_path / "once"), rel=1e-4)
    assert losses_of(tmp_path / "once")[-1] < math.log(2) - 0.01
    assert live["metrics"] == pytest.approx(once["metrics"], rel=1e-3, abs=1e-4)


def test_kto_learns_from_single_answers_in_micro_batches(there, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in preferred(8) for name in ("chosen", "rejected")]  # fmt: skip
    train, validation = (write_jsonl(tmp_path / name, rows) for name in ("t.jsonl", "v.jsonl"))
    data = PreferData(train=train, validation=validation, max_length=32)
    changes = dict(loss="kto", data=data)
    metrics = main(config_for(there, tmp_path / "run", **changes, accumulation=2))["metrics"]
    assert losses_of(tmp_path / "run")[0] == pytest.approx(0.5, abs=1e-5)
    assert metrics["margin"] == pytest.approx(metrics["reward_good"] - metrics["reward_bad"]) and metrics["margin"] > 0


def test_answers_to_other_prompts_are_those():
    verdicts = [Verdict("", f"{number // 2}", f"{number}", bool(number % 2)) for number in range(8)]
    found = mismatched(verdicts, 0)
    assert all(verdicts[other].prompt != one.prompt for one, other in zip(verdicts, found, strict=True))
    same = [one._replace(prompt="") for one in verdicts]
    assert all(other != number for number, other in enumerate(mismatched(same, 0)))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"chosen": "b", "rejected": "b"}], {}, "in every pair chosen and rejected are the same"),
        ([{"prompt": "we saw " * 40, "chosen": "b", "rejected": "c"}], {},
         "no pair is left: every prompt alone fills the 32 tokens"),
        ([{"prompt": "a", "completion": "b", "label": True}], {}, "--loss kto learns; dpo needs pairs"),
        ([{"prompt": "a", "completion": "b", "label": True}], {"loss": "kto"}, "every answer has the same label"),
        ([{"chosen": "we saw " * 40 + "a", "rejected": "we saw " * 40 + "b"}], {}, "differ only behind the 32 tokens"),
    ],
)  # fmt: skip
def test_what_teaches_nothing_is_one_line_and_leaves_nothing(there, tmp_path, rows, changes, message):
    data = PreferData(write_jsonl(tmp_path / "a.jsonl", rows), there[2], max_length=32)
    with pytest.raises(UserError, match=message) as caught:
        main(config_for(there, tmp_path / "run", data=data, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_settings_that_mean_nothing_are_refused():
    for changes, message in (
        ({"beta": 0.0}, "beta=0.0 must be greater than 0"),
        ({"scratch": True}, "preferences move a model that writes already"),
        ({"reference": "live"}, "give --lora.rank, too"),
    ):
        with pytest.raises(UserError, match=message):
            PreferConfig(**changes)


def test_chats_and_texts_are_the_tokens_that_a_model_is_asked_with(there, tmp_path):
    """In chats only the last answer is learnt; a tokenizer with a template makes turns of texts."""
    tokenizer = espalier.load(there[0] / "decoder").tokenizer
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "we"}, {"role": "user", "content": "b"}]
    rows = [{"prompt": chat, "chosen": [{"role": "assistant", "content": "saw"}],
             "rejected": [{"role": "assistant", "content": "the"}]}]  # fmt: skip
    for written, learnt in (
        (rows, ["saw<|endoftext|>", "the<|endoftext|>"]),
        ([{"prompt": "we ", "chosen": "saw", "rejected": "here"}], [" saw<|endoftext|>", " here<|endoftext|>"]),
    ):
        part = read_preferences(PreferData(train=write_jsonl(tmp_path / "a.jsonl", written)), "train")
        tokenizer.chat_template = None
        tokenizer, is_chat = with_template(tokenizer, PreferData(), [part])
        assert is_chat == (written is rows) and (tokenizer.chat_template is None) == (not is_chat)
        found = encode(part, "dpo", tokenizer, 64, is_chat, 0)
        for example, text in zip(found.examples, learnt, strict=True):
            weights = example.of_tokens["loss_weights"]
            assert tokenizer.decode([i for i, w in zip(example.ids, weights, strict=True) if w]) == text
    tokenizer.chat_template = DEFAULT.replace("BEGIN", "").replace("END", "<|endoftext|>")
    assert with_template(tokenizer, PreferData(), [part])[1]
