"""Masked diffusion: the loss and the draws against enumeration on three words, and a run from text to text."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlm.presets
import mlm.pretrain
from clm.generate import GenerateConfig
from clm.generate import main as generate
from espalier.commands.evaluate import command as evaluate
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.config import Execution
from espalier.models.decoding import Sampling
from espalier.models.logits import head_logits
from espalier.models.transformer import init_params
from espalier.models.unmasking import Unmasking, unmasked
from espalier.predict.likelihood import bound_scores
from espalier.predict.sampling import SamplingConfig, UnmaskingConfig
from mlm.diffusion.loss import diffusion_objective
from mlm.masking import Vocabulary

FLOAT32 = Execution(dtype="float32", scan_layers=False)
SIZES = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    head_dim=None,
    prefix_layers=(),
    first_attention_norm=True,
    embedding_size=None,
)
RUN = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
RUN |= dict(max_position_embeddings=64)
MODEL = dataclasses.replace(mlm.presets.debug().model, vocab_size=8, **SIZES)
MASK, WORDS, N = 4, (5, 6, 7), 3
VOCABULARY = Vocabulary(MASK, np.arange(8) >= 5, np.zeros(8, np.uint8))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny programs run for microseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params():
    """Far from uniform, so that every order has another probability."""
    fresh = init_params(MODEL, jax.random.key(0), heads=("masked_lm",))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, fresh)


def framed(words) -> list[int]:
    """[CLS] word word word [SEP]"""
    return [2, *words, 3]


@pytest.fixture(scope="module")
def table(params):
    """What the model says of every row of words and masks: row → log p [place, word]."""
    rows = list(itertools.product((*WORDS, MASK), repeat=N))
    ids = np.array([framed(row) for row in rows], np.int32)
    batch = {"input_ids": jnp.asarray(ids), "segment_ids": jnp.ones_like(ids)}
    scores = np.asarray(head_logits(MODEL, "masked_lm", params, batch | positions(ids), FLOAT32), np.float64)
    logp = scores[:, 1:-1] - np.log(np.exp(scores[:, 1:-1]).sum(-1, keepdims=True))
    return dict(zip(rows, logp, strict=True))


def positions(ids):
    return {"positions": jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)}


def hide(text, places):
    return tuple(MASK if at in places else word for at, word in enumerate(text))


def subsets():
    return [set(c) for k in range(1, N + 1) for c in itertools.combinations(range(N), k)]


def bound(table, text) -> float:
    """Σ over the sets that may be hidden, each with ∫ t^(k-1) (1-t)^(n-k) dt, by Gauss–Legendre (exact: degree 2)."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    t = (nodes + 1) / 2
    total = 0.0
    for places in subsets():
        integral = float((weights / 2 * t ** (len(places) - 1) * (1 - t) ** (N - len(places))).sum())
        total -= integral * sum(table[hide(text, places)][at, text[at]] for at in places)
    return total


def orders(table, text) -> list[float]:
    """log p of a text written one by one, for each order."""
    found = []
    for order in itertools.permutations(range(N)):
        left, logp = set(range(N)), 0.0
        for at in order:
            logp += table[hide(text, left)][at, text[at]]
            left -= {at}
        found.append(logp)
    return found


TEXT = (5, 7, 7)


def test_the_bound_is_the_mean_over_orders_and_above_the_likelihood(table):
    for text in itertools.product(WORDS, repeat=N):
        ways = orders(table, text)
        assert bound(table, text) == pytest.approx(-np.mean(ways), rel=1e-9)
        assert bound(table, text) > -np.log(np.mean(np.exp(ways)))


def test_the_loss_is_the_enumerated_bound(params, table):
    """The mean of 6,000 rows of one text, to four standard errors; and weights that add up to the tokens."""
    rows = 6000
    objective = diffusion_objective(MODEL, VOCABULARY, np.full(8, 3), execution=FLOAT32)
    ids = np.array([framed(TEXT)] * rows, np.int32)
    batch = {"input_ids": jnp.asarray(ids), "segment_ids": jnp.ones_like(ids)} | positions(ids)
    prepared, norms = jax.jit(lambda batch: objective.prepare(batch, jax.random.key(1), 0, True))(batch)
    assert float(norms) == pytest.approx(N * rows, rel=1e-6)
    hidden = np.asarray(prepared["input_ids"])[:, 1:-1] == MASK
    count = hidden.sum(1)
    # k is uniform, spread evenly over the batch; the set is uniform among those of k tokens.
    assert np.bincount(count, minlength=N + 1)[1:].tolist() == pytest.approx([rows / N] * N, abs=1)
    assert np.abs(hidden[count == 1].mean(0) - 1 / N).max() < 0.05
    loss, sums = jax.jit(lambda batch: objective.loss(params, batch, jax.random.key(2), norms, False))(prepared)

    def row_loss(at):
        places = set(np.flatnonzero(hidden[at]))
        return -N / len(places) * sum(table[hide(TEXT, places)][place, TEXT[place]] for place in places) / N

    each = [row_loss(at) for at in range(rows)]
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-5)
    error = np.std(each) / math.sqrt(rows)
    assert error < 0.05 * float(loss) and abs(float(loss) - bound(table, TEXT) / N) < 4 * error
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(float(loss), rel=1e-6)
    bits, size = sums["bits_per_byte_bound"]
    assert float(bits / size) == pytest.approx(float(loss) / math.log(2) / 3, rel=1e-6)


@pytest.fixture(scope="module")
def drawn(params):
    """(steps, order, temperature) → rows of words, 8,000 or one."""

    def draw(steps, order, temperature, rows):
        how = Unmasking(steps, order, MASK, Sampling(N, temperature))
        ids = jnp.asarray([framed([MASK] * N)] * rows, jnp.int32)
        batch = {"input_ids": ids, "segment_ids": jnp.ones_like(ids)} | positions(ids)
        keys = jax.random.split(jax.random.key(3), rows)
        allowed = jnp.asarray(VOCABULARY.ordinary_V)
        run = jax.jit(lambda batch, keys: unmasked(MODEL, params, batch, allowed, keys, how, FLOAT32))
        found = np.asarray(run(batch, keys))
        assert (found[:, [0, -1]] == [2, 3]).all() and (found[:, 1:-1] >= 5).all()
        return found[:, 1:-1]

    return draw


def restricted(table):
    """The conditionals over words alone: special tokens are never written."""
    return {row: logp[:, :] - np.log(np.exp(logp[:, 5:]).sum(-1, keepdims=True)) for row, logp in table.items()}


def test_one_by_one_in_random_order_draws_the_enumerated_distribution(table, drawn):
    words, rows = restricted(table), 8000
    texts = list(itertools.product(WORDS, repeat=N))
    p = np.array([np.mean(np.exp(orders(words, text))) for text in texts])
    assert p.sum() == pytest.approx(1, rel=1e-9) and p.max() > 3 * p.min()
    found = [tuple(row) for row in drawn(N, "random", 1.0, rows).tolist()]
    counts = np.array([found.count(text) for text in texts])
    # χ² of 26 degrees of freedom: above 60 once in ten thousand.
    assert ((counts - rows * p) ** 2 / (rows * p)).sum() < 60


def test_all_at_once_draws_each_token_by_itself(table, drawn):
    p = np.exp(restricted(table)[(MASK,) * N][:, 5:])
    found = drawn(1, "random", 1.0, 8000)
    for place in range(N):
        counts = np.bincount(found[:, place], minlength=8)[5:]
        assert ((counts - 8000 * p[place]) ** 2 / (8000 * p[place])).sum() < 23  # 2 degrees of freedom


@pytest.mark.parametrize("steps", [2, 3])
def test_the_surest_tokens_come_first(table, drawn, steps):
    """Without chance: two passes fill one token (3 · 1 // 2), then two; three passes one each."""
    words, text = restricted(table), (MASK,) * N
    for step in range(steps):
        logp, left = words[text], [at for at in range(N) if text[at] == MASK]
        best = {at: 5 + int(logp[at, 5:].argmax()) for at in left}
        surest = sorted(left, key=lambda at: -logp[at, best[at]])[: N * (step + 1) // steps - N * step // steps]
        text = tuple(best[at] if at in surest else word for at, word in enumerate(text))
    assert tuple(drawn(steps, "confidence", 0.0, 1)[0].tolist()) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ["sun and moon", "salt and pepper", "day and night", "cat and dog"]
    rng = np.random.default_rng(0)
    for number in range(24):
        (folder / f"{number}.txt").write_text(". ".join(rng.choice(words, 40)))
    base = mlm.presets.diffusion_demo()
    config = dataclasses.replace(
        base,
        run_dir=str(folder / "run"),
        **dict(steps=60, batch_size=16, eval_rows=32, eval_every=60, log_every=20, export=str(folder / "out")),
        model=dataclasses.replace(base.model, **RUN),
        data=dataclasses.replace(base.data, builtin=None, files=(f"{folder}/*.txt",), sequence_length=32),
        execution=FLOAT32,
    )
    return folder, mlm.pretrain.main(config)


def test_a_run_reports_the_bound_and_writes(run, capsys):
    folder, summary = run
    found = summary["eval"]
    assert {"loss", "perplexity_bound", "bits_per_byte_bound", "accuracy"} == found.keys()
    assert found["perplexity_bound"] == pytest.approx(math.exp(found["loss"]), rel=1e-6) and found["loss"] < 4
    prompts = ("sun and", "")
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    how = UnmaskingConfig(steps=3)
    said = generate(GenerateConfig(str(folder / "run"), prompts, sampling=sampling, unmasking=how))["completions"]
    model = load(folder / "run")
    assert said == model.generate(list(prompts), max_new_tokens=6, temperature=0.0, steps=3) and len(said) == 2
    assert all(
        len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 6 and "[" not in text for text in said
    )
    outside = load(f"hf:{folder / 'out'}")
    assert outside.generate(list(prompts), max_new_tokens=6, temperature=0.0, steps=3) == said
    for arguments, message in (
        (dict(max_new_tokens=100), "exceeds the model's 64 positions; try max_new_tokens="),
        (dict(beams=2), "are of decoders"),
        (dict(steps=0), "unmasking.steps=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate("sun", **arguments)
    with pytest.raises(UserError, match="does not generate"):
        outside.generate("sun")


def test_evaluation_bounds_by_enumeration(run, tmp_path, capsys):
    """`evaluate` on a text of three tokens, with so many draws that its estimate has settled."""
    folder, _ = run
    model = load(folder / "run")
    mask = special_ids(model.tokenizer).mask
    ids = model.tokenizer("sun and moon", add_special_tokens=False)["input_ids"][:N]
    cls, sep = (special_ids(model.tokenizer, need=("cls", "sep")).cls, special_ids(model.tokenizer).sep)
    assert len(ids) == N
    rows = [[mask if at in places else ids[at] for at in range(N)] for places in subsets()]
    logits = np.asarray(model.logits({"input_ids": np.array([[cls, *row, sep] for row in rows])}), np.float64)[:, 1:-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = 0.0
    for places, one in zip(subsets(), logp, strict=True):
        weight = math.factorial(len(places) - 1) * math.factorial(N - len(places)) / math.factorial(N)
        expected -= weight * sum(one[at, ids[at]] for at in places)
    (scored,) = bound_scores(model, [ids], 32, 3000)
    assert len(scored.logprobs) == N and -scored.logprobs.sum() == pytest.approx(expected, rel=0.02)

    (tmp_path / "text.txt").write_text("sun and moon. salt and pepper")
    evaluate([str(folder / "run"), "--data.validation", str(tmp_path / "text.txt"), "--data.draws", "50", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert found["perplexity_bound"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)
    assert found["bits_per_byte_bound"] == pytest.approx(
        found["loss"] * found["tokens"] / found["bytes"] / math.log(2), rel=1e-6
    )
    assert "perplexity" not in found and "pseudo_perplexity" not in found
