"""What each layer knows of tagged words: linear probes, with control tasks that say what a probe learns by itself
(Hewitt and Liang 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.tokenizer import special_ids
from espalier.data.word_pieces import Sentence, encode_words
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.taps import Taps
from espalier.models.transformer import apply
from espalier.predict.loaded import LoadedModel
from espalier.predict.outputs import outputs

INVERSE_PENALTY = 1.0
"""C of scikit-learn's logistic regression, on standardised states."""
ITERATIONS = 60


class Probes(NamedTuple):
    """Of a model of L layers, E = L + 1: the embeddings, and the stream behind each layer."""

    accuracy_E: np.ndarray
    """Of a linear probe, on the words of the second file."""
    control_E: np.ndarray
    """Of the same probe where every word type has a tag of its own, drawn at random."""
    majority: float
    """Of always the most frequent tag."""
    by_word: float
    """Of the tag that a word type has most often in the first file, the most frequent one for new words."""
    words: tuple[int, int]
    """How many words were learnt from, and how many measured."""

    @property
    def selectivity_E(self) -> np.ndarray:
        """How much better the probe is than on its control task."""
        return self.accuracy_E - self.control_E


Tagged = tuple[Sequence[Sentence], Sequence[Sequence[str]]]
"""Sentences, and the tags of their words."""


def probes(
    model: LoadedModel, train: Tagged, held_out: Tagged, seed: int = 0, said: Callable[[str], None] = lambda words: None
) -> Probes:
    """Probes of every layer, on the state of each word's first token.

    The control task: each word type of both files has one tag, drawn from the tags of the first file's words.
    """
    said("reading the states")
    train_EWD, held_EWD = (states(model, sentences) for sentences, _ in (train, held_out))
    train_tags, held_tags = (np.array([tag for tags in part[1] for tag in tags]) for part in (train, held_out))
    train_words, held_words = ([word for sentence in part[0] for word in sentence.words] for part in (train, held_out))
    if len(set(train_tags.tolist())) < 2:
        raise UserError("every word has the same tag; a probe needs two or more")
    random = np.random.default_rng(seed)
    types = sorted({*train_words, *held_words})
    drawn = dict(zip(types, random.choice(train_tags, len(types)), strict=True))
    control_train, control_held = (np.array([drawn[word] for word in words]) for words in (train_words, held_words))
    found = []
    for layer, (train_WD, held_WD) in enumerate(zip(train_EWD, held_EWD, strict=True)):
        said(f"probing layer {layer} of {len(train_EWD) - 1}")
        middle, spread = train_WD.mean(0), train_WD.std(0) + 1e-6
        pair = (train_WD - middle) / spread, (held_WD - middle) / spread
        found.append([_accuracy(*pair, train_tags, held_tags), _accuracy(*pair, control_train, control_held)])
    accuracy_E, control_E = np.array(found).T
    values, counts = np.unique(train_tags, return_counts=True)
    most = values[counts.argmax()]
    return Probes(
        accuracy_E,
        control_E,
        float((held_tags == most).mean()),
        _by_word(train_words, train_tags, held_words, held_tags, most),
        (len(train_words), len(held_words)),
    )


def states(model: LoadedModel, sentences: Sequence[Sentence]) -> np.ndarray:
    """The stream at the first token of every word, before and behind each layer, float32 [L + 1, words, D]."""
    stride = (model.saved.get("data") or {}).get("stride")
    windows = encode_words(model.tokenizer, sentences, model.longest, model.config.causal, stride)
    found: list[list[Any]] = [[None] * len(sentence.words) for sentence in sentences]
    examples = [window.example for window in windows]
    read = outputs(
        streams,
        (model.config, model.execution),
        model.params,
        examples,
        pad_id=special_ids(model.tokenizer).pad,
        longest=model.config.max_length,
    )
    for window, stream_TED in zip(windows, read, strict=True):
        for word, place in zip(window.words, window.places, strict=True):
            # Behind the first token of a word, a decoder has not read the rest of it.
            found[window.sentence][word] = stream_TED[place]
    return np.stack([one for words in found for one in words], axis=1).astype(np.float32)


def streams(config: ModelConfig, execution: Execution, params: Any, batch: dict) -> Any:
    """[B, T, L + 1, D]"""
    x_BTD, seen = apply(config, params, batch, execution=execution, taps=Taps(read=("stream",)))
    return jnp.moveaxis(jnp.concatenate([seen["stream"], x_BTD[None]]), 0, 2)


def fitted(states_WD: np.ndarray, tags_W: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(kernel [D, C], bias [C]) that minimise Σ −log p(tag) + ‖kernel‖² / (2 INVERSE_PENALTY), as scikit-learn's
    LogisticRegression does, by L-BFGS. tags_W: numbers from 0 to C − 1."""
    classes = int(tags_W.max()) + 1
    kernel_DC = jnp.zeros((states_WD.shape[1], classes), jnp.float32)
    return _minimised((kernel_DC, jnp.zeros(classes, jnp.float32)), jnp.asarray(states_WD), jnp.asarray(tags_W))


@jax.jit
def _minimised(weights: Any, x_WD: jax.Array, tags_W: jax.Array) -> Any:
    import optax

    def loss(weights: Any) -> jax.Array:
        kernel_DC, bias_C = weights
        logprobs_WC = jax.nn.log_softmax(x_WD @ kernel_DC + bias_C[None])
        nats_W = -jnp.take_along_axis(logprobs_WC, tags_W[:, None], axis=1)[:, 0]
        return nats_W.mean() + (kernel_DC**2).sum() / (2 * INVERSE_PENALTY * len(x_WD))

    solver = optax.lbfgs()
    with jax.numpy_dtype_promotion("standard"):
        # The gradient at the new weights is known from the line search.
        slope = optax.value_and_grad_from_state(loss)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            weights, state = carry
            value, grads = slope(weights, state=state)
            updates, state = solver.update(grads, state, weights, value=value, grad=grads, value_fn=loss)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, solver.init(weights)), length=ITERATIONS)[0][0]


def _accuracy(train_WD: np.ndarray, held_WD: np.ndarray, train_tags: np.ndarray, held_tags: np.ndarray) -> float:
    names, tags_W = np.unique(train_tags, return_inverse=True)
    kernel_DC, bias_C = fitted(train_WD, tags_W.astype(np.int32))
    said = names[(held_WD @ np.asarray(kernel_DC) + np.asarray(bias_C)).argmax(-1)]
    return float((said == held_tags).mean())


def _by_word(train_words, train_tags, held_words, held_tags, most) -> float:
    counts: dict[str, dict[str, int]] = {}
    for word, tag in zip(train_words, train_tags.tolist(), strict=True):
        of_word = counts.setdefault(word, {})
        of_word[tag] = of_word.get(tag, 0) + 1
    guesses = [
        max(counts[word], key=lambda tag, w=word: counts[w][tag]) if word in counts else most for word in held_words
    ]
    return float((held_tags == np.array(guesses)).mean())
