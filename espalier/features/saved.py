"""Autoencoders as files: cfg.json and sae_weights.safetensors, as SAELens reads a JumpReLU autoencoder from disk.

The scale is folded in, so that they read the stream as the model has it:

    z = (x − b_dec) W_enc + b_enc        f = z where z > threshold        x̂ = f W_dec + b_dec

W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], threshold [F], float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from espalier.errors import UserError
from espalier.files import make_folder, read_json, write_json
from espalier.models.tensor_files import open_file

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def folded(autoencoder: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the file, of an autoencoder's parameters.

    x̂ = s (f W + b) with f = ReLU((x / s − b) E + e) is x̂ = (s f) W + s b with s f = ReLU((x − s b) E + s e).
    """
    scale = np.float32(autoencoder["statistics"]["scale"])
    directions_FD = np.asarray(autoencoder["decoder"]["kernel"], np.float32)
    arrays = {
        "W_enc": np.asarray(autoencoder["encoder"]["kernel"], np.float32),
        "b_enc": scale * np.asarray(autoencoder["encoder"]["bias"], np.float32),
        "W_dec": directions_FD / np.linalg.norm(directions_FD, axis=1, keepdims=True),
        "b_dec": scale * np.asarray(autoencoder["decoder"]["bias"], np.float32),
        "threshold": np.full(len(directions_FD), scale * np.float32(autoencoder["statistics"]["threshold"])),
    }
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def write_autoencoder(folder: Path, autoencoder: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Write both files. said: model_name, layer and context_size."""
    arrays = folded(autoencoder)
    width, count = arrays["W_enc"].shape
    make_folder(folder)
    save_file(arrays, folder / WEIGHTS)
    layer = said["layer"]
    config = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": count,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": said["model_name"],
            "hook_name": f"blocks.{layer}.hook_resid_pre",
            "context_size": said["context_size"],
        },
    }
    write_json(folder / CONFIG, config)


def read_autoencoder(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of an autoencoder, by their names in the file; UserError where there is none."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; train one: ./launch.sh features encoder|decoder --init-from RUN …")
    kind = read_json(folder / CONFIG)
    if kind.get("architecture") != "jumprelu" or kind.get("normalize_activations") != "none":
        raise UserError(f"{folder}: accepted are jumprelu autoencoders without normalisation of their own")
    arrays = open_file(folder / WEIGHTS)
    if missing := sorted({"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} - arrays.keys()):
        raise UserError(f"{folder / WEIGHTS} has no {' and no '.join(missing)}; copy it again")
    return {name: np.array(array) for name, array in arrays.items()}


def parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of a file as parameters of features.autoencoder."""
    threshold = arrays["threshold"]
    known = {"scale": np.float32(1), "threshold": threshold, "mean": arrays["b_dec"], "idle": np.zeros_like(threshold)}
    return {
        "encoder": {"kernel": arrays["W_enc"], "bias": arrays["b_enc"]},
        "decoder": {"kernel": arrays["W_dec"], "bias": arrays["b_dec"]},
        "statistics": known,
    }
