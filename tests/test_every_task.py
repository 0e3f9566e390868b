"""What all fine-tunings share, tried with each: adapters, frozen layers, layer decay, the best checkpoint, a break."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from labelled_words import DECODER, ENCODER, TEXTS, write_jsonl
from tiny_models import strict_and_quick  # noqa: F401
from tiny_runs import write_run

import espalier
from espalier.commands import replay
from espalier.training.config import CheckpointConfig
from espalier.training.frozen import restore_complete
from finetune.config import FinetuneConfig, FinetuneOptimizer, LoraConfig
from finetune.presets import PRESETS
from finetune.tasks.reinforce.record import PolicyGradient
from finetune.train import main
from sharding.mesh import MeshConfig

KINDS = {"crow": "bird", "wren": "bird", "pear": "fruit", "plum": "fruit"}


def named(number: int) -> tuple[str, str]:
    """A word and its kind."""
    return list(KINDS.items())[number % len(KINDS)]


def tagged(number: int) -> dict[str, Any]:
    word, kind = named(number)
    return {"tokens": ["we", "saw", word], "tags": ["O", "O", f"B-{kind}"]}


def asked(number: int) -> dict[str, Any]:
    word, _ = named(number)
    return {"question": "what", "context": f"we saw the {word} here", "answers": {"text": [word], "answer_start": [11]}}


def chosen(number: int) -> dict[str, Any]:
    word, kind = named(number)
    return {"question": f"the {word} is", "choices": ["bird", "fruit"], "label": ["bird", "fruit"].index(kind)}


def preferred(number: int) -> dict[str, Any]:
    word, kind = named(number)
    return {"prompt": f"we saw {number}", "chosen": f"the {word} here", "rejected": f"a {kind}"}


ROWS = {
    "classify": lambda number: {"text": f"we saw the {named(number)[0]}", "label": named(number)[1]},
    "tag": tagged,
    "answer": asked,
    "rank": lambda number: {
        "query": named(number)[1],
        "text": f"{named(number // 2)[0]} {number}",
        "relevance": number % 2,
    },
    "embed": lambda number: {"query": named(number)[0], "positive": f"we saw it here {number}"},
    "instruct": lambda number: {"prompt": f"we saw the {named(number)[0]}", "completion": named(number)[1]},
    "choose": chosen,
    "reward": preferred,
    "prefer": preferred,
    "reinforce": lambda number: {"prompt": f"we saw the {named(number)[0]}"},
}
DECODERS = ("instruct", "choose", "prefer", "reinforce")
OFTEN = ("classify", "answer", "instruct", "reinforce")
"""An encoder's texts and places, a decoder's texts, and one that draws its own: what all runs of the suite try. The
others, which differ in nothing that concerns adapters and layers, have the marker `soak`."""
NAMES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.soak) for name in ROWS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    longer: dict[str, Any] = dict(max_position_embeddings=64, num_hidden_layers=2, hidden_size=16, intermediate_size=16)
    return SimpleNamespace(
        root=root,
        encoder=str(write_run(root / "encoder", dataclasses.replace(ENCODER, **longer), TEXTS)),
        decoder=str(write_run(root / "decoder", dataclasses.replace(DECODER, **longer), TEXTS)),
    )


def config_for(bases, folder, name: str, **changes) -> FinetuneConfig:
    files = {
        part: write_jsonl(folder / f"{part}.jsonl", [ROWS[name](number) for number in range(first, first + 8)])
        for part, first in (("train", 0), ("validation", 8))
    }
    preset = PRESETS[name]()
    if name == "instruct":
        files = {part: (path,) for part, path in files.items()} | {"answers": 2, "max_new_tokens": 4}
    if name == "reinforce":
        # By how many signs it has, in which completions differ.
        files |= {"reward": ("length:6",), "validation_samples": 2}
        changes["policy"] = PolicyGradient(samples=4, max_new_tokens=4, cut="scored")
    defaults = dict(
        init_from=bases.decoder if name in DECODERS else bases.encoder,
        run_dir=str(folder / "run"),
        steps=4,
        batch_size=8,
        eval_every=2,
        data=dataclasses.replace(preset.data, **files),
        optimizer=FinetuneOptimizer(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2),
        mesh=MeshConfig(1, 1, 1),
    )
    return dataclasses.replace(preset, **defaults | changes)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_leave_the_base_as_it_was_and_go_on_after_a_break(bases, tmp_path, name):
    config = config_for(bases, tmp_path, name, lora=LoraConfig(rank=2), keep_best="loss")
    assert not main(dataclasses.replace(config, stop_at=2))["finished"]
    summary = main(config)
    assert summary["finished"] and summary["metrics"]
    before = jax.device_get(espalier.load(config.init_from).params)
    after = restore_complete(tmp_path / "run")
    mlp, ours = (params["layers"]["period"]["0"]["mlp"] for params in (before, after))
    for matrix in ("up", "down"):
        np.testing.assert_array_equal(mlp[matrix]["kernel"], ours[matrix]["kernel"])
        assert np.abs(ours[matrix]["lora_b"]).max() > 0
    merged = espalier.load(tmp_path / "run").params["layers"]["period"]["0"]["mlp"]["up"]
    assert merged.keys() == mlp["up"].keys() and np.abs(merged["kernel"] - mlp["up"]["kernel"]).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_stay_and_lower_ones_learn_less(bases, tmp_path, name):
    optimizer = FinetuneOptimizer(learning_rate=1e-2, layer_decay=0.1, name="adamw", weight_decay=0.0)
    config = config_for(bases, tmp_path, name, freeze=("embeddings",), optimizer=optimizer)
    main(config)
    before = jax.device_get(espalier.load(config.init_from).params)
    after = jax.device_get(espalier.load(tmp_path / "run").params)
    jax.tree.map(np.testing.assert_array_equal, before["embeddings"], after["embeddings"])
    kernel = [params["layers"]["period"]["0"]["mlp"]["up"]["kernel"] for params in (before, after)]
    low, high = np.abs(kernel[1] - kernel[0]).mean((1, 2))
    assert 0 < low < 0.3 * high


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_steps_that_are_executed_again_are_as_logged(bases, tmp_path, name):
    """`replay` opens a run of every task by the same path, adapters and frozen base included."""
    config = config_for(bases, tmp_path, name, lora=LoraConfig(rank=2), checksum_every=1)
    main(config)
    found = replay.main(replay.ReplayConfig(str(tmp_path / "run"), from_step=2))
    assert (found["checksums"], found["difference"], found["apart"]) == (3, None, None)
