"""The tag of each word, and the spans that tags of entities make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from espalier.data.word_pieces import Sentence, Window, encode_words, sentence_of_text, sentence_of_words
from espalier.errors import UserError
from espalier.predict.outputs import softmax
from espalier.predict.tags import entities, scheme_of
from espalier.predict.use import Use

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel


def read(row: Mapping[str, Any]) -> Sentence:
    """A row with `tokens`, a list of words or a string with blanks between them; else with `text`."""
    tokens, text = row.get("tokens"), row.get("text")
    if isinstance(tokens, str):
        tokens = tokens.split()
    if tokens is None and isinstance(text, str):
        return sentence_of_text(_valid(text))
    if not isinstance(tokens, Sequence) or not all(isinstance(token, str) for token in tokens):
        given = ", ".join(f"{name} {str(value)[:40]!r}" for name, value in row.items() if value is not None)
        raise UserError(f"no words: a row has text, or a list of tokens, and this one {given or 'nothing'}")
    return sentence_of_words([_valid(token) for token in tokens])


def tag(model: LoadedModel, inputs: Sequence[Sentence]) -> list[dict[str, Any]]:
    """`tokens`, `tags` (one each) and `spans` of each; see LoadedModel.tag."""
    names = model.config.labels
    found = scores(model, inputs)
    return [answer(sentence, score_WC, names) for sentence, score_WC in zip(inputs, found, strict=True)]


def answer(sentence: Sentence, score_WC: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """The result of a sentence. score_WC: logits of its words."""
    probability_WC = softmax(score_WC)
    best_W = probability_WC.argmax(-1)
    tags = [names[int(best)] for best in best_W]
    result: dict[str, Any] = {"tokens": list(sentence.words), "tags": tags}
    if scheme_of([names]) is not None:
        result["spans"] = spans(sentence, tags, probability_WC.max(-1))
    return result


def spans(sentence: Sentence, tags: Sequence[str], probability_W: np.ndarray) -> list[dict[str, Any]]:
    """The entities of tags: `type`, `begin`, `end`, `text`, `score`."""
    found = []
    for kind, begin, end in entities(tags):
        place = {"begin": begin, "end": end}
        if sentence.text is not None:
            place = {"begin": sentence.spans[begin][0], "end": sentence.spans[end - 1][1]}
            text = sentence.text[place["begin"] : place["end"]]
        else:
            text = "".join(" " * sentence.blanks[at] + sentence.words[at] for at in range(begin, end)).strip()
        score = float(probability_W[begin:end].mean())
        found.append({"type": kind, **place, "text": text, "score": score})
    return found


def scores(model: LoadedModel, sentences: Sequence[Sentence]) -> list[np.ndarray]:
    """Logits of the words of each sentence, float32 [W, C]. Long ones are read in windows; see data.word_pieces."""
    stride = (model.saved.get("data") or {}).get("stride")
    windows = encode_words(model.tokenizer, sentences, model.longest, model.config.causal, stride)
    return of_windows(model, windows, [len(sentence.words) for sentence in sentences])


def of_windows(model: LoadedModel, windows: Sequence[Window], counts: Iterable[int]) -> list[np.ndarray]:
    """Logits of words, float32 [W, C], out of the windows that answer for them. counts: words of each sentence."""
    found = [np.zeros((count, len(model.config.labels)), np.float32) for count in counts]
    logits = model.outputs_of_head([window.example for window in windows])
    for window, logits_TC in zip(windows, logits, strict=True):
        found[window.sentence][window.words] = logits_TC[window.places]
    return found


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("half a surrogate pair (\\ud800 …) is no character; remove it") from error
    return text


TAG = Use(
    name="tag",
    takes="text, or tokens",
    reads=read,
    answers=tag,
    example={"text": "Ada Lovelace met Charles Babbage in London."},
)
