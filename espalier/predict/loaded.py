"""A model with its weights and tokenizer, and what can be asked of it. `espalier.load` gives one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from espalier.data.examples import Example
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.description import architecture
from espalier.models.logits import batch_of_tokens, head_logits
from espalier.predict.outputs import outputs, row_length
from sharding.mesh import MeshConfig, build_mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.predict.generate import Prompt

FLOAT32 = Execution(dtype="float32")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its weights and tokenizer."""

    config: ModelConfig
    """The architecture."""
    params: dict
    """Parameters as a nested dictionary, float32."""
    tokenizer: PreTrainedTokenizerFast
    """Puts the special tokens around a text as the model expects them."""
    head: str
    """What stands on the stack: a name in espalier.models.heads.HEADS."""
    saved: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the run: its task and settings; of a model in Hugging Face format what concerns a use of it."""
    execution: Execution = FLOAT32
    """How predictions are computed."""

    def __repr__(self) -> str:
        """One line: its arrays would fill a screen, or a notebook's file."""
        return f"LoadedModel({architecture(self.config, self.head)})"

    @property
    def longest(self) -> int:
        """Tokens of an example at most: as in the fine-tuning or in the folder of sentence-transformers, else the usual
        number."""
        asked = self.saved.get("longest") or (self.saved.get("data") or {}).get("max_length")
        return asked or self.config.usual_length

    def bidirectional(self) -> LoadedModel:
        """The same weights, each token seeing all others, as `mlm hybrid` trains them too: hidden tokens are predicted
        by the states before them. UserError where the model is no decoder."""
        if self.head != "causal_lm" or not self.config.causal:
            kind = "sees both sides already" if not self.config.causal else f"has the head {self.head}"
            raise UserError(f"bidirectional is for decoders, and this model {kind}; leave it out")
        return replace(self, config=replace(self.config, causal=False))

    def classify(
        self, texts: str | Sequence[str] | Sequence[tuple[str, str]], *, threshold: float | None = None
    ) -> list[dict[str, Any]]:
        """`label`, `probability` and `probabilities` of each text, or pair of texts.

        Of a model that gives several labels a text: `labels` and `probabilities`, each of its own; of one that judges
        by a number: `score`. threshold: from which probability one of several labels is given; unset = that of the
        model, 0.5 where none was chosen. UserError where the model has no classifier.
        """
        from espalier.predict.classify import at_least

        results = self._answers("sequence_classification", _texts(texts))
        if threshold is None:
            return results
        if self.config.problem_type != "multi_label_classification":
            raise UserError("threshold: this model does not give several labels a text; leave it out")
        return [result | {"labels": at_least(threshold, result["probabilities"])} for result in results]

    def rationale(self, texts: str | Sequence[str] | Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """As `classify`, by few words alone, which are there too: `words`, each with `text`, `begin` and `end`.

        UserError where the model was not tuned for it (`finetune rationale`). `classify` reads the whole text.
        """
        return self._answers("rationale", _texts(texts))

    def concepts(
        self, texts: str | Sequence[str] | Sequence[tuple[str, str]], *, without: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """As `classify`, with the `concepts` that the class was read off: `concept`, `score`, and `part`, how much it
        speaks for the label; the greatest first.

        without: concepts that are switched off. UserError where the model was not tuned for it (`finetune concepts`).
        """
        from espalier.predict.concepts import Asked

        return self._answers("concepts", [Asked(text, tuple(without)) for text in _texts(texts)])

    def tag(self, texts: str | Sequence[str] | Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """`tokens`, `tags` (one each) and, where tags are of entities, `spans` of each text, or list of words.

        A span has `type`, `text`, `score` (the mean probability of its tags), and `begin` and `end`: characters of the
        text, or numbers of the words where these were given. A text is cut into words at blanks, between letters and
        other signs, and in scripts without blanks (Chinese) at each character. UserError where the model has no tagger.
        """
        from espalier.predict.tag import read

        rows = [texts] if isinstance(texts, str) else list(texts)
        given = [read({"text" if isinstance(row, str) else "tokens": row}) for row in rows]
        return self._answers("token_classification", given)

    def rank(self, query: str, texts: str | Sequence[str]) -> list[dict[str, Any]]:
        """The texts by their relevance to the query, the best first: `index` (from 0), `text` and `score` of each.

        A score is the model's logit: it may be any number, and says little between queries. UserError where the model
        is no classifier with one output (`finetune rank`, or a cross-encoder of sentence-transformers).
        """
        from espalier.predict.rank import Asked, rank

        return rank(self, [Asked(query, (texts,) if isinstance(texts, str) else tuple(texts))])[0]["ranking"]

    def score(self, texts: str | Sequence[str], prompt: str | Sequence[Mapping[str, str]] = "") -> list[float]:
        """How good each text is by a reward model, as an answer to the prompt (a text or messages) where there is one.

        A score may be any number, and only differences between answers to the same prompt say something: their sigmoid
        is how likely the one is to be preferred. The best of n answers is that of the greatest. UserError where the
        model is no classifier with one output (`finetune reward`).
        """
        from espalier.predict.score import rewards

        rows = [texts] if isinstance(texts, str) else list(texts)
        return rewards(self, [(prompt, text) for text in rows]).tolist()

    def choose(
        self, question: str, choices: Sequence[str], *, normalize: Literal["none", "tokens", "bytes"] | None = None
    ) -> dict[str, Any]:
        """Which choice a language model finds the most likely behind the question, trained for it or not.

        `label` (its number, from 0), `choice`, `probability` and `probabilities` (softmax over the scores),
        `log_likelihoods` (in nats). normalize: by what a log-likelihood is divided to be a score; unset = as in the
        training, else by nothing. An encoder's are pseudo-log-likelihoods. The question may be empty: then whole texts
        are compared. UserError where the model is no language model.
        """
        from espalier.predict.choose import choose, read

        return choose(self, [read({"question": question, "choices": list(choices)})], normalize)[0]

    def embed(self, texts: str | Sequence[str], *, size: int | None = None) -> np.ndarray:
        """An embedding of each text, float32 [N, D], of length 1: their products are cosines.

        Any model has them; one that was tuned for it (`finetune embed`) or comes in a folder of sentence-transformers
        is pooled as it says there, another one by the mean of its states (causal: by the last). Of length 1 they are
        always but where such a folder does not normalise. size: of so many first numbers (Matryoshka), again of
        length 1. A text that is too long is cut at its end.
        """
        from espalier.predict.embed import embed

        return embed(self, [texts] if isinstance(texts, str) else list(texts), size)

    def generate(
        self,
        prompts: str | Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        steps: int | None = None,
        order: Literal["confidence", "random"] = "confidence",
    ) -> list[str]:
        """What the model writes after each prompt, of whole characters.

        A prompt is a text; a list of messages (`role`, `content`), for the chat template; or a dictionary with the
        fields of the template by which the run was tuned. Of a run tuned on chats, a text is what the user says.
        temperature and so on: as in predict.sampling.SamplingConfig; unset, as the model's generation_config.json says.
        What is drawn for a prompt depends on its number and the seed alone. A model of masked diffusion, and with
        `steps` any masked LM, writes max_new_tokens by unmasking them: steps and order as in
        predict.sampling.UnmaskingConfig. UserError where the model is neither that nor a decoder, or has no positions
        for a prompt and its continuation.
        """
        from espalier.predict.generate import generate
        from espalier.predict.sampling import SamplingConfig, UnmaskingConfig
        from espalier.predict.unmask import unmask, writes

        unmasking = UnmaskingConfig(steps, order)
        if self.head not in ("causal_lm", "seq2seq_lm") and not writes(self, unmasking):
            raise UserError(f"this model has the head {self.head} and does not generate; a decoder does (causal_lm)")
        if self.head != "masked_lm" and unmasking != UnmaskingConfig():
            raise UserError("steps and order are of masked diffusion, and this is none; leave them out")
        if self.head == "causal_lm" and not self.config.causal:
            raise UserError("this model sees both sides and does not generate; it finds hidden tokens (fill)")
        chat = isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], Mapping)
        one = isinstance(prompts, str | Mapping) or chat and "role" in prompts[0]  # type: ignore[operator]
        given = [prompts] if one else list(prompts)
        drawn = SamplingConfig(
            *(max_new_tokens, temperature, top_k, top_p, repetition_penalty, beams, length_penalty, tuple(stop), seed)
        )
        if self.head == "masked_lm":
            return unmask(self, given, drawn, unmasking)  # type: ignore[arg-type]
        return generate(self, given, drawn)  # type: ignore[arg-type]

    def similarity(
        self, texts: str | Sequence[str], others: str | Sequence[str] | None = None, *, size: int | None = None
    ) -> np.ndarray:
        """Cosines between the embeddings of texts and others, float32 [N, M]; without others among the texts."""
        from espalier.predict.embed import unit

        rows_ND = unit(self.embed(texts, size=size))
        columns_MD = rows_ND if others is None else unit(self.embed(others, size=size))
        return rows_ND @ columns_MD.T

    def answer(self, question: str | Sequence[str], context: str | Sequence[str]) -> list[dict[str, Any]]:
        """`answer`, `score`, `begin`, `end` (characters of its context) and `n_best` of each question.

        context: of all questions, or of each its own. Of a model that may find none, `answer` is "" then, and
        `no_answer` says how sure that is. UserError where the model answers no questions.
        """
        questions = [question] if isinstance(question, str) else list(question)
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        if len(questions) != len(contexts):
            raise UserError(f"{len(questions)} questions and {len(contexts)} contexts; give one, or one for each")
        return self._answers("question_answering", list(zip(questions, contexts, strict=True)))

    def fill(self, texts: str | Sequence[str], top_k: int = 5) -> list[dict[str, Any]]:
        """What may stand at the masks of each text: `filled`, the text with the most probable token at each mask, and
        `masks`, for each in turn its top_k candidates with `token` (as text), `id` and `probability`.

        A mask is written [MASK] or as the tokenizer writes it. Several masks of a text are filled independently of each
        other. UserError where the model is no masked LM, and for a text without a mask or with too many tokens.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        return self._answers("masked_lm", [(text, top_k) for text in rows])

    def outputs_of_head(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Logits of the head on each example (models.logits.head_logits), computed in batches of fitting length."""
        return outputs(
            head_of,
            (self.config, self.head, self.execution),
            self.params,
            examples,
            pad_id=special_ids(self.tokenizer).pad,
            longest=self.config.max_length,
        )

    def _answers(self, head: str, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        from espalier.predict.use import find, use_of

        use = find(head)
        if self.head != head and use_of(self).name != use.name:
            raise UserError(f"this model has the head {self.head} and does not {use.name}; it can {use_of(self).name}")
        return use.answers(self, inputs)

    def logits(self, texts: str | Sequence[str] | Mapping[str, Any]) -> jax.Array:
        """Logits in float32, without dropout, equal to those of the class in transformers that loads the model.

        texts: one or more, or what a tokenizer returns for them (`input_ids`, `attention_mask`, …, [B, T], padded on
        either side). Returns [B, T, V] for a language model (T: tokens of the longest text; what stands at padding
        means nothing), [B, C] for a classifier of sequences, [B, T, C] for one of tokens.

        >>> model = load(run)
        >>> scores = model.logits(["To be, or not to be"])
        >>> scores.shape == (1, len(model.tokenizer("To be, or not to be").input_ids), model.config.vocab_size)
        True
        >>> tokens = model.tokenizer(["To be", "or not to be"], return_tensors="np", padding=True)
        >>> model.logits(tokens).shape[:2] == tokens["input_ids"].shape
        True
        """
        batch = batch_of_tokens(texts if isinstance(texts, Mapping) else self._tokens(texts))
        length = batch["input_ids"].shape[1]
        longest = self.config.max_length
        if longest is not None and length > longest:
            raise UserError(f"a text of {length} tokens is longer than the model's {longest} positions; shorten it")
        padding = ((0, 0), (0, row_length(length, longest) - length))
        scores = self._logits(self.params, {name: np.pad(array, padding) for name, array in batch.items()})
        return scores if self.head == "sequence_classification" else scores[:, :length]

    @functools.cached_property
    def _logits(self) -> Any:
        return jax.jit(functools.partial(head_logits, self.config, self.head))

    def _tokens(self, texts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Rows padded on the right, also by a tokenizer that has no padding token."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no texts given; give one or more")
        tokens = self.tokenizer(texts)
        longest = max(map(len, tokens["input_ids"]))
        if longest == 0:
            raise UserError("the texts have no tokens; give one that is not empty")
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {
            name: np.array([row + [0] * (longest - len(row)) for row in tokens[name]])
            for name in names
            if name in tokens
        }


def head_of(config: ModelConfig, head: str, execution: Execution, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    """head_logits, with what is settled for a model first."""
    return head_logits(config, head, params, batch, execution)


@contextlib.contextmanager
def on_all_devices(model: LoadedModel) -> Iterator[LoadedModel]:
    """For the block, its weights on every device: what is computed is split over them by rows."""
    if jax.device_count() == 1:
        yield model
        return
    mesh = build_mesh(MeshConfig())
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        yield replace(model, params=jax.device_put(model.params, whole))


def _texts(texts: str | Sequence[Any]) -> list[tuple[str, str | None]]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    return [(text, None) if isinstance(text, str) else (text[0], text[1]) for text in texts]
