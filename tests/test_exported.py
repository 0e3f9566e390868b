"""What leaves Espalier, in the hands of transformers: stock classes and pipelines, from the command line on."""

import copy
import dataclasses
import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from tiny_models import FAMILIES, random_params

import clm.generate
import clm.presets
import clm.pretrain
import finetune.train
import mlm.config
import mlm.presets
import mlm.pretrain
from espalier import cli, saved_config
from espalier.commands.convert import ExportConfig, ImportConfig, export_model, import_model
from espalier.data.tokenizer import framed_tokenizer, load_tokenizer, save_tokenizer, vocabulary_size
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.families import family_of
from espalier.models.heads import sequence_logits, span_logits, token_logits
from espalier.models.hub import load_pretrained, save_pretrained
from espalier.models.transformer import apply
from espalier.training.restore import read_config, restore_params
from finetune.tasks.classify import record as classification

TEXT = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun by the old stone wall "
QUESTION = "what does the fox jump over?"


@functools.cache
def tokenizer(kind: str):
    return train_tokenizer([TEXT * 20], kind, 300, for_masked_lm=kind == "wordpiece")


def small(model_type: str, **changes) -> ModelConfig:
    """A random model of this family for the tokenizer."""
    base = FAMILIES[model_type]
    made = tokenizer("bpe" if base.causal else "wordpiece")
    return dataclasses.replace(base, vocab_size=vocabulary_size(made), **changes)


def exported(folder, model_type, head, **changes):
    config = small(model_type, **changes)
    params = random_params(config, (head,))
    made = tokenizer("bpe" if config.causal else "wordpiece")
    save_pretrained(folder, config, params, made, head=head)
    return config, params, made


def ours(config, params, head, ids, types=None):
    """Scores for one row of token ids."""
    ids = np.array([ids], np.int32)
    batch = {
        "input_ids": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.arange(ids.shape[1], dtype=np.int32)[None],
        "token_type_ids": np.zeros_like(ids) if types is None else np.array([types], np.int32),
    }
    x_BTD = jax.jit(functools.partial(apply, config))(params, batch)
    return np.asarray(head(config, params, x_BTD))[0]


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_fill_mask(tmp_path, model_type):
    exported(tmp_path / "x", model_type, "masked_lm")
    guesses = hf.pipeline("fill-mask", str(tmp_path / "x"))("the quick [MASK] fox")
    assert len(guesses) == 5 and all(0 < guess["score"] < 1 for guess in guesses)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_text_generation(tmp_path, model_type):
    exported(tmp_path / "x", model_type, "causal_lm")
    write = hf.pipeline("text-generation", str(tmp_path / "x"))
    (text,) = write("the quick", max_new_tokens=5, do_sample=False)
    assert text["generated_text"].startswith("the quick") and write.model.generation_config.pad_token_id == 1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_text_classification(tmp_path, model_type):
    labels = ("cat", "dog", "fox")
    config, params, made = exported(tmp_path / "x", model_type, "sequence_classification", labels=labels)
    found = hf.pipeline("text-classification", str(tmp_path / "x"), top_k=None)(["the lazy dog"])[0]
    ids = made("the lazy dog")["input_ids"]

    def head(config, params, x_BTD):
        return sequence_logits(config, params, x_BTD, np.ones(x_BTD.shape[:2], np.int32))

    expected = jax.nn.softmax(ours(config, params, head, ids)).tolist()
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        dict(zip(labels, expected, strict=True)), abs=1e-4
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_token_classification(tmp_path, model_type):
    labels = ("O", "B-animal", "I-animal")
    config, params, made = exported(tmp_path / "x", model_type, "token_classification", labels=labels)
    tag = hf.pipeline("token-classification", str(tmp_path / "x"), ignore_labels=[])
    found = tag("the lazy dog")
    ids = made("the lazy dog")["input_ids"]
    best = ours(config, params, token_logits, ids).argmax(-1)
    plain = [at for at, index in enumerate(ids) if index not in made.all_special_ids]
    assert [row["entity"] for row in found] == [labels[best[at]] for at in plain]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_question_answering(tmp_path, model_type):
    """By the class: transformers dropped the pipeline of this name after 5.0; where it is there, it runs too."""
    config, params, made = exported(tmp_path / "x", model_type, "question_answering")
    model = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "x")
    inputs = hf.AutoTokenizer.from_pretrained(tmp_path / "x")(QUESTION, TEXT, return_tensors="pt")
    assert ("token_type_ids" in inputs) == (config.type_vocab_size > 1)
    with torch.no_grad():
        found = model(**inputs)
    types = inputs["token_type_ids"][0].tolist() if "token_type_ids" in inputs else None
    expected = ours(config, params, span_logits, inputs["input_ids"][0].tolist(), types)
    got = torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    if "question-answering" in hf.pipelines.SUPPORTED_TASKS:
        assert "answer" in hf.pipeline("question-answering", str(tmp_path / "x"))(question=QUESTION, context=TEXT)


@pytest.mark.parametrize(
    ("model_type", "head"), [(name, head) for name in FAMILIES for head in family_of(name).classes]
)
def test_auto_classes_load_it_without_remote_code(tmp_path, model_type, head):
    labels = ("a", "b", "c") if head.endswith("classification") else ()
    exported(tmp_path / "x", model_type, head, labels=labels)
    auto = {
        "masked_lm": hf.AutoModelForMaskedLM,
        "causal_lm": hf.AutoModelForCausalLM,
        "sequence_classification": hf.AutoModelForSequenceClassification,
        "token_classification": hf.AutoModelForTokenClassification,
        "question_answering": hf.AutoModelForQuestionAnswering,
        "embedding": hf.AutoModel,
    }[head]
    model, loading = auto.from_pretrained(tmp_path / "x", trust_remote_code=False, output_loading_info=True)
    assert type(model).__name__ == family_of(model_type).classes[head]
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"] and not loading["missing_keys"]
    assert (head == "causal_lm") == (tmp_path / "x" / "generation_config.json").is_file()


@pytest.fixture(scope="module")
def published_bert(tmp_path_factory):
    """A BERT as others publish it: by PyTorch, an old vocab.txt, a config.json without what is usual."""
    folder = tmp_path_factory.mktemp("published") / "small-bert"
    made = tokenizer("wordpiece")
    words = sorted(made.get_vocab(), key=made.get_vocab().get)
    config = hf.BertConfig(
        vocab_size=len(words) + 7,  # spare rows
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    hf.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return folder


GENERATION = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": [0, 5, 7]}


@pytest.fixture(scope="module")
def published_llama(tmp_path_factory):
    """In bfloat16, with several end tokens, no padding, and ways of sampling."""
    folder = tmp_path_factory.mktemp("published") / "small-llama"
    made = copy.deepcopy(tokenizer("bpe"))
    made.pad_token = None
    config = hf.LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        bos_token_id=0,
        eos_token_id=[0, 5, 7],
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    made.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = TEXT.split()
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, 300)))
    rows = [{"text": " ".join(rng.choice(words, 6)), "label": ("no", "yes")[number % 2]} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pretraining(entry, corpus, tmp_path, name="run", **changes):
    config = entry.debug()
    data = dataclasses.replace(config.data, builtin=None, files=(f"{corpus}/*.txt",), sequence_length=32)
    return dataclasses.replace(config, data=data, steps=4, run_dir=str(tmp_path / name), **changes)


def test_pretraining_goes_on_from_published_weights_and_back(published_bert, corpus, tmp_path):
    """hf: → mlm → paused, resumed → exported at the end → transformers; the architecture is that of the weights."""
    config = pretraining(mlm.presets, corpus, tmp_path, init_from=f"hf:{published_bert}", export=str(tmp_path / "out"))
    call = cli.Call("./launch.sh mlm debug", frozenset({"model.hidden_dropout"}))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_dropout=0.25))
    still = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0))

    mlm.pretrain.main(dataclasses.replace(still, run_dir=str(tmp_path / "still"), export=None), call)
    saved = read_config(tmp_path / "still")["model"]
    assert saved["hidden_size"] == 32 and saved["vocab_size"] == len(tokenizer("wordpiece")) + 7
    assert saved["hidden_dropout"] == 0.25 and saved["attention_dropout"] == 0.1
    _, given, _ = load_pretrained(published_bert)
    jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / "still"), jax.device_get(given))

    mlm.pretrain.main(dataclasses.replace(config, stop_at=2), call)
    assert not (tmp_path / "out").exists()
    summary = mlm.pretrain.main(config, call)
    assert summary["finished"]
    assert mlm.pretrain.main(config, call)["finished"]  # once more: nothing to train, and exported already
    params = restore_params(tmp_path / "run")
    _, again, _ = load_pretrained(tmp_path / "out")
    rows = saved["vocab_size"]
    np.testing.assert_array_equal(
        params["embeddings"]["token"]["embedding"][:rows], np.asarray(again["embeddings"]["token"]["embedding"])[:rows]
    )
    assert len(hf.pipeline("fill-mask", str(tmp_path / "out"))("the quick [MASK] fox")) == 5

    card = (tmp_path / "out" / "README.md").read_text()
    front = re.match(r"---\n(.*?)\n---\n", card, re.S)[1]
    assert "pipeline_tag: fill-mask" in front and "library_name: transformers" in front
    assert "base_model" not in front  # It is a folder on this machine, and no name on the Hub.
    for part in (
        "./launch.sh mlm debug",
        "## Data",
        "## Results on held-out data",
        "| loss (nats per masked token) |",
        "| steps | 4 |",
        f"{corpus}/*.txt",
        "| jax |",
    ):
        assert part in card, part


def test_import_then_every_entry_point(published_bert, corpus, tmp_path):
    """import → run directory → mlm and finetune from it; the classifier's exported scores are its own."""
    result = import_model(ImportConfig(str(published_bert), str(tmp_path / "imported")))
    assert result["head"] == "masked_lm" and result["model_type"] == "bert"
    config = pretraining(mlm.presets, corpus, tmp_path, name="more", init_from=str(tmp_path / "imported"))
    assert mlm.pretrain.main(config)["finished"]

    data = classification.ClassifyData(train=f"{corpus}/rows.jsonl", validation=f"{corpus}/rows.jsonl")
    tuning = dataclasses.replace(
        classification.classify_debug(),
        data=data,
        init_from=str(tmp_path / "imported"),
        run_dir=str(tmp_path / "tuned"),
    )
    finetune.train.main(tuning)
    export_model(ExportConfig(str(tmp_path / "tuned"), str(tmp_path / "out")))
    classify = hf.pipeline("text-classification", str(tmp_path / "out"))
    for line in (tmp_path / "tuned" / "predictions.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        (found,) = classify([row["text"]])
        assert found["label"] == row["prediction"] and found["score"] == pytest.approx(row["probability"], abs=1e-4)

    # What config.json records beside the settings is known to --from-config.
    again = saved_config.read(str(tmp_path / "more"), [mlm.config.PretrainConfig], "mlm")
    assert (again.config.data, again.config.run_dir, again.name) == (config.data, None, "more-again")
    again = saved_config.read(str(tmp_path / "tuned"), [classification.ClassifyConfig], "finetune")
    assert again.config.data == data and again.config.init_from == tuning.init_from

    with pytest.raises(UserError, match="weights and no optimizer state"):
        mlm.pretrain.main(dataclasses.replace(config, run_dir=str(tmp_path / "fork"), init_optimizer=True, seed=1))


@pytest.mark.soak
def test_a_decoder_and_its_classifier_go_on_from_published_weights_and_back(published_llama, corpus, tmp_path, capsys):
    """What the files say beside the weights is handed on from run to run; the classifier's scores are alike outside,
    for the exported tokenizer puts special tokens around its texts."""
    init_from = f"hf:{published_llama}"
    config = pretraining(clm.presets, corpus, tmp_path, init_from=init_from, export=str(tmp_path / "decoder"))
    clm.pretrain.main(dataclasses.replace(config, stop_at=2))
    clm.pretrain.main(config)
    there, back = (json.loads((path / "config.json").read_text()) for path in (published_llama, tmp_path / "decoder"))
    assert {key for key in there | back if there.get(key) != back.get(key)} <= {"transformers_version"}
    assert json.loads((tmp_path / "decoder" / "generation_config.json").read_text()) == GENERATION
    with safe_open(tmp_path / "decoder" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    capsys.readouterr()
    clm.generate.main(clm.generate.GenerateConfig(config.run_dir, sampling=clm.generate.SamplingConfig(2)))
    assert "temperature 0.6, top_k 50, top_p 1, repetition_penalty 1.1\n" in capsys.readouterr().out

    data = classification.ClassifyData(train=f"{corpus}/rows.jsonl", validation=f"{corpus}/rows.jsonl")
    tuning = dataclasses.replace(
        classification.classify_debug(),
        data=data,
        init_from=config.run_dir,
        run_dir=str(tmp_path / "tuned"),
        export=str(tmp_path / "half"),
    )
    finetune.train.main(tuning)
    assert hf.AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    export_model(ExportConfig(str(tmp_path / "tuned"), str(tmp_path / "out"), dtype="float32"))
    classify = hf.pipeline("text-classification", str(tmp_path / "out"), batch_size=3)
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "predictions.jsonl").read_text().splitlines()[:6]]
    for row, found in zip(rows, classify([row["text"] for row in rows]), strict=True):
        assert found["label"] == row["prediction"] and found["score"] == pytest.approx(row["probability"], abs=1e-4)


@pytest.mark.parametrize("pad", ["the end", "none", "the end, and no other special token"])
def test_a_decoder_whose_padding_is_its_end_classifies_alike(tmp_path, pad):
    """transformers looks for the last token that is not padding: the end of the text must not be taken for it."""
    config = small("llama", labels=("a", "b", "c"))
    params = random_params(config, ("sequence_classification",))
    made = copy.deepcopy(tokenizer("bpe"))
    made.pad_token = None if pad == "none" else made.eos_token
    if pad.endswith("token"):
        state = json.loads(made.backend_tokenizer.to_str())
        state["added_tokens"] = state["added_tokens"][:1]
        made = hf.PreTrainedTokenizerFast(
            tokenizer_object=type(made.backend_tokenizer).from_str(json.dumps(state)),
            bos_token=made.bos_token,
            eos_token=made.eos_token,
            pad_token=made.eos_token,
        )
    save_pretrained(tmp_path / "x", config, params, framed_tokenizer(made, causal=True))
    classify = hf.pipeline("text-classification", str(tmp_path / "x"), top_k=None)
    texts = ["the lazy dog", "the quick brown fox jumps"]
    alone = not classify.tokenizer.pad_token
    assert alone == pad.endswith("token")
    for text, found in zip(texts, classify(texts, batch_size=1 if alone else 2), strict=True):
        ids = [made.bos_token_id, *made(text, add_special_tokens=False)["input_ids"], made.eos_token_id]

        def head(config, params, x_BTD):
            return sequence_logits(config, params, x_BTD, np.ones(x_BTD.shape[:2], np.int32))

        expected = jax.nn.softmax(ours(config, params, head, ids)).tolist()
        assert {row["label"]: row["score"] for row in found} == pytest.approx(
            dict(zip(config.labels, expected, strict=True)), abs=1e-4
        )


def test_special_tokens_beyond_the_vocabulary(tmp_path):
    """As in Gemma 3, whose tokenizer has one more than its model; an ordinary token too many is refused."""
    made = copy.deepcopy(tokenizer("wordpiece"))
    exported(tmp_path / "x", "bert", "masked_lm")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    save_tokenizer(made, tmp_path / "x")
    assert import_model(ImportConfig(str(tmp_path / "x"), str(tmp_path / "run")))["head"] == "masked_lm"
    made.add_tokens(["zebra"])
    save_tokenizer(made, tmp_path / "x")
    with pytest.raises(UserError, match="do not belong together"):
        import_model(ImportConfig(str(tmp_path / "x"), str(tmp_path / "again")))


def test_refusals_come_before_the_work(published_bert, corpus, tmp_path):
    base = pretraining(mlm.presets, corpus, tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    decoder = pretraining(clm.presets, corpus, tmp_path, init_from=f"hf:{published_bert}")
    wider = dataclasses.replace(base, init_from=f"hf:{published_bert}")
    longer = dataclasses.replace(wider, model=dataclasses.replace(base.model, max_position_embeddings=128))

    def asking(name):
        return cli.Call(given=frozenset({f"model.{name}"}))

    exotic = dataclasses.replace(base.model, norm_position="pre")
    for run, message in (
        (lambda: clm.pretrain.main(decoder), r"names an encoder \(bert\); pretrain it by `mlm`"),
        (lambda: mlm.pretrain.main(dataclasses.replace(base, export=str(tmp_path / "taken"))), "exists already"),
        (
            lambda: mlm.pretrain.main(dataclasses.replace(base, model=exotic, export=str(tmp_path / "out"))),
            "norm_position",
        ),
        (
            lambda: mlm.pretrain.main(dataclasses.replace(base, init_from="hf:nobody/nothing")),
            "the Hub could not be reached",
        ),
        (lambda: mlm.pretrain.main(wider, asking("hidden_size")), r"do not fit.*is \(64, 32\), wanted \(64, 64\)"),
        (lambda: mlm.pretrain.main(longer, asking("max_position_embeddings")), "do not fit the model"),
        (
            lambda: mlm.pretrain.main(dataclasses.replace(base, init_from=f"hf:{published_bert}", init_optimizer=True)),
            "no optimizer state",
        ),
        (lambda: mlm.pretrain.main(dataclasses.replace(base, export=base.run_dir)), "is where the run is"),
        (lambda: import_model(ImportConfig(str(published_bert), str(tmp_path / "taken"))), "exists already"),
        (lambda: import_model(ImportConfig(str(corpus), str(tmp_path / "new"))), "has no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_tokenizer_that_needs_code_is_refused(published_bert, tmp_path):
    shutil.copytree(published_bert, tmp_path / "evil")
    (tmp_path / "evil" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    with pytest.raises(UserError, match="auto_map"):
        load_pretrained(tmp_path / "evil")
    (tmp_path / "evil" / "tokenizer_config.json").unlink()
    (tmp_path / "evil" / "vocab.txt").unlink()
    _, _, none = load_pretrained(tmp_path / "evil")
    assert none is None
    with pytest.raises(UserError, match="no tokenizer at"):
        import_model(ImportConfig(str(tmp_path / "evil"), str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_file_reads_like_transformers(published_bert):
    _, _, found = load_pretrained(published_bert)
    expected = hf.BertTokenizerFast(str(published_bert / "vocab.txt"))
    assert found("The quick dog!")["input_ids"] == expected("The quick dog!")["input_ids"]
    assert (found.cls_token, found.mask_token) == ("[CLS]", "[MASK]")
    save_tokenizer(found, published_bert.parent / "saved")
    again = load_tokenizer(published_bert.parent / "saved")
    assert again("The quick dog!")["input_ids"] == found("The quick dog!")["input_ids"]
