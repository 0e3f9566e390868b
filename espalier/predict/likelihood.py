"""How probable a text is to a language model: of every token, given those before it or all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from espalier.data.examples import Example
from espalier.data.token_tables import CONTINUABLE, CONTINUES, word_table
from espalier.data.tokenizer import special_ids
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head, hidden_token_head, masked_lm_head
from espalier.models.transformer import apply
from espalier.models.vocabulary import token_logprobs
from espalier.predict.outputs import outputs

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel


class Scored(NamedTuple):
    """The tokens of a text, each as likely as the model thinks."""

    logprobs: np.ndarray
    """float32 [tokens], in nats."""
    correct: np.ndarray
    """float32 [tokens]: 1.0 where it is the most probable one."""


Said = Callable[[int], None]
"""Is told how many rows are done."""


def causal_scores(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    length: int,
    stride: int | None = None,
    said: Said = lambda done: None,
) -> list[Scored]:
    """log p of each token of a text given those before it; the first one follows the beginning-of-text token.

    texts: token ids, without special tokens. Texts of more than `length` tokens are read in windows of that length,
    each `stride` tokens further (unset = length): a token is scored in the first window that reaches it, so that all
    but those of the first have at least length - stride tokens before them.
    """
    specials = special_ids(model.tokenizer, need=("bos",))
    stride = stride or length
    assert 1 <= stride <= length
    windows: list[Example] = []
    of_text: list[tuple[int, int]] = []
    for number, ids in enumerate(texts):
        inputs = [specials.bos, *ids[:-1]] if len(ids) else []
        begin, scored = 0, 0
        while scored < len(ids):
            end = min(begin + length, len(ids))
            row = inputs[begin:end]
            windows.append(Example(row, [0] * len(row), of_row={"following": int(ids[end - 1])}))
            of_text.append((number, scored - begin))
            begin, scored = begin + stride, end
    found = outputs(
        following,
        (model.config, model.execution),
        model.params,
        windows,
        pad_id=specials.pad,
        longest=model.config.max_length,
        of_row=("following",),
        said=said,
    )
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in texts]
    for window, (number, known), (logprob_T, correct_T) in zip(windows, of_text, found, strict=True):
        kept = slice(known, len(window.ids))
        parts[number].append((logprob_T[kept], correct_T[kept]))
    return [_joined(part) for part in parts]


def pseudo_scores(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    length: int,
    said: Said = lambda done: None,
    *,
    within_word: bool = False,
) -> list[Scored]:
    """log p of each token of a text given all others: each is masked once (Salazar et al. 2020, eq. 1).

    texts: token ids, without special tokens. A text stands between special tokens (`framing`), which are not scored; a
    longer one than `length` tokens, these included, is cut into pieces as equal as can be. A text of n tokens is n
    rows. within_word: as in `hiding`.
    """
    room = length - sum(map(len, framing(model)))
    pieces = [np.array_split(np.array(ids, np.int64), max(1, -(-len(ids) // room))) for ids in texts]
    split = [[(piece.tolist(), len(piece)) for piece in own] for own in pieces]
    found = hidden_scores(model, [piece for own in split for piece in own], said, within_word=within_word)
    ends = np.cumsum([len(ids) for ids in texts])
    return [_joined(found[end - len(ids) : end]) for ids, end in zip(texts, ends, strict=True)]


def framing(model: LoadedModel) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text in which tokens are hidden: [CLS] and [SEP]; where states predict
    the tokens behind them, as in decoders, that of the beginning of text alone."""
    if model.head == "causal_lm":
        return [_known(special_ids(model.tokenizer, need=("bos",)).bos)], []
    specials = special_ids(model.tokenizer, need=("cls", "sep"))
    return [_known(specials.cls)], [_known(specials.sep)]


def hiding(model: LoadedModel, texts: Sequence[tuple[Sequence[int], int]], *, within_word: bool) -> list[Example]:
    """A row for each token that is scored, in their order, in which it is masked.

    texts: (token ids without special tokens, how many at the end of them are scored). within_word: the later tokens of
    its word are masked with it (Kauf & Ivanova 2023, "PLL-word-l2r"): else they give away the beginning of a rare word.
    """
    mask = _known(special_ids(model.tokenizer, need=("mask",)).mask)
    before, behind = framing(model)
    words_V = word_table(model.tokenizer) if within_word else None
    rows = []
    for ids, own in texts:
        framed = [*before, *ids, *behind]
        last = len(before) + len(ids) - 1
        goes_on = np.zeros(len(framed) + 1, bool)
        if words_V is not None:
            bits = words_V[np.array(ids, np.int64)]
            goes_on[len(before) + 1 : last + 1] = (bits[1:] & CONTINUES > 0) & (bits[:-1] & CONTINUABLE > 0)
        for at in range(last + 1 - own, last + 1):
            end = at + 1
            while goes_on[end]:
                end += 1
            masked = [*framed[:at], *[mask] * (end - at), *framed[end:]]
            rows.append(Example(masked, [0] * len(framed), of_row={"at": at, "label": framed[at]}))
    return rows


def hidden_scores(
    model: LoadedModel,
    texts: Sequence[tuple[Sequence[int], int]],
    said: Said = lambda done: None,
    *,
    within_word: bool = False,
) -> list[tuple[Any, Any]]:
    """(log p, whether it is the most probable one) of each token of `hiding`."""
    return outputs(
        hidden,
        (model.config, model.head, model.execution),
        model.params,
        hiding(model, texts, within_word=within_word),
        pad_id=special_ids(model.tokenizer).pad,
        longest=model.config.max_length,
        of_row=("at", "label"),
        said=said,
    )


def bound_scores(
    model: LoadedModel,
    texts: Sequence[Sequence[int]],
    length: int,
    draws: int,
    said: Said = lambda done: None,
    seed: int = 0,
) -> list[Scored]:
    """A lower bound of log p of a text by masked diffusion (mlm/diffusion/loss.py), spread over its tokens.

    texts, length: as in `pseudo_scores`; each piece by itself, given how long it is. draws: R, rows for each piece of n
    tokens; row r hides k of them, k uniform in (nr/R, n(r + 1)/R], and counts n/k times. The seed fixes the draws.
    """
    specials = special_ids(model.tokenizer, need=("cls", "sep", "mask"))
    rng = np.random.default_rng(seed)
    rows: list[Example] = []
    counts: list[list[int]] = []
    for ids in texts:
        counts.append([])
        for piece in np.array_split(np.array(ids, np.int64), max(1, -(-len(ids) // (length - 2)))):
            counts[-1].append(len(piece))
            for draw in range(draws if len(piece) else 0):
                hidden_count = max(1, int(np.ceil((draw + 1 - rng.random()) / draws * len(piece))))
                at = rng.permutation(len(piece))[:hidden_count]
                labels = np.full(length, -1, np.int32)
                labels[at + 1] = piece[at]
                framed = np.array([specials.cls, *piece, specials.sep])
                framed[at + 1] = specials.mask
                rows.append(Example(framed.tolist(), [0] * len(framed), of_row={"labels": labels}))
    found = outputs(
        of_hidden,
        (model.config, model.execution),
        model.params,
        rows,
        pad_id=specials.pad,
        longest=model.config.max_length,
        of_row=("labels",),
        said=said,
    )
    scored, begin = [], 0
    for pieces in counts:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for size in filter(None, pieces):
            # The mean of Σ/k is that of a token: Σ n/k over n.
            means = np.mean(found[begin : begin + draws], axis=0)
            parts.append(tuple(np.full(size, mean, np.float32) for mean in means))  # type: ignore[arg-type]
            begin += draws
        scored.append(_joined(parts))
    return scored


def of_hidden(config: ModelConfig, execution: Execution, params: Any, batch: Mapping[str, Any]) -> Any:
    """(mean log p, share that is the best), [B], of the places whose `labels` [B, …] are not -1."""
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    labels_BT = batch["labels"][:, : batch["input_ids"].shape[1]]
    labels_BT = jnp.pad(labels_BT, ((0, 0), (0, batch["input_ids"].shape[1] - labels_BT.shape[1])), constant_values=-1)
    x_BTD = apply(config, params, inputs, execution=execution)
    head = masked_lm_head(config, params, x_BTD, execution)
    found = _logprobs(config, *head, jnp.maximum(labels_BT, 0))
    weights_BT = (labels_BT >= 0).astype(jnp.float32)
    count_B = jnp.maximum(weights_BT.sum(1), 1.0)
    return jax.tree.map(lambda array_BT: (array_BT * weights_BT).sum(1) / count_B, found)


def following(config: ModelConfig, execution: Execution, params: Any, batch: Mapping[str, Any]) -> Any:
    """(log p, whether it is the best), [B, T], of the token after each; after the last of a row, `following` [B]."""
    ids_BT, segments_BT = batch["input_ids"], batch["segment_ids"]
    last_B = segments_BT.sum(1) - 1
    labels_BT = jnp.where(
        jnp.arange(ids_BT.shape[1], dtype=jnp.int32)[None] == last_B[:, None],
        batch["following"][:, None],
        jnp.roll(ids_BT, -1, axis=1),
    )
    inputs = {name: array for name, array in batch.items() if name != "following"}
    x_BTD = apply(config, params, inputs, execution=execution)
    features_BTD, table_VD, bias_V = causal_lm_head(config, params, x_BTD, execution)
    return _logprobs(config, features_BTD, table_VD, bias_V, labels_BT)


def hidden(config: ModelConfig, head: str, execution: Execution, params: Any, batch: Mapping[str, Any]) -> Any:
    """(log p, whether it is the best), [B], of `label` [B] at the position `at` [B] of each row."""
    inputs = {name: array for name, array in batch.items() if name not in ("at", "label")}
    x_BTD = apply(config, params, inputs, execution=execution)
    features_BME, table_VE, bias_V = hidden_token_head(config, head, params, x_BTD, batch["at"][:, None], execution)
    found = _logprobs(config, features_BME, table_VE, bias_V, batch["label"][:, None])
    return jax.tree.map(lambda array: array[:, 0], found)


def _logprobs(config: ModelConfig, features: Any, table: Any, bias: Any, labels: Any) -> Any:
    softcap = config.final_logit_softcapping
    return token_logprobs(features, table, bias, labels, vocab_size=config.vocab_size, softcap=softcap)


def _known(token: int | None) -> int:
    assert token is not None
    return token


def _joined(parts: Sequence[tuple[Any, Any]]) -> Scored:
    logprobs, correct = zip(*parts, strict=True) if parts else ((), ())
    return Scored(
        *(
            np.concatenate([np.atleast_1d(one) for one in (*each, np.zeros(0, np.float32))])
            for each in (logprobs, correct)
        )
    )
