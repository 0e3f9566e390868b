"""Rankers that learn from clicks: targets by hand, the expectation over all clicks, a run against its position bias."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_rank import ENCODER, judged_rows, write_jsonl
from tiny_models import close, strict_and_quick  # noqa: F401
from tiny_runs import write_run

from espalier import load
from espalier.data.examples import LabelledBatches
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.rank.examples import GroupBatches, training_pairs
from finetune.tasks.rank.files import read_judged
from finetune.tasks.rank.record import RankConfig, RankData
from finetune.tasks.rank.task import ranking_objective
from finetune.train import main
from sharding.mesh import MeshConfig

SHOWN = ("apple", "saw", "plum", "axe")
"""Texts of one query, in the order in which they are shown."""
RELEVANCE = np.array([0.2, 0.9, 1.0, 0.6])
"""How likely each is to be clicked where it is looked at."""
LOOKED = np.arange(1.0, 5.0) ** -0.5


def shown(clicks, **more) -> list[dict]:
    """A query, and another whose first text is clicked for certain, so that something is."""
    rows = [
        {"query": "what", "text": text, "position": at, "click": int(click)}
        for at, (text, click) in enumerate(zip(SHOWN, clicks, strict=True), 1)
    ]
    sure = [{"query": "sure", "text": text, "position": at, "click": 2 - at} for at, text in enumerate(SHOWN[:2], 1)]
    return [row | more for row in rows + sure]


def read(tmp_path, rows, **data):
    path = write_jsonl(tmp_path / "clicks.jsonl", rows)
    return read_judged(RankData(train=path, **{"position": "position"} | data), "train")


def test_targets_are_clicks_by_propensity_over_all_impressions(tmp_path):
    rows = shown([0, 1, 0, 1]) + shown([1, 0, 0, 1])
    judged = read(tmp_path, rows, position_bias=0.5)
    (what, sure), names = judged.queries, {name: text for name, text in judged.texts.items()}
    by_text = {names[name]: value for name, value in what.relevance.items()}
    assert by_text == pytest.approx({"apple": 0.5, "saw": 2**0.5 / 2, "plum": 0, "axe": 2.0})
    assert sure.relevance == {"d1": 1.0, "d2": 0.0} and judged.clicks and judged.highest == 1
    assert "12 impressions of 6 pairs of 'query' and 'text', 6 clicked by 'click'" in judged.facts[-1]
    clipped = read(tmp_path, rows, position_bias=0.5, propensity_clip=0.8).queries[0].relevance
    assert list(clipped.values()) == pytest.approx([0.5, 1 / 0.8 / 2, 0, 1 / 0.8])
    given = [row | {"seen": 0.25} for row in rows]
    assert read(tmp_path, given, position=None, propensity="seen").queries[0].relevance["d4"] == 4.0
    assert read(tmp_path, rows, position_bias=0.0).queries[0].relevance["d4"] == 1.0


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        ({"position": 0}, {}, "clicks.jsonl:1: position=0; a position is a whole number, 1 the first"),
        ({"position": None}, {}, "clicks.jsonl:1: position='None'; a position is"),
        ({"click": 0.5}, {}, "clicks.jsonl:1: click=0.5; a click is 0 or 1"),
        ({"click": 0}, {}, "nothing was clicked by 'click'"),
        ({"seen": 0}, {"position": None, "propensity": "seen"}, "seen=0; a propensity is a probability above 0"),
        ({}, {"position": "rank"}, "no column 'rank'; its columns are"),
        ({}, {"propensity": "position"}, "say the same thing in two ways; give one"),
        ({}, {"propensity_clip": 1.0}, "data.propensity_clip=1.0"),
    ],
)
def test_what_is_no_impression_is_refused_in_a_line(tmp_path, row, data, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, shown([1, 0, 0, 0], **row), **data)
    assert "\n" not in str(error.value)


def test_files_without_clicks_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no clicks: --data.position and --data.propensity are for files"):
        read(tmp_path, judged_rows(2))


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    root = tmp_path_factory.mktemp("clicks")
    model = dataclasses.replace(ENCODER, labels=("relevance",), hidden_dropout=0.0, attention_dropout=0.0)
    run = load(write_run(root / "encoder", model, [*SHOWN, "what sure", *map(str, judged_rows(40))]))
    from espalier.models.transformer import init_params

    params = init_params(model, jax.random.key(0), heads=("sequence_classification",))
    params = jax.tree.map(lambda x: x + 0.2 * np.sin(np.arange(x.size, dtype=np.float32).reshape(x.shape)), params)

    def compiled(grouped):
        objective = ranking_objective(model, 6, execution=Execution(), weighted=grouped)

        @jax.jit
        def learnt(batch):
            def loss(params):
                return objective.loss(params, batch, jax.random.key(0), np.float32(1), True)[0]

            return jax.value_and_grad(loss)(params)

        return learnt

    return SimpleNamespace(root=root, tokenizer=run.tokenizer, compiled=compiled)


def total(ranker, learnt, judged, grouped):
    """The sum of the loss over all pairs or groups, and its gradient, all parameters in a row: float64 [1 + count]."""
    pairs = training_pairs(judged, ranker.tokenizer, 16, False, negatives=7, grouped=grouped, seed=0)
    if grouped:
        batch = GroupBatches(pairs, len(pairs.groups), 4, 0, pad_id=0, max_length=16).batch(0)
        # Always five groups, so that one program is compiled; those that are not there count nothing.
        places = np.minimum(np.arange(5), len(pairs.groups) - 1)
        batch = {name: array[places] for name, array in batch.items()}
        batch["example_weights"][len(pairs.groups) :] = 0
    else:
        batch = LabelledBatches(pairs.encoded, len(pairs.encoded), pad_id=0, max_length=16).batch(0)
    return np.concatenate([np.float64(leaf).reshape(-1) for leaf in jax.tree.leaves(learnt(batch))])


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_the_expectation_over_all_clicks_is_the_loss_of_the_relevance_itself(ranker, tmp_path, loss):
    """Over all 16 outcomes, each with its probability, through file, groups and objective; plain clicks miss it."""
    grouped = loss == "softmax"
    learnt = ranker.compiled(grouped)
    found = {0.0: [], 0.5: []}
    for clicks in itertools.product([0, 1], repeat=4):
        chance = np.prod(np.where(clicks, LOOKED * RELEVANCE, 1 - LOOKED * RELEVANCE))
        for bias, sums in found.items():
            judged = read(tmp_path, shown(clicks), position_bias=bias)
            sums.append(chance * total(ranker, learnt, judged, grouped))
    expected = {bias: np.sum(sums, axis=0) for bias, sums in found.items()}
    # The relevance itself: as if everything had been looked at, and were clicked as often as it should be.
    judged = read(tmp_path, shown([1, 1, 1, 1]), position_bias=0.0)
    first = judged.queries[0]
    known = first._replace(relevance=dict(zip(first.relevance, RELEVANCE.tolist(), strict=True)))
    whole = total(ranker, learnt, judged._replace(queries=[known, judged.queries[1]]), grouped)
    close(expected[0.5], whole)
    assert abs(expected[0.0][0] / whole[0] - 1) > 0.05


def clicked(count: int, seed: int) -> list[dict]:
    """Fruit is what was asked for and is shown last, behind tools; one look in three at a tool ends in a click, too."""
    random, rows = np.random.default_rng(seed), []
    for row in judged_rows(count, seed):
        texts = row["negatives"] + row["positives"]
        for at, text in [(at, text) for _ in range(12) for at, text in enumerate(texts, 1)]:
            click = random.random() < (1.0 if at == 4 else 0.33) / at
            rows.append({"query": row["query"], "text": text, "position": at, "clicked": int(click)})
    return rows


@pytest.mark.parametrize(("bias", "loss", "learns"), [(1.0, "bce", True), (1.0, "softmax", True), (0.0, "bce", False)])
def test_a_ranker_learns_what_was_seldom_looked_at(ranker, tmp_path, bias, loss, learns):
    """At the last place fruit is clicked less often than a tool at the first."""
    config = RankConfig(
        init_from=str(ranker.root / "encoder"),
        run_dir=str(tmp_path / "run"),
        steps=40,
        batch_size=8,
        eval_every=40,
        loss=loss,
        dropout=0.0,
        data=RankData(
            train=write_jsonl(tmp_path / "clicks.jsonl", clicked(16, 1)),
            validation=write_jsonl(tmp_path / "judged.jsonl", judged_rows(8, 2)),
            position="position",
            position_bias=bias,
            negatives=3,
        ),
        optimizer=FinetuneOptimizer(learning_rate=5e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(1, 1, 1),
    )
    metrics = main(config)["metrics"]
    assert (metrics["recall@1"] == 1.0) == learns
