"""Multiple choice: maximise Σ log softmax of the right choice over the scores of all of its question.

A score is the log-likelihood of a choice behind the question, divided by nothing, its tokens or its bytes. Scores over
the vocabulary are formed for a chunk of tokens at a time (models.vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier import progress
from espalier.data.examples import Example, LabelledBatches
from espalier.data.loader import ALL, Batch, Part, shuffled
from espalier.data.tokenizer import special_ids
from espalier.errors import UserError
from espalier.models.config import Execution, ModelConfig
from espalier.models.heads import causal_lm_head
from espalier.models.transformer import apply, init_params
from espalier.models.vocabulary import token_logprobs
from espalier.predict.choose import Choice, causal_row, encode, room, scores_of, trained_normalize
from espalier.task import Evaluation
from espalier.training.step import Objective
from finetune.config import max_length
from finetune.task import Labelled
from finetune.tasks.choose.files import Questions, read_both, read_questions
from finetune.tasks.choose.metrics import measured
from sharding.mesh import host_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from espalier.models.published import Published
    from espalier.predict.loaded import LoadedModel
    from finetune.tasks.choose.record import ChooseConfig, ChooseData

TOKENS = ("input_ids", "segment_ids", "positions", "token_type_ids")


class MultipleChoice(Labelled):
    """The questions of two files."""

    def __init__(self, config: ChooseConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, mesh: Mesh):
        if not model.causal:
            raise UserError(
                "choose trains decoders, and this model is an encoder; it is measured without training by "
                "`./launch.sh evaluate … --task multiple_choice`"
            )
        longest = max_length(config.data, model)
        specials = special_ids(tokenizer, need=("bos",))
        assert specials.bos is not None
        train, self._validation = read_both(config.data)
        train_choices, self._choices = (encode(tokenizer, part.asked, longest) for part in (train, self._validation))
        self.model = model
        # What `evaluate` needs to know of a file that does not say it.
        self.settings = {"labels_from_one": True} if train.from_one and self._validation.from_one is None else {}
        self.fingerprints = {"train": train.fingerprint, "validation": self._validation.fingerprint}
        self._normalize = config.data.normalize
        self._rows = host_rows(config.batch_size, mesh)
        most = max(len(choices) for choices in (*train_choices, *self._choices))
        self._batches, held_out = (
            ChoiceBatches(
                *(choices, part.labels, config.batch_size, config.seed),
                most=most,
                normalize=config.data.normalize,
                bos=specials.bos,
                pad_id=specials.pad,
                max_length=longest,
            )
            for part, choices in ((train, train_choices), (self._validation, self._choices))
        )
        self.eval_batches: Sequence[dict] = held_out.fixed(self._rows)
        self.examples = len(self._batches)
        self.tokens_per_row = sum(len(one.ids) for choices in train_choices for one in choices) / self.examples
        cut = sum(one.cut for choices in (*train_choices, *self._choices) for one in choices)
        facts = [*train.facts, *self._validation.facts]
        if cut:
            facts.append(
                f"{cut:,} choices with their question are longer than {longest} tokens: the question lost its begin"
            )
        self.facts: Sequence[str] = tuple(dict.fromkeys(facts))
        self.about = _about(train, self._validation, config.data.normalize)
        self.objective = choice_objective(model, execution=config.execution)

    def init_params(self, key: jax.Array) -> dict:
        return init_params(self.model, key, heads=("causal_lm",))

    def batch(self, step: int) -> dict:
        return self._batches.batch(step, self._rows)

    def evaluate(self, model: LoadedModel) -> Evaluation:
        """accuracy, as predicted and by each kind of score, and that of chance; predictions.jsonl."""
        return measured(self._validation, scores_of(model, self._choices), self._normalize)

    def exported(
        self, tokenizer: PreTrainedTokenizerFast, published: Published | None
    ) -> tuple[PreTrainedTokenizerFast, Published | None]:
        """The tokenizer as it was: the model is a language model still."""
        return tokenizer, published


class ChoiceBatches:
    """Batches [B, C, T] of questions with all of their choices; a question lies on one device, whole.

    Arrays: those of LabelledBatches, [B, C, T], with `labels` int32 and `loss_weights` float32: of each place the token
    that follows, and 1 over what the score is divided by where that is one of the choice, else 0; `example_weights`
    float32 [B, C], 0 where a question has fewer; `right` int32 [B].
    """

    def __init__(
        self,
        choices: Sequence[Sequence[Choice]],
        right: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        most: int,
        normalize: str,
        bos: int,
        pad_id: int,
        max_length: int,
    ):
        """most: C."""
        self._batch_size, self._seed, self._most = batch_size, seed, most
        self._right = np.array(right, np.int32)
        begins = np.cumsum([0, *map(len, choices)])
        self._index_NC: np.ndarray = np.full((len(choices), most), -1)
        for number, own in enumerate(choices):
            self._index_NC[number, : len(own)] = begins[number] + np.arange(len(own))
        examples = [_example(one, bos, normalize) for own in choices for one in own]
        self._pairs = LabelledBatches(examples, batch_size * most, seed, pad_id=pad_id, max_length=max_length)

    def __len__(self) -> int:
        return len(self._right)

    def batch(self, step: int, part: Part = ALL) -> Batch:
        """Questions `part` of this step's global batch, in an order of its own in each epoch."""
        places = step * self._batch_size + np.arange(self._batch_size)
        return self._gather(shuffled(places, len(self), self._seed), part)

    def fixed(self, part: Part = ALL) -> list[Batch]:
        """All questions in the order of the file; empty ones fill up the last batch."""
        indices = np.append(np.arange(len(self)), np.full(-len(self) % self._batch_size, -1))
        return [self._gather(chosen, part) for chosen in indices.reshape(-1, self._batch_size)]

    def _gather(self, chosen_B: np.ndarray, part: Part) -> Batch:
        index_BC = np.where(chosen_B[:, None] >= 0, self._index_NC[chosen_B], -1)
        place_BC = np.arange(index_BC.size).reshape(index_BC.shape)[part]
        flat = self._pairs.rows(index_BC.reshape(-1), place_BC.reshape(-1))
        batch = {name: array.reshape(*place_BC.shape, *array.shape[1:]) for name, array in flat.items()}
        return batch | {"right": np.where(chosen_B >= 0, self._right[chosen_B], 0)[part].astype(np.int32)}


def choice_scores(model: ModelConfig, params, batch: dict, execution: Execution, key: jax.Array | None = None):
    """Scores, float32 [B, C], of a batch of ChoiceBatches; a key turns dropout on."""
    B, C, T = batch["input_ids"].shape
    rows = {name: batch[name].reshape(B * C, T) for name in TOKENS}
    x_BTD = apply(model, params, rows, execution=execution, key=key)
    features_BTD, table_VD, bias_V = causal_lm_head(model, params, x_BTD, execution)
    logprob_BT, _ = token_logprobs(
        *(features_BTD, table_VD, bias_V, batch["labels"].reshape(B * C, T)),
        vocab_size=model.vocab_size,
        softcap=model.final_logit_softcapping,
    )
    return jnp.sum(logprob_BT.reshape(B, C, T) * batch["loss_weights"], axis=2)


def choice_objective(model: ModelConfig, *, execution: Execution) -> Objective:
    """The two pure functions of the objective; metrics: loss (nats a question), accuracy."""

    def prepare(batch, key, step, train):
        return batch, jnp.maximum(jnp.sum(batch["example_weights"][:, 0]), 1.0)

    def loss(params, batch, key, norms, train):
        score_BC = choice_scores(model, params, batch, execution, key if train else None)
        weights_BC = batch["example_weights"]
        score_BC = jnp.where(weights_BC > 0, score_BC, jnp.float32(-1e30))
        weights_B = weights_BC[:, 0]
        logprob_BC = jax.nn.log_softmax(score_BC, axis=1)
        logprob_B = jnp.take_along_axis(logprob_BC, batch["right"][:, None], axis=1)[:, 0]
        correct_B = (jnp.argmax(score_BC, axis=1) == batch["right"]).astype(jnp.float32)
        loss_sum, weight = -jnp.sum(weights_B * logprob_B), jnp.sum(weights_B)
        metrics = {"loss": (loss_sum, weight), "accuracy": (jnp.sum(weights_B * correct_B), weight)}
        return loss_sum / norms, jax.lax.stop_gradient(metrics)

    return Objective(prepare, loss)


def measure(model: LoadedModel, data: ChooseData) -> Evaluation:
    """A language model on a file, trained for it or not."""
    questions = read_questions(data, "validation", bool(model.saved.get("labels_from_one")))
    normalize = data.normalize if data.normalize != "none" else trained_normalize(model)
    encoded = encode(model.tokenizer, questions.asked, room(model))
    if data.within_word and model.config.causal:
        raise UserError("data.within_word is of models that see both sides, and this one is a decoder; leave it out")
    with progress.waiting("scoring questions") as said:

        def told(done: int) -> None:
            said(f"{done:,} of {len(encoded):,} questions")

        scores = scores_of(model, encoded, told, within_word=data.within_word)
    return measured(questions, scores, normalize)


def _example(choice: Choice, bos: int, normalize: str) -> Example:
    row = causal_row(choice, bos)
    divisor = {"none": 1, "tokens": choice.own, "bytes": choice.bytes}[normalize]
    weights = np.zeros(len(row.ids), np.float32)
    weights[-choice.own :] = 1 / divisor
    return row._replace(of_row={}, of_tokens={"labels": choice.ids, "loss_weights": weights})


def _about(train: Questions, validation: Questions, normalize: str) -> dict[str, Any]:
    counts = [len(asked.choices) for asked in train.asked]
    several = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    return {
        "training": f"{train.path}: {len(counts):,} questions with {several} choices",
        "validation": f"{validation.path}: {len(validation.asked):,} questions",
        "choices": "scored by log-likelihood" + ("" if normalize == "none" else f", divided by {normalize}"),
    }
