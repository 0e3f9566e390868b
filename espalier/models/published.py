"""What the files of a published model hold beyond its architecture; a run keeps it, so that an export has it too.

End tokens, how to sample, the type of the weights, and all settings in config.json that nothing here changes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.files import sha256_of_text
from espalier.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Special tokens in config.json and generation_config.json; the last may be a list."""
OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")
"""Other settings of generation_config.json that name tokens by their ids; so do all that end in _token_id or _ids."""


@dataclass(frozen=True)
class Published:
    """The files of a model in Hugging Face format, as JSON values."""

    config: dict[str, Any]
    """config.json."""
    generation_config: dict[str, Any] | None
    """generation_config.json; None where there is none."""
    dtype: str
    """float32, bfloat16 or float16: the type of the weights; of several types float32, which holds them all."""
    vocabulary: str | None
    """Fingerprint of the vocabulary that the ids of special tokens are meant for; None without a tokenizer."""

    @classmethod
    def beside(cls, saved: Mapping[str, Any]) -> Published | None:
        """What a run's configuration holds of it; None for a run that began without."""
        return cls(**saved["published"]) if saved.get("published") else None

    def describes(self, config: ModelConfig) -> bool:
        """Whether config.json is about models of this kind."""
        return self.config.get("model_type") == config.model_type

    def fits(self, tokenizer: PreTrainedTokenizerFast | None) -> bool:
        """Whether the ids of special tokens mean what they did."""
        return tokenizer is None or self.vocabulary in (None, vocabulary_fingerprint(tokenizer))

    def padded_by(self, tokenizer: PreTrainedTokenizerFast) -> Published:
        """With the padding token of a classifier's tokenizer, by which transformers finds where a text ends."""
        return dataclasses.replace(self, config=self.config | {"pad_token_id": tokenizer.pad_token_id})

    def ended_by(self, index: int | None) -> Published:
        """With another token at which a text ends: that of a chat template."""
        if index is None or index in self.end_ids:
            return self
        values = (self.generation_config or {}) | {"eos_token_id": [*self.end_ids, index]}
        return dataclasses.replace(self, generation_config=values)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which a text ends, as generation_config.json says, else config.json."""
        for values in (self.generation_config or {}, self.config):
            found = values.get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        return ()


def published_beside(saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a run hands on of the `published` of the model that it starts from, as part of its own configuration."""
    return {"published": saved["published"]} if saved and saved.get("published") else {}


def token_ids(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, int | None]:
    """The ids under TOKENS that a tokenizer names; None for what it has not."""
    return {name: getattr(tokenizer, name, None) for name in TOKENS}


def generation_values(published: Published | None, tokenizer: PreTrainedTokenizerFast | None) -> dict | None:
    """generation_config.json of an exported language model; None where its source had none.

    With the vocabulary of the source it is that of the source; with another one, ways of sampling stay and what names
    tokens is that of the tokenizer.
    """
    named = {name: index for name, index in token_ids(tokenizer).items() if index is not None}
    if published is None:
        from transformers import GenerationConfig

        return json.loads(GenerationConfig(**named).to_json_string())
    if published.generation_config is None or published.fits(tokenizer):
        return copy.deepcopy(published.generation_config)
    return {
        name: value
        for name, value in published.generation_config.items()
        if name not in OF_TOKENS and not name.endswith(("_token_id", "_ids"))
    } | named


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over the tokens and their ids."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    return sha256_of_text(json.dumps(vocabulary, sort_keys=True))
