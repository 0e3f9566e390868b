"""Adapters: applied as PyTorch's `peft` applies them, written and read in its format, and a run over a frozen base."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import BERT, GPT, LLAMA, MODERN, SIZES, as_jax, close, random_params, strict_and_quick  # noqa: F401

from espalier.commands.convert import ExportConfig, ImportConfig, export_model, import_model
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.loading import load
from espalier.models.config import ModelConfig
from espalier.models.families.phi3 import PHI3_MINI
from espalier.models.hub import save_pretrained
from espalier.models.layers import Einsum
from espalier.models.logits import batch_of_tokens, head_logits
from espalier.models.peft import read_adapter, save_adapter
from espalier.models.transformer import matrix_axes
from espalier.training.adapters import adapted, merged, without
from espalier.training.config import CheckpointConfig
from espalier.training.frozen import restore_complete
from espalier.training.restore import restore_params, saved_paths, saved_shapes
from finetune.config import FinetuneOptimizer, LoraConfig
from finetune.lora import places_of
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.train import main
from sharding.mesh import MeshConfig

# What peft 0.21 asks transformers 5.24 for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PHI = dataclasses.replace(PHI3_MINI, **SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6)
FAMILIES = {"bert": BERT, "gpt2": GPT, "llama": LLAMA, "modernbert": MODERN, "phi3": PHI}
LABELS = ("a", "b", "c")
CASES = {
    "bert": ("bert", "sequence_classification", LoraConfig(rank=3, alpha=6.0)),
    "bert tokens": ("bert", "token_classification", LoraConfig(rank=2, targets="attention/(kv|out)")),
    "gpt2 c_attn": ("gpt2", "causal_lm", LoraConfig(rank=2, alpha=5.0)),
    "gpt2 queries, rslora": ("gpt2", "sequence_classification", LoraConfig(rank=4, targets="/(q|kv)/", rslora=True)),
    "llama": ("llama", "causal_lm", LoraConfig(rank=3)),
    "modernbert": ("modernbert", "sequence_classification", LoraConfig(rank=3, targets="kv|gate_up|out", rslora=True)),
    "phi3": ("phi3", "causal_lm", LoraConfig(rank=2, targets="/q/|gate_up")),
}


def model_of(family: str, head: str) -> ModelConfig:
    labels = LABELS if head.endswith("classification") else ()
    return dataclasses.replace(FAMILIES[family], labels=labels, hidden_dropout=0.0, attention_dropout=0.0)


def with_adapters(params: dict, lora: LoraConfig, seed: int = 1) -> dict:
    """Random adapters, none of them zero."""
    random, new = np.random.default_rng(seed), jax.tree.map(lambda leaf: leaf, params)
    for place in places_of(params, lora.targets):
        node = new
        for name in place.path:
            node = node[name]
        node["lora_a"] = random.normal(size=(*place.count, lora.rank, *place.inputs)).astype(np.float32) * 0.2
        node["lora_b"] = random.normal(size=(*place.count, *place.outputs, lora.rank)).astype(np.float32) * 0.2
        node["lora_scale"] = np.full(place.repeats, lora.scale, np.float32)
    return new


def logits_of(config: ModelConfig, head: str, params: dict, ids) -> np.ndarray:
    batch = batch_of_tokens({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return np.asarray(jax.jit(lambda p: head_logits(config, head, p, batch))(as_jax(params)))


def torch_model(folder, head: str):
    kind = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
        "token_classification": transformers.AutoModelForTokenClassification,
    }[head]
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


IDS = np.random.default_rng(0).integers(5, 200, (1, 9))


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_an_exported_adapter_onto_the_exported_base_with_the_same_logits(case, tmp_path):
    family, head, lora = CASES[case]
    config = model_of(family, head)
    base = random_params(config, (head,))
    params = with_adapters(base, lora)
    save_pretrained(tmp_path / "base", config, base)
    settings = dict(rank=lora.rank, alpha=lora.alpha, rslora=lora.rslora)
    save_adapter(tmp_path / "adapter", config, head, params, str(tmp_path / "base"), **settings)

    theirs = torch_model(tmp_path / "base", head)
    if head != "causal_lm":  # The head comes with the adapter.
        with torch.no_grad():
            for parameter in (theirs.score if hasattr(theirs, "score") else theirs.classifier).parameters():
                parameter.zero_()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours, of_merged = (logits_of(config, head, tree, IDS) for tree in (params, merged(params)))
    close(ours, expected)
    close(of_merged, expected)
    assert np.abs(ours - logits_of(config, head, base, IDS)).max() > 0.1
    # And back.
    close(read_adapter(tmp_path / "adapter", config, head, base), merged(params))


def test_an_adapter_that_peft_made_is_imported(tmp_path):
    """Ranks and alphas by pattern, on GPT-2's fused matrix, with a classifier saved whole."""
    config = model_of("gpt2", "sequence_classification")
    save_pretrained(tmp_path / "base", config, random_params(config, ("sequence_classification",)), words())
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        torch_model(tmp_path / "base", "sequence_classification"),
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            lora_alpha=3,
            target_modules=["c_attn", "c_fc"],
            rank_pattern={"c_fc": 4},
            alpha_pattern={"c_fc": 10},
            init_lora_weights=False,
            fan_in_fan_out=True,
        ),
    ).eval()
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapter")
    import_model(ImportConfig(str(tmp_path / "base"), str(tmp_path / "run"), adapter=str(tmp_path / "adapter")))
    model = load(tmp_path / "run")
    close(logits_of(model.config, model.head, model.params, IDS), expected)
    assert "with the adapter" in json.loads((tmp_path / "run" / "config.json").read_text())["imported_from"]

    for change, said in (({"use_dora": True}, "use_dora=True"), ({"peft_type": "IA3"}, "of type IA3")):
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=said):
            read_adapter(tmp_path / "odd", config, "sequence_classification", model.params)
    llama = model_of("llama", "sequence_classification")
    with pytest.raises(UserError, match="has no such matrix"):
        read_adapter(
            tmp_path / "adapter", llama, "sequence_classification", random_params(llama, ("sequence_classification",))
        )


def test_dropout_of_what_adapters_see_is_none_on_average_and_leaves_the_kernel_alone():
    """Over keys and values together, one layer by itself: as expected, y = x W + scale · (x dropped) A B."""
    random = np.random.default_rng(0)
    node = {
        "kernel": random.normal(size=(2, 8, 3, 4)),
        "lora_a": random.normal(size=(2, 5, 8)),
        "lora_b": random.normal(size=(2, 3, 4, 5)),
        "lora_scale": np.float32(2.0),
    }
    node, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (node, random.normal(size=(1, 6, 8))))
    layer = Einsum((2, 8, 3, 4), False, 0.02, jnp.dtype("float32"), 0.5, name="kv")

    def product(node, key=None):
        return layer.apply({"params": node}, "BTD,CDKH->BTCKH", x, key)

    still = product(node)
    close(still, np.einsum("btd,cdkh->btckh", x, merged(node)["kernel"]))
    drawn = jax.jit(jax.vmap(lambda key: product(node, key)))(jax.random.split(jax.random.key(1), 4000))
    assert np.abs(drawn[0] - still).max() > 1
    assert np.abs(drawn.mean(0) - still).max() < 6 * (np.asarray(drawn).std(0) / np.sqrt(4000)).max()
    plain = {"kernel": node["kernel"]}
    np.testing.assert_array_equal(product(plain, jax.random.key(1)), product(plain))


def test_adapters_are_matrices_for_muon():
    """Each pair of a matrix is treated as one: rank against inputs, outputs against rank."""
    params = with_adapters(random_params(BERT), LoraConfig(rank=3))
    axes = matrix_axes(params)["layers"]["period"]["0"]
    assert axes["attention"]["kv"]["lora_a"] == ((3,), (2,))  # [R, 2, r, D]
    assert axes["attention"]["kv"]["lora_b"] == ((4,), (2, 3))  # [R, 2, K, H, r]
    assert axes["attention"]["out"]["lora_a"] == ((2, 3), (1,))  # [R, r, N, H]
    assert axes["mlp"]["down"]["lora_b"] == ((2,), (1,)) and axes["mlp"]["down"]["lora_scale"] is None


# Runs

KINDS = {"fruit": "apple pear plum cherry".split(), "bird": "crow robin wren heron".split()}


def rows(count: int) -> list[dict]:
    random = np.random.default_rng(count)
    kinds = [list(KINDS)[number % 2] for number in range(count)]
    return [{"text": f"we saw the {random.choice(KINDS[kind])} here", "label": kind} for kind in kinds]


def words():
    return train_tokenizer([row["text"] for row in rows(60)] * 3, "wordpiece", 300, for_masked_lm=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A masked-LM BERT in Hugging Face format, and labelled files."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = words()
    config = dataclasses.replace(BERT, vocab_size=len(tokenizer))
    save_pretrained(folder / "base", config, random_params(config, ("masked_lm",)), tokenizer)
    for name, count in (("train", 48), ("validation", 20)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return folder


def config_for(base, run_dir, **changes) -> ClassifyConfig:
    defaults = dict(
        init_from=f"hf:{base / 'base'}",
        run_dir=str(run_dir),
        steps=6,
        batch_size=16,
        eval_every=3,
        lora=LoraConfig(rank=4, dropout=0.1),
        data=ClassifyData(train=str(base / "train.jsonl"), validation=str(base / "validation.jsonl")),
        optimizer=FinetuneOptimizer(learning_rate=2e-2),
        checkpoint=CheckpointConfig(every=100),
        mesh=MeshConfig(1, 1, 1),
    )
    return ClassifyConfig(**defaults | changes)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run, its export, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    summary = main(config_for(base, folder / "run", export=str(folder / "exported")))
    return folder, summary


def test_only_adapters_and_head_are_trained_and_have_an_optimizer_state(base, run):
    folder, summary = run
    trained, frozen = saved_shapes(folder / "run" / "checkpoints", 6), saved_paths(folder / "run" / "frozen")
    assert trained and all("/lora_" in path or path.startswith("head/") for path in trained)
    assert summary["trained_parameters"] == sum(int(np.prod(leaf.shape)) for leaf in trained.values())
    assert "embeddings/token/embedding" in frozen and not any(path.startswith("head/") for path in frozen)
    state = folder / "run" / "checkpoints" / "6" / "opt_state"
    kept = {path.name for path in state.iterdir()} | {line for line in (state / "_METADATA").read_text().split('"')}
    assert any("lora_a" in name for name in kept) and not any("kernel" in name and "head" not in name for name in kept)

    complete = restore_complete(folder / "run")
    assert adapted(complete)
    before = load(f"hf:{base / 'base'}").params
    for name in ("embeddings", "layers"):
        jax.tree.map(np.testing.assert_array_equal, without(complete)[name], jax.device_get(before[name]))
    assert np.abs(complete["layers"]["period"]["0"]["attention"]["kv"]["lora_b"]).min() > 0


def test_a_run_that_goes_on_over_eight_devices_ends_as_on_one(base, run, tmp_path, capsys):
    folder, summary = run
    assert not main(config_for(base, tmp_path / "run", stop_at=3))["finished"]
    assert "rank 4, scale 4, on 12 matrices" in " ".join(capsys.readouterr().out.split())
    again = main(config_for(base, tmp_path / "run", mesh=MeshConfig(2, 2, 2)))
    assert again["loss"] == pytest.approx(summary["loss"], abs=2e-4)
    close(restore_params(tmp_path / "run"), restore_params(folder / "run"), 1e-3)


def test_an_export_has_the_adapters_merged_and_loads_in_transformers(run, tmp_path):
    folder, _ = run
    export_model(ExportConfig(str(folder / "run"), str(tmp_path / "later")))
    model = load(folder / "run")
    ids = np.array(model.tokenizer("we saw the crow here").input_ids)[None]
    expected = torch_model(folder / "exported", "sequence_classification")(torch.tensor(ids)).logits.detach().numpy()
    close(torch_model(tmp_path / "later", "sequence_classification")(torch.tensor(ids)).logits.detach(), expected)
    close(logits_of(model.config, model.head, model.params, ids), expected)


def test_the_adapter_of_a_run_is_exported_alone(base, run, tmp_path):
    folder, _ = run
    export_model(ExportConfig(str(folder / "run"), str(tmp_path / "adapter"), adapter=True))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base / "base") and settings["lora_dropout"] == 0.1
    there = transformers.AutoModelForSequenceClassification.from_pretrained(base / "base", num_labels=2).eval()
    theirs = peft.PeftModel.from_pretrained(there, tmp_path / "adapter").eval()
    model = load(folder / "run")
    ids = np.array(model.tokenizer("we saw the pear here").input_ids)[None]
    close(
        logits_of(model.config, model.head, model.params, ids), theirs(torch.tensor(ids)).logits.detach().numpy(), 1e-4
    )


def test_another_run_starts_from_the_merged_weights_and_keeps_the_head_of_the_same_labels(base, run, tmp_path):
    folder, _ = run
    still, lora = FinetuneOptimizer(learning_rate=0.0), LoraConfig(rank=2, targets="/q/")
    origin = dict(init_from=str(folder / "run"), steps=1, optimizer=still, lora=lora, mesh=MeshConfig(2, 2, 2))
    main(config_for(base, tmp_path / "run", **origin))
    close(load(tmp_path / "run").params, load(folder / "run").params)


def test_what_cannot_be_adapted_is_refused(base, tmp_path):
    for lora, said in (
        (LoraConfig(rank=2, targets="token/embedding"), "matches no matrix of a layer; there are layers/period/0/"),
        (LoraConfig(rank=2, targets="("), "is no regular expression"),
    ):
        with pytest.raises(UserError, match=said) as error:
            main(config_for(base, tmp_path / "run", lora=lora))
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    for settings, said in (
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(alpha=0.0), "alpha=0.0 must be greater"),
        (dict(dropout=1.0), "below 1"),
    ):
        with pytest.raises(UserError, match=said):
            LoraConfig(**settings)
    with pytest.raises(UserError, match="adapters need a pretrained model"):
        config_for(base, tmp_path / "run", scratch=True)
    with pytest.raises(UserError, match="was trained without adapters"):
        import_model(ImportConfig(str(base / "base"), str(tmp_path / "plain")))
        export_model(ExportConfig(str(tmp_path / "plain"), str(tmp_path / "out"), adapter=True))


def test_merging_of_shapes_gives_shapes():
    params = with_adapters(random_params(LLAMA), LoraConfig(rank=2))
    shapes = merged(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params)))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, without(params))
