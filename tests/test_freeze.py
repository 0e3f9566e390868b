"""Layers that are not trained: what is left has the optimizer's state, and learns what PyTorch's would learn."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import BERT, EVERYTHING, MODERN, close, random_params, strict_and_quick  # noqa: F401

from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.hub import save_pretrained
from espalier.models.transformer import init_params, layer_depths
from espalier.training.config import CheckpointConfig
from espalier.training.frozen import restore_complete
from espalier.training.restore import restore_params, saved_shapes
from espalier.training.run import RunDirectory
from espalier.training.start import find_origin
from espalier.training.state import combined
from finetune.config import FinetuneOptimizer, LoraConfig
from finetune.freezing import _part, frozen_rows
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.train import main
from sharding.mesh import MeshConfig

LAYERS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A BERT of three layers in Hugging Face format, and labelled files."""
    folder = tmp_path_factory.mktemp("freeze")
    rows = [{"text": f"we saw {word} here", "label": word[0]} for word in ("apple", "crow", "axe", "cherry") * 8]
    tokenizer = train_tokenizer([row["text"] for row in rows] * 3, "wordpiece", 300, for_masked_lm=True)
    config = dataclasses.replace(BERT, vocab_size=len(tokenizer), num_hidden_layers=LAYERS)
    save_pretrained(folder / "base", config, random_params(config, ("masked_lm",)), tokenizer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_for(base, run_dir, **changes) -> ClassifyConfig:
    rows = str(base / "rows.jsonl")
    defaults = dict(
        init_from=f"hf:{base / 'base'}",
        run_dir=str(run_dir),
        steps=4,
        batch_size=16,
        eval_every=4,
        freeze=("embeddings,layers.0-1",),
        data=ClassifyData(train=rows, validation=rows),
        optimizer=FinetuneOptimizer(learning_rate=1e-3),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(1, 1, 1),
    )
    return ClassifyConfig(**defaults | changes)


def test_first_layers_and_embeddings_stay_and_have_no_optimizer_state(base, tmp_path, capsys):
    summary = main(config_for(base, tmp_path / "run", export=str(tmp_path / "exported")))
    said = " ".join(capsys.readouterr().out.split())
    assert "frozen embeddings, layers.0-1: " in said
    trained, frozen = (
        saved_shapes(tmp_path / "run" / part, step) for part, step in (("checkpoints", 4), ("frozen", 0))
    )
    kernel = "layers/period/0/attention/kv/kernel"
    assert (trained[kernel].shape[0], frozen[kernel].shape[0]) == (1, 2)
    assert not any(path.startswith("embeddings") for path in trained) and "head/" not in " ".join(frozen)
    assert summary["trained_parameters"] == sum(int(np.prod(leaf.shape)) for leaf in trained.values())
    metadata = (tmp_path / "run" / "checkpoints" / "4" / "opt_state" / "_METADATA").read_text()
    assert "kv" in metadata and "embeddings" not in metadata

    before, after = (jax.device_get(load(source).params) for source in (f"hf:{base / 'base'}", tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, after["embeddings"], before["embeddings"])
    for there, here in zip(jax.tree.leaves(before["layers"]), jax.tree.leaves(after["layers"]), strict=True):
        np.testing.assert_array_equal(there[:2], here[:2])
        assert np.abs(there[2] - here[2]).max() > 1e-4
    exported = jax.device_get(load(f"hf:{tmp_path / 'exported'}").params)
    jax.tree.map(np.testing.assert_array_equal, exported, after)

    # A whole fine-tuning whose rates are zero there takes the same steps elsewhere: freezing is that, without the cost.
    scales = ((r"^embeddings/", 0.0),)
    optimizer = FinetuneOptimizer(learning_rate=1e-3, rate_scales=scales, clip_norm=0.0)
    for name, freeze in (("scaled", ()), ("frozen", ("embeddings",))):
        kept = optimizer if name == "scaled" else dataclasses.replace(optimizer, rate_scales=())
        main(config_for(base, tmp_path / name, freeze=freeze, optimizer=kept))
    close(load(tmp_path / "frozen").params, load(tmp_path / "scaled").params, 1e-5)


def test_a_run_goes_on_over_eight_devices_and_others_start_from_it(base, tmp_path):
    main(config_for(base, tmp_path / "whole"))
    main(config_for(base, tmp_path / "run", stop_at=2))
    main(config_for(base, tmp_path / "run", mesh=MeshConfig(2, 2, 2)))
    close(restore_params(tmp_path / "run"), restore_params(tmp_path / "whole"), 1e-3)
    origin = find_origin(config_for(base, "x", init_from=str(tmp_path / "run")), RunDirectory(tmp_path / "none"))
    complete = restore_complete(tmp_path / "run")
    got = origin.restore_params(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), complete))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), complete)


def test_the_parts_of_a_model_are_put_together_again():
    """Prefix, two periods and suffix; and the depths of the layers that are trained are what they were."""
    for config, given in ((EVERYTHING, ("layers.0-1",)), (MODERN, ("layers.0-2", "/q/kernel"))):
        shapes = jax.eval_shape(lambda key, config=config: init_params(config, key), jax.random.key(0))
        params = random_params(config, tuple(shapes.get("head", ())))
        rows = frozen_rows(given, config, params)
        trained, frozen = (_part(params, rows, which) for which in (False, True))
        jax.tree.map(np.testing.assert_array_equal, combined(trained, frozen), params)
        made = combined(*(_part(shapes, rows, which) for which in (False, True)))
        assert jax.tree.map(lambda leaf: leaf.shape, made) == jax.tree.map(lambda leaf: leaf.shape, shapes)
        left = jax.tree.leaves(layer_depths(config, trained)["layers"])
        last = int(given[0].rpartition("-")[2])
        assert {int(depth) for depths in left for depth in np.ravel(depths)} == {
            config.num_hidden_layers - layer for layer in range(last + 1, config.num_hidden_layers)
        }


def test_what_cannot_be_frozen_is_refused(base, tmp_path):
    for given, said in (
        ("layers.1-2", "layer 0 is not among them; try layers.0-2"),
        ("layers.0-9", "the model has the layers 0 to 2; the first half is layers.0-0"),
        ("nowhere", "'nowhere' matches no parameter; give embeddings"),
        ("(", "is no regular expression"),
        (" ,", "names nothing; give embeddings, layers.0-5, or leave it out"),
        (".", "leaves nothing to train"),
    ):
        with pytest.raises(UserError, match=said) as error:
            main(config_for(base, tmp_path / "run", freeze=(given,)))
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="choose matrices by --lora.targets"):
        config_for(base, tmp_path / "run", lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match="leave out --scratch or --freeze"):
        config_for(base, tmp_path / "run", scratch=True)
