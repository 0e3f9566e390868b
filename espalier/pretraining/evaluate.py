"""A language model measured on text, without training: perplexity, bits per byte; pseudo-perplexity of an encoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from espalier import progress
from espalier.data.config import DataConfig
from espalier.data.documents import Document, Reject
from espalier.data.encode import encode
from espalier.data.sources import Source, open_source
from espalier.errors import UserError
from espalier.intervals import ratio_interval
from espalier.predict.likelihood import Scored, bound_scores, causal_scores, pseudo_scores
from espalier.task import Evaluation

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel
    from espalier.pretraining.config import TextFiles

LONGEST_CAUSAL = 1024
"""Tokens of a window at most, where nothing else is said; of encoders LoadedModel.longest."""
CHUNK_TOKENS = {True: 2**18, False: 2**11}
"""Tokens that are scored before the next ones are read, causal or not: there, each is a row."""
LISTED = 5


def measure_text(model: LoadedModel, data: TextFiles, draws: int | None = None) -> Evaluation:
    """`loss` (nats a token), `perplexity` = exp(loss) or `pseudo_perplexity`, `accuracy`, of a causal model
    `bits_per_byte`; with 95 % intervals over texts (or windows of one text).

    draws: of a model of masked diffusion, for an upper bound of what a causal model has (predict.likelihood
    .bound_scores): `perplexity_bound`, `bits_per_byte_bound`.
    """
    if not data.validation:
        raise UserError("no --data.validation FILE given: name text (.txt, .md, .jsonl, .csv, .parquet)")
    causal = model.config.causal
    length = window(model, data)
    source = open_source(data.validation, DataConfig(text_field=data.text_field, encoding=data.encoding))
    rejects: list[Reject] = []
    loss_parts, weight_parts = [], []
    nats = right = 0.0
    tokens = texts = size = 0
    with progress.waiting("scoring tokens") as said:
        whole = source.size()
        for chunk in _chunks(model, source, data, rejects, CHUNK_TOKENS[causal]):
            ids = [one for one, _ in chunk]

            def told(rows: int, so_far: int = tokens) -> None:
                # Of an encoder each token is a row.
                said(f"{so_far + (0 if causal else rows):,} tokens")

            scores = (
                causal_scores(model, ids, length, data.stride, told)
                if causal
                else bound_scores(model, ids, length, draws, told)
                if draws
                else pseudo_scores(model, ids, length, told)
            )
            for (_, bytes_of_it), scored in zip(chunk, scores, strict=True):
                for part in _parts(scored, length):
                    loss_parts.append(-float(part.sum(dtype=np.float64)))
                    weight_parts.append(len(part))
                right += float(scored.correct.sum())
                size += bytes_of_it
            texts += len(chunk)
            tokens, nats = sum(weight_parts), sum(loss_parts)
            share = (
                f", {min(1.0, size / whole):.0%} of the text".replace("%", " %") if whole and not data.tokens else ""
            )
            said(f"{tokens:,} tokens{share}")
    if not tokens:
        raise UserError(f"{', '.join(data.validation)}: there is no text that becomes tokens{_why(rejects)}")
    loss = nats / tokens
    low, high = ratio_interval(np.array(loss_parts), np.array(weight_parts))
    bound = "_bound" if draws else ""
    name = f"perplexity{bound}" if causal or draws else "pseudo_perplexity"
    metrics = {
        "loss": loss,
        "loss_interval": [low, high],
        name: math.exp(min(loss, 700.0)),
        f"{name}_interval": [math.exp(min(low, 700.0)), math.exp(min(high, 700.0))],
        "accuracy": right / tokens,
    }
    if causal or draws:
        scale, bits = tokens / size / math.log(2), f"bits_per_byte{bound}"
        metrics |= {bits: loss * scale, f"{bits}_interval": [low * scale, high * scale]}
    metrics |= {"tokens": tokens, "texts": texts, "bytes": size, "window": length}
    warnings = [f"{reject.name}: {reject.message}" for reject in rejects[:LISTED]]
    if len(rejects) > LISTED:
        warnings.append(f"… {len(rejects) - LISTED:,} more records were left out")
    return Evaluation(metrics, warnings=warnings)


def first_tokens(model: LoadedModel, data: TextFiles, most: int) -> np.ndarray:
    """The first tokens of the text, document after document, without special tokens: int32, at most so many."""
    if not data.validation:
        raise UserError("no --data.validation FILE given: name text (.txt, .md, .jsonl, .csv, .parquet)")
    source = open_source(data.validation, DataConfig(text_field=data.text_field, encoding=data.encoding))
    rejects: list[Reject] = []
    found: list[int] = []
    for chunk in _chunks(model, source, data, rejects, most):
        for ids, _ in chunk:
            found += ids
        if len(found) >= most:
            break
    if not found:
        raise UserError(f"{', '.join(data.validation)}: there is no text that becomes tokens{_why(rejects)}")
    return np.array(found[:most], np.int32)


def window(model: LoadedModel, data: TextFiles) -> int:
    """Tokens that are read together. UserError for more than the model has positions for."""
    most = model.config.max_length
    if data.length is None:
        default = LONGEST_CAUSAL if model.config.causal else model.longest
        length = min(most or model.config.max_position_embeddings, default)
    else:
        length = data.length
        if most is not None and length > most:
            raise UserError(f"data.length={length} exceeds the model's {most} learned positions; try {most}")
    if data.stride is not None and not model.config.causal:
        raise UserError("data.stride is of causal models: an encoder reads a text in pieces; leave it out")
    if data.stride is not None and not 1 <= data.stride <= length:
        raise UserError(f"data.stride={data.stride} must lie between 1 and the {length} tokens of a window")
    return length


def _chunks(
    model: LoadedModel, source: Source, data: TextFiles, rejects: list[Reject], most: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Texts as (ids, bytes), of about so many tokens at a time, until data.tokens are reached."""
    items = _lines(source) if data.lines else source
    chunk: list[tuple[list[int], int]] = []
    held, left = 0, data.tokens if data.tokens is not None else math.inf
    for item in itertools.chain.from_iterable(encode(items, model.tokenizer)):
        if isinstance(item, Reject):
            if item.dropped:
                rejects.append(item)
            continue
        ids = item.ids[: int(min(left, len(item.ids)))].tolist()
        # Of a text that is cut, as many bytes as tokens.
        chunk.append((ids, round(item.size * len(ids) / max(1, len(item.ids)))))
        held, left = held + len(ids), left - len(ids)
        if held >= most or left <= 0:
            yield chunk
            chunk, held = [], 0
        if left <= 0:
            return
    if chunk:
        yield chunk


def _lines(source: Source) -> Iterator[Document | Reject]:
    """Every line that is not blank as a text of its own."""
    for item in source:
        if isinstance(item, Reject):
            yield item
            continue
        for line in item.text.splitlines():
            if line.strip():
                yield Document(line, item.name)


def _parts(scored: Scored, length: int) -> Iterator[np.ndarray]:
    """What is resampled: a text, or of a longer one its windows."""
    for begin in range(0, len(scored.logprobs), length):
        yield scored.logprobs[begin : begin + length]


def _why(rejects: list[Reject]) -> str:
    return f" ({rejects[0].name}: {rejects[0].message})" if rejects else ""
