"""Masking: exact counts, the 80/10/10 split, whole words, and independence of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.token_tables import CONTINUABLE, CONTINUES, word_table
from espalier.data.tokenizer import plain_backend, special_ids, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from mlm.config import MaskingConfig
from mlm.masking import Vocabulary, mask_batch, rate_at, slots
from sharding.mesh import MeshConfig, build_mesh, place_batch

MASK, VOCAB, SPECIALS = 4, 100, 5
T = 64


def vocabulary(words=None):
    ordinary_V = np.arange(VOCAB) >= SPECIALS
    return Vocabulary(MASK, ordinary_V, np.full(VOCAB, 2, np.uint8) if words is None else words)


def batch(rows=8, seed=0, padding=True):
    """Rows of [CLS]=1 … [SEP]=2 documents, two a row, padded at the end by a different amount each."""
    rng = np.random.default_rng(seed)
    input_BT = rng.integers(SPECIALS, VOCAB, (rows, T)).astype(np.int32)
    segment_BT = np.ones((rows, T), np.int32)
    segment_BT[:, 30:] = 2
    input_BT[:, [0, 30]] = 1
    input_BT[:, 29] = 2
    for row in range(rows if padding else 0):
        input_BT[row, T - 1 - row :] = 0
        segment_BT[row, T - 1 - row :] = 0
    return {"input_ids": input_BT, "segment_ids": segment_BT}


def test_exactly_k_ordinary_tokens_a_row():
    config, source = MaskingConfig(rate=0.3, random_fraction=0.0, mask_fraction=1.0), batch()
    masked = mask_batch(source, jax.random.key(0), 0.3, config, vocabulary())
    for row in range(8):
        ordinary = np.flatnonzero((source["input_ids"][row] >= SPECIALS) & (source["segment_ids"][row] > 0))
        hidden = np.flatnonzero(np.asarray(masked["input_ids"][row]) == MASK)
        assert len(hidden) == round(0.3 * len(ordinary))
        assert set(hidden) <= set(ordinary)
        used = np.asarray(masked["masked_weights"][row]) > 0
        assert set(np.asarray(masked["masked_positions"][row])[used]) == set(hidden)
        np.testing.assert_array_equal(
            np.asarray(masked["masked_labels"][row])[used],
            source["input_ids"][row][np.asarray(masked["masked_positions"][row])[used]],
        )


def test_80_10_10_and_nothing_else_changes():
    config, source = MaskingConfig(rate=0.5), batch(rows=512, padding=False)
    masked = mask_batch(source, jax.random.key(1), 0.5, config, vocabulary())
    positions, weights = np.asarray(masked["masked_positions"]), np.asarray(masked["masked_weights"])
    chosen = np.zeros((512, T), bool)
    np.put_along_axis(chosen, positions, weights > 0, axis=1)
    after, before = np.asarray(masked["input_ids"]), source["input_ids"]
    assert (after == before)[~chosen].all()
    became_mask = (after == MASK)[chosen].mean()
    kept = (after == before)[chosen].mean()
    # A random token equals the old one once in 95 draws; three standard deviations of 15,000 draws are about 0.01.
    assert became_mask == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / 95, abs=0.01)
    assert (after[chosen] == MASK)[after[chosen] < SPECIALS].all(), "a random token must not be a special token"


WORDS_V = np.where(np.arange(VOCAB) % 2 == 1, CONTINUES | CONTINUABLE, CONTINUABLE).astype(np.uint8)
"""Odd ids continue the token before them."""
WORDS_V[:SPECIALS] = 0


@pytest.mark.parametrize("seed", range(5))
def test_whole_words_are_hidden_whole_but_for_the_last_one(seed):
    words = WORDS_V
    config, source = MaskingConfig(rate=0.3, mask_fraction=1.0, random_fraction=0.0, whole_words=True), batch(seed=seed)
    masked = mask_batch(source, jax.random.key(seed), 0.3, config, vocabulary(words))
    for row in range(8):
        ids, segments = source["input_ids"][row], source["segment_ids"][row]
        hidden = np.asarray(masked["input_ids"][row]) == MASK
        ordinary = (ids >= SPECIALS) & (segments > 0)
        assert hidden.sum() == round(0.3 * ordinary.sum())
        word_of, cut = np.zeros(T, int), 0
        for t in range(1, T):
            continues = words[ids[t]] & 1 and words[ids[t - 1]] & 2 and segments[t] == segments[t - 1]
            word_of[t] = word_of[t - 1] + (not continues)
        for word in np.unique(word_of[ordinary]):
            inside = hidden[(word_of == word) & ordinary]
            if inside.any() and not inside.all():
                cut += 1
                assert inside[: inside.sum()].all(), "a cut word loses its end, not its beginning"
        assert cut <= 1


@pytest.mark.parametrize("whole_words", [False, True, "stored"])
def test_masks_are_equal_on_one_and_eight_devices(whole_words):
    config, source, key = MaskingConfig(rate=0.3, whole_words=bool(whole_words)), batch(), jax.random.key(3)
    if whole_words == "stored":
        source["word_starts"] = np.random.default_rng(1).random((8, T)) < 0.5
    alone = mask_batch(source, key, 0.3, config, vocabulary(WORDS_V))
    mesh = build_mesh(MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda b: mask_batch(b, key, 0.3, config, vocabulary(WORDS_V)))(place_batch(source, mesh))
    assert len(spread["input_ids"].sharding.device_set) == 8
    for name in alone:
        np.testing.assert_array_equal(np.asarray(alone[name]), np.asarray(spread[name]), err_msg=name)


def test_in_a_script_without_blanks_single_tokens_are_hidden():
    """Text → WordPiece → word table → masks: Japanese by the token, beside it Latin words that are hidden whole."""
    text = "吾輩は猫である名前はまだ無い abba"
    tokenizer = train_tokenizer([text.replace("abba", "ab ba ") * 30], "wordpiece", 400)
    ids = plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
    specials = special_ids(tokenizer)
    ordinary_V = ~np.isin(np.arange(vocabulary_size(tokenizer)), specials.all)
    here = Vocabulary(specials.mask, ordinary_V, word_table(tokenizer))
    latin = [at for at, token in enumerate(ids) if tokenizer.decode([token]).strip("# ").isascii()]
    assert len(ids) - len(latin) >= 8 and len(latin) > 1, "several tokens each, or the test says nothing"
    rows = {"input_ids": np.tile(np.array(ids, np.int32), (256, 1)), "segment_ids": np.ones((256, len(ids)), np.int32)}
    config = MaskingConfig(rate=0.3, mask_fraction=1.0, random_fraction=0.0, whole_words=True)
    hidden = np.asarray(mask_batch(rows, jax.random.key(0), 0.3, config, here)["input_ids"]) == specials.mask
    assert (hidden.sum(1) == round(0.3 * len(ids))).all()
    japanese = np.delete(hidden, latin, axis=1)
    pairs = japanese[:, :-1] & ~japanese[:, 1:]
    assert pairs.any(axis=0).all(), "each token is hidden without the next one in some row"
    whole = hidden[:, latin]
    assert (whole.all(1) | ~whole.any(1)).mean() > 0.5 and whole.all(1).any()


def test_stored_word_starts_are_as_good_as_the_table():
    """The same words, told in two ways, are the same masks; a word never reaches into the next document."""
    config, source, key = MaskingConfig(rate=0.3, whole_words=True), batch(), jax.random.key(3)
    table_BT = WORDS_V[source["input_ids"]]
    starts_BT = np.ones((8, T), bool)
    starts_BT[:, 1:] = (table_BT[:, 1:] & CONTINUES == 0) | (table_BT[:, :-1] & CONTINUABLE == 0)
    starts_BT[:, 30] = False
    by_table = mask_batch(source, key, 0.3, config, vocabulary(WORDS_V))
    by_starts = mask_batch(source | {"word_starts": starts_BT}, key, 0.3, config, vocabulary())
    for name in by_table:
        np.testing.assert_array_equal(np.asarray(by_table[name]), np.asarray(by_starts[name]), err_msg=name)


def test_other_keys_give_other_masks():
    config, source = MaskingConfig(), batch()
    first, second = (mask_batch(source, jax.random.key(k), 0.15, config, vocabulary()) for k in (0, 1))
    assert (np.asarray(first["masked_positions"]) != np.asarray(second["masked_positions"])).any()


def test_rate_schedule_is_linear_and_slots_hold_its_maximum():
    config = MaskingConfig(rate=0.3, final_rate=0.15)
    assert slots(config, 128) == 39
    rates = [float(rate_at(config, jnp.int32(step), 101)) for step in (0, 50, 100)]
    np.testing.assert_allclose(rates, [0.3, 0.225, 0.15], atol=1e-6)


def test_an_empty_row_has_no_weight():
    source = {"input_ids": np.zeros((1, T), np.int32), "segment_ids": np.zeros((1, T), np.int32)}
    masked = mask_batch(source, jax.random.key(0), 0.15, MaskingConfig(), vocabulary())
    assert np.asarray(masked["masked_weights"]).sum() == 0
    np.testing.assert_array_equal(np.asarray(masked["input_ids"]), source["input_ids"])


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"rate": 1.5}, {"mask_fraction": 0.9, "random_fraction": 0.2}])
def test_bad_masking_is_refused(bad):
    with pytest.raises(UserError, match="try|instance"):
        MaskingConfig(**bad)
