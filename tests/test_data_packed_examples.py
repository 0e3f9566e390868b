"""Packed examples teach what each of them teaches alone."""

import dataclasses
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest
from tiny_models import LLAMA, close, random_params, strict_and_quick  # noqa: F401 (a fixture)

from clm.loss import causal_lm_objective
from espalier.data.examples import Example
from espalier.data.loader import Batches
from espalier.data.packed_examples import ExampleRows
from espalier.errors import UserError
from espalier.models.config import Execution

T = 24


def examples(count: int, seed: int = 0) -> list[Example]:
    """Prompts of weight 0 and answers of weight 1, and examples of weights of their own."""
    rng = np.random.default_rng(seed)
    made = []
    for size in rng.integers(2, T + 2, count).tolist():
        ids, prompt = rng.integers(5, 200, size), rng.integers(0, size)
        weights = np.arange(size) >= prompt
        made.append(
            Example(ids, [0] * size, None, {"weight": float(rng.integers(1, 4)) / 2}, {"loss_weights": weights})
        )
    return made


def counted(batches: list[dict]) -> Counter:
    """How often each (tokens before it in its example, label, weight) is learnt; looks at one place at a time."""
    found: Counter = Counter()
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            before: list[int] = []
            for place in range(T):
                segment = batch["segment_ids"][row, place]
                if batch["positions"][row, place] == 0:
                    before = []
                if not segment:
                    assert not batch["loss_weights"][row, place] and batch["input_ids"][row, place] == 3
                    continue
                before.append(int(batch["input_ids"][row, place]))
                assert batch["positions"][row, place] == len(before) - 1
                found[*before, int(batch["labels"][row, place]), float(batch["loss_weights"][row, place])] += 1
    return found


def test_each_label_is_learnt_as_often_as_it_is_there():
    given = examples(50)
    rows = ExampleRows(given, T, pad_id=3)
    expected: Counter = Counter()
    for example in given:
        for place in range(1, len(example.ids)):
            weight = float(example.of_tokens["loss_weights"][place]) * example.of_row["weight"]
            expected[*example.ids[: place + 1].tolist(), weight] += 1
    assert counted(Batches({"text": rows}, 4).fixed(len(rows))) == expected
    steps = len(rows) // 4
    assert rows.fill > 0.8 and steps > 2
    epoch = [Batches({"text": rows}, len(rows), seed=2).batch(step) for step in (0, 1)]
    assert counted(epoch[:1]) == counted(epoch[1:]) == expected
    assert epoch[0]["input_ids"].tolist() != epoch[1]["input_ids"].tolist()


def test_hosts_read_parts_of_one_batch():
    batches = Batches({"a": ExampleRows(examples(30), T, pad_id=3), "b": ExampleRows(examples(9, 1), T, pad_id=3)}, 6)
    whole, parts = batches.batch(5), [batches.batch(5, part) for part in (slice(0, 2), slice(2, 6))]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


@pytest.mark.usefixtures("strict_and_quick")
def test_packed_loss_is_unpacked_loss():
    """Sum and gradient of the weighted loss of a small decoder: several examples a row against each in its own."""
    model = dataclasses.replace(LLAMA, num_hidden_layers=1)
    given, token_bytes = examples(12), np.ones(model.vocab_size, np.int32)
    objective = causal_lm_objective(model, execution=Execution(dtype="float32"))
    params = random_params(model, ("causal_lm",))

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        key = jax.random.key(0)
        batch, norms = objective.prepare(batch, key, 0, False)
        value, metrics = objective.loss(params, batch, key, norms, False)
        return value, metrics["loss"]

    gradient = jax.jit(loss)

    def learnt(packed):
        # Empty rows fill up, so that both compile the same program.
        [batch] = Batches({"text": packed}, len(given)).fixed(len(packed))
        (_, sums), gradients = gradient(params, batch)
        return sums, gradients

    packed = ExampleRows(given, T, pad_id=3, token_bytes=token_bytes)
    alone = [ExampleRows([example], T, pad_id=3, token_bytes=token_bytes) for example in given]
    assert len(packed) < len(given)

    class Apart:
        """Each example in a row of its own."""

        fill = 0.0

        def __len__(self) -> int:
            return len(alone)

        def rows(self, indices):
            parts = [alone[index].rows(np.zeros(1, int)) for index in indices]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    together, apart = learnt(packed), learnt(Apart())
    assert float(together[0][1]) == pytest.approx(
        sum(float(example.of_tokens["loss_weights"][1:].sum()) * example.of_row["weight"] for example in given)
    )
    close(together, apart)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="example 2 has 26 tokens, and a row has room for 25"):
        ExampleRows([Example([5] * 25, [0] * 25), Example([5] * 26, [0] * 26)], T, pad_id=3)
    with pytest.raises(UserError, match="there are no examples"):
        ExampleRows([], T, pad_id=3)
