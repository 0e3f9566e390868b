"""Features of a text, by a run that trained an autoencoder."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from espalier.data.token_tables import token_texts
from espalier.errors import UserError
from espalier.features import autoencoder as sparse
from espalier.features.objective import NAME, takes_part
from espalier.loading import load
from espalier.models.logits import batch_of_tokens
from espalier.models.taps import Taps
from espalier.models.transformer import apply


class InText(NamedTuple):
    """What fires in a text of T tokens."""

    tokens: list[str]
    f_TF: np.ndarray
    """How strongly; 0 at the first token, which takes no part in the training either."""


def features_of(run: str, text: str) -> InText:
    """UserError where the run has no autoencoder, or the text is too long for its model."""
    model = load(run)
    if NAME not in model.params:
        raise UserError(f"{run} has no autoencoder; train one by ./launch.sh features")
    batch = batch_of_tokens(model.tokenizer([text], return_tensors="np", truncation=False))
    length, most = batch["input_ids"].shape[1], model.config.max_length
    if length < 2 or most is not None and length > most:
        raise UserError(f"the text has {length} tokens; accepted are 2 to {most or 'any number'}")
    taps = Taps(read=("stream",))
    _, seen = apply(model.config, model.params, batch, execution=model.execution, taps=taps)
    f_BTF = sparse.features(model.params[NAME], seen["stream"][model.saved["autoencoder"]["layer"]])
    f_BTF = jnp.where(takes_part(batch)[..., None], f_BTF, 0.0)
    texts = token_texts(model.tokenizer)
    return InText([texts[token] for token in np.asarray(batch["input_ids"][0])], np.asarray(f_BTF[0]))
