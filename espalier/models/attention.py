"""Attention: the backends there are, and which of them runs.

All take one description of who sees whom (`models.attention_spec`). A backend honours all of it or is never chosen.
"""

from __future__ import annotations

import jax

from espalier.errors import UserError
from espalier.models.attention_backend import Backend, Use
from espalier.models.attention_check import disagreement
from espalier.models.attention_cudnn import CUDNN
from espalier.models.attention_spec import AttentionSpec, Places
from espalier.models.attention_triton import TRITON
from espalier.models.attention_xla import PROBABILITIES, XLA, run_xla
from espalier.models.splash import SPLASH
from espalier.models.taps import Tap

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (SPLASH, CUDNN, TRITON, XLA)}
"""By name, the fastest first; the last one refuses nothing."""


def attend(
    spec: AttentionSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    places: Places,
    *,
    backend: Backend = XLA,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    tap: Tap | None = None,
    bias_BNTS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention [B, T, N, H] with N / K query heads to each key/value head (Ainslie et al. 2023).

    Dropout acts on the probabilities, and only with a key. Query head n uses key/value head n // (N / K). A query that
    sees nothing yields zero and passes zero gradient. bias_BNTS: added to the scores, float32, with one row for the
    whole batch too; for a backend that is `biased`.
    """
    assert bias_BNTS is None or backend.biased, f"{backend.name} attention would ignore the bias"
    if bias_BNTS is not None or tap is not None and tap.concern(PROBABILITIES):
        # Kernels never hold scores or probabilities.
        return run_xla(q_BTNH, k_BSKH, v_BSKH, spec, places, dropout_rate, dropout_key, tap, bias_BNTS)
    return backend.run(q_BTNH, k_BSKH, v_BSKH, spec, places, dropout_rate, dropout_key)


def choose_backend(requested: str, use: Use) -> tuple[Backend, str]:
    """(backend, reason) for `Execution.attention`; UserError where the one that was asked for refuses."""
    if requested != "auto":
        backend = BACKENDS[requested]
        if refusal := backend.refusal(use):
            raise UserError(f"execution.attention={requested}: {refusal}; try --execution.attention auto")
        return backend, "as asked"
    refusals = []
    for backend in kernels(use.platform):
        refusal = backend.refusal(use)
        if refusal is None and use.platform == "gpu" == jax.default_backend():
            refusal = disagreement(backend, use)
        if refusal is None:
            return backend, backend.reason
        refusals.append(refusal)
    return XLA, "; ".join(refusals) or XLA.reason


def kernels(platform: str) -> list[Backend]:
    """Backends that were made for a platform, the fastest first."""
    return [backend for backend in BACKENDS.values() if platform in backend.platforms]
