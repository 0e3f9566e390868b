"""Instruction tuning: what is read, learnt, cut and shown; a run from its beginning to what others load."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import LLAMA, close
from tiny_runs import write_run

import espalier
from espalier.data.chat import Chat, render
from espalier.data.examples import Example
from espalier.data.packed_examples import ExampleRows
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError
from espalier.models.config import Execution
from espalier.models.transformer import init_params
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.instruct.examples import Item, fitted, read_part, shown, with_template
from finetune.tasks.instruct.record import InstructConfig, InstructData
from finetune.tasks.instruct.task import instruction_objective, measure, row_length
from finetune.train import main
from sharding.mesh import MeshConfig

CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "中国": "北京", "日本": "东京", "Cuba": "Havana"}
TEXTS = [f"{country} has {city}." for country, city in CAPITALS.items()] * 9
MODEL = dataclasses.replace(LLAMA, num_hidden_layers=1)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, "bpe", 330, for_masked_lm=False)


def part_of(tokenizer, path, model=MODEL, **data):
    settings = InstructData(train=(str(path),) if isinstance(path, str) else tuple(map(str, path)), **data)
    return read_part(settings, "train", with_template(tokenizer, settings), model)


def learnt(tokenizer, example) -> str:
    """The text of what is learnt, with the end token."""
    return tokenizer.decode([i for i, w in zip(example.ids, example.of_tokens["loss_weights"], strict=True) if w])


def test_all_forms_of_files_are_the_same_chats(tokenizer, tmp_path):
    country, city = "中国", "北京"
    forms = {
        "messages": chat(country, city),
        "conversations": {"conversations": [{"from": "human", "value": country}, {"from": "gpt", "value": city}]},
        "prompt": {"prompt": country, "completion": city},
        "prompt lists": {"prompt": chat(country)["messages"], "completion": [{"role": "assistant", "content": city}]},
        "alpaca": {"instruction": country, "input": "", "output": city},
    }
    found = [part_of(tokenizer, write_jsonl(tmp_path / "a.jsonl", [row])) for row in forms.values()]
    (tmp_path / "array.json").write_text(json.dumps([forms["alpaca"]]))
    (tmp_path / "table.csv").write_text(f"prompt,completion\n{country},{city}\n", encoding="utf-8")
    found += [part_of(tokenizer, str(tmp_path / name)) for name in ("array.json", "table.csv")]
    for name, text in (("x.a", country), ("x.b", city)):
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    found.append(part_of(tokenizer, (tmp_path / "x.a", tmp_path / "x.b")))
    for part in found:
        assert part.encoded[0].ids == found[0].encoded[0].ids
        assert learnt(tokenizer, part.encoded[0]) == f"{city}<|endoftext|>"
        [item] = part.items
        assert (item.source, item.reference, item.prompt) == (country, city, chat(country)["messages"])
    with_input = part_of(tokenizer, write_jsonl(tmp_path / "a.jsonl", [forms["alpaca"] | {"input": "now"}]))
    assert with_input.items[0].prompt[0]["content"] == f"{country}\n\nnow"


def test_several_turns_are_all_learnt_and_shown(tokenizer, tmp_path):
    part = part_of(tokenizer, write_jsonl(tmp_path / "a.jsonl", [chat("Peru", "Lima", "中国", "北京")]))
    assert learnt(tokenizer, part.encoded[0]) == "Lima<|endoftext|>北京<|endoftext|>"
    lines = shown(part.items[0], part.encoded[0], tokenizer)
    head, tokens = lines.split("\n")
    size, count = len(part.encoded[0].ids), int(np.sum(part.encoded[0].of_tokens["loss_weights"]))
    assert head == f"{tmp_path}/a.jsonl:1: {size} tokens, {count} learnt, in [brackets]"
    assert tokens.strip().replace("│", "").replace("[", "").replace("]", "").replace("·", "") == (
        part.items[0].chat.text.replace("\n", "⏎")
    )
    assert tokens.count("[") == count and "北" in tokens and "[<|endoftext|>]" in tokens


def test_a_template_of_fields_over_parallel_files(tokenizer, tmp_path):
    for name, texts in (("x.en", CAPITALS), ("x.de", CAPITALS.values())):
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    files = [tmp_path / "x.en", tmp_path / "x.de"]
    part = part_of(tokenizer, files, template="{source} = {target}")
    texts = [tokenizer.decode(example.ids) for example in part.encoded]
    assert texts == [f"<|endoftext|>{a} = {b}<|endoftext|>" for a, b in CAPITALS.items()]
    assert [learnt(tokenizer, example) for example in part.encoded] == [f" {b}<|endoftext|>" for b in CAPITALS.values()]
    (tmp_path / "x.de").write_text("one\n")
    with pytest.raises(UserError, match="x.en has 6 lines and .*x.de 1; parallel files have as many"):
        part_of(tokenizer, files)


def test_long_examples_end_behind_an_answer_at_a_whole_character_or_not_at_all(tokenizer, tmp_path):
    rows = [
        chat("Peru", "Lima", "France", "Paris" * 20),
        chat("中国", "京" * 60),
        chat("France " * 40, "Paris"),
        chat("Cuba", "Havana"),
        chat("Cuba", " "),
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    part = part_of(tokenizer, path, max_length=60)
    assert all(len(example.ids) <= 60 for example in part.encoded)
    first, second, third = (learnt(tokenizer, example) for example in part.encoded)
    assert (first, third) == ("Lima<|endoftext|>", "Havana<|endoftext|>")
    assert set(second) == {"京"} and len(part.encoded[1].ids) > 55
    assert part.facts[1:] == (
        f"{path}: 3 of 4 examples are longer than 60 tokens: 1 end after an earlier answer, 1 end within their answer, "
        "1 are left out (--data.max-length)",
        f"{path}: 1 examples with an empty answer are left out",
    )
    with pytest.raises(UserError, match="no example has a token of its answer within 60 tokens"):
        part_of(tokenizer, write_jsonl(tmp_path / "b.jsonl", rows[2:3]), max_length=60)


def test_fitted_counts_by_hand():
    offsets = np.array([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (4, 5), (5, 6), (6, 7)], np.int32)
    weights = np.array([0, 1, 0, 0, 1, 1, 1, 0], np.float32)
    example = Example(list(range(8)), [0] * 8, offsets, of_tokens={"loss_weights": weights})
    answers = [(1, 2), (4, 6)]
    for room, size, how in ((8, 8, "whole"), (7, 7, "turns"), (6, 2, "turns"), (2, 2, "turns")):
        short, why = fitted(example, answers, room)
        assert (len(short.ids), why) == (size, how)
    assert fitted(example, answers, 1) == (None, "dropped")
    late = example._replace(of_tokens={"loss_weights": weights * (np.arange(8) > 1)})
    for room, size in ((6, 6), (5, None)):  # two tokens are one character
        short, why = fitted(late, answers[1:], room)
        assert (short and len(short.ids), why) == (size, "answer" if size else "dropped")


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        ([chat("hello")], {}, r"a.jsonl:1: a chat without an assistant's turn has .* \(its roles: user"),
        ([{"text": "x", "n": 1}], {}, "has 'text', 'n'; chats have 'messages', others 'prompt' and 'completion'"),
        ([{"source": "x"}], {"template": "{source} = {target}"}, "a.jsonl has no 'target', which data.template"),
        ([{"prompt": "x", "completion": None}], {}, "a.jsonl:1: no text under 'completion'"),
        ([chat("a", "b")], {"template": "{a} {b}", "chat_template": "f"}, "two ways to write an example; give one"),
        ([chat("a", "")], {}, "every answer is empty"),
    ],
)  # fmt: skip
def test_files_that_will_not_do_are_refused_in_a_line(tokenizer, tmp_path, rows, data, message):
    with pytest.raises(UserError, match=message) as caught:
        part_of(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows), **data)
    assert "\n" not in str(caught.value)


def test_a_spelled_out_special_token_is_said(tokenizer, tmp_path):
    part = part_of(tokenizer, write_jsonl(tmp_path / "a.jsonl", [chat("a <|endoftext|>", "b")]))
    assert part.facts[-1].endswith(
        "1 examples spell out the special token <|endoftext|>, which is then read as that token"
    )


def test_packed_loss_is_the_loss_of_examples_alone(tokenizer, tmp_path):
    """No example sees another: loss and gradient of packed rows are those of each example in a row of its own."""
    rows = [chat(country, city, *(["again?", city * 2] if number % 2 else [])) for number, (country, city) in
            enumerate(CAPITALS.items())]  # fmt: skip
    part = part_of(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows))
    model = dataclasses.replace(MODEL, vocab_size=400)
    objective = instruction_objective(model, execution=Execution(dtype="float32"))
    params = init_params(model, jax.random.key(0), heads=("causal_lm",))
    length, key = 160, jax.random.key(0)

    @jax.jit
    def learnt(params, batch):
        def loss(params):
            prepared, norms = objective.prepare(batch, key, 0, False)
            value, metrics = objective.loss(params, prepared, key, norms, False)
            return value * norms, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    packed = ExampleRows(part.encoded, length, pad_id=0)
    alone = [ExampleRows([example], length, pad_id=0).rows(np.arange(1)) for example in part.encoded]
    rows_of = {
        "packed": packed.rows(np.append(np.arange(len(packed)), [-1] * (len(alone) - len(packed)))),
        "alone": {name: np.concatenate([row[name] for row in alone]) for name in alone[0]},
    }
    assert len(packed) < len(alone)
    together, apart = (learnt(params, rows_of[name]) for name in ("packed", "alone"))
    close(together, apart)
    total = sum(float(np.sum(example.of_tokens["loss_weights"])) for example in part.encoded)
    assert float(together[0][1]["loss"][1]) == total


def test_rows_are_no_longer_than_a_few_examples_need():
    assert row_length([30] * 100, 512, 4) == 512 and row_length([30] * 100, 1024, 4) == 752
    assert row_length([30] * 4, 512, 4) == 32 and row_length([100, 5, 5], 64, 8) == 64


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("instruct")
    rows = [chat(country, city) for country, city in CAPITALS.items()]
    write_run(root / "decoder", MODEL, TEXTS, vocabulary=330)
    return root, write_jsonl(root / "train.jsonl", rows * 4), write_jsonl(root / "validation.jsonl", rows)


def config_for(there, run_dir, **changes) -> InstructConfig:
    root, train, validation = there
    defaults = dict(
        init_from=str(root / "decoder"),
        run_dir=str(run_dir),
        steps=120,
        batch_size=8,
        eval_every=120,
        show=1,
        data=InstructData(train=(train,), validation=(validation,), max_new_tokens=8, max_length=64),
        optimizer=FinetuneOptimizer(learning_rate=2e-2),
        checkpoint=CheckpointConfig(every=1000),
        mesh=MeshConfig(1, 1, 1),
    )
    return InstructConfig(**defaults | changes)


def test_a_decoder_learns_to_answer_and_others_load_it(there, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = main(config_for(there, tmp_path / "whole", export=str(tmp_path / "exported")))
    metrics = summary["metrics"]
    assert metrics["accuracy"] == 1.0 and metrics["perplexity"] < 1.2 and metrics["answers"] == 6
    assert metrics["chrf"] == metrics["rougeL"] == 100.0 and metrics["baseline_chrf"] < 20
    out = capsys.readouterr().out
    assert "train.jsonl: chats in 'messages'" in out and "train.jsonl:1: " in out and "[<|endoftext|>]" in out
    predictions = [json.loads(line) for line in (tmp_path / "whole/predictions.jsonl").read_text().splitlines()]
    assert [(row["prediction"], row["reference"]) for row in predictions] == [
        (city, city) for city in CAPITALS.values()
    ]
    assert "北京" in (tmp_path / "whole/report.html").read_text()

    # From Python, and by transformers from the exported files, the template included.
    model = espalier.load(tmp_path / "whole")
    question = "中国"
    assert model.generate(question) == model.generate([[{"role": "user", "content": question}]]) == ["北京"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(ids["input_ids"][0]) == render(model.tokenizer, messages, invite=True)
    with torch.no_grad():
        written = theirs.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == "北京"


def test_a_decoder_that_was_not_tuned_is_measured(there):
    """By the default chat template, and by one of fields; the loss is that of each answer in a row of its own."""
    root, _, validation = there
    model = espalier.load(root / "decoder")
    chats = measure(model, InstructData(validation=(validation,), answers=2, max_new_tokens=4, max_length=64))
    assert chats.metrics["loss"] > 4 and len(chats.rows) == chats.metrics["answers"] == 2
    assert model.tokenizer.chat_template is None
    rows = [{"a": "Peru", "b": "Lima"}, {"a": "中国", "b": "北京"}]
    pairs = write_jsonl(root / "pairs.jsonl", rows)
    data = InstructData(validation=(pairs,), template="{a} = {b}", answers=2, beams=2, max_new_tokens=4, max_length=64)
    found = measure(model, data)
    assert [row["prompt"] for row in found.rows] == [{"a": "Peru"}, {"a": "中国"}]
    total, count = 0.0, 0
    for row in rows:
        prompt, whole = (model.tokenizer.encode(text) for text in (f"{row['a']} =", f"{row['a']} = {row['b']}"))
        bos = model.tokenizer.bos_token_id
        scores = jax.nn.log_softmax(model.logits({"input_ids": np.array([[bos, *whole]])}))[0]
        labels = [*whole, bos][len(prompt) :]
        total -= sum(float(scores[len(prompt) + at, label]) for at, label in enumerate(labels))
        count += len(labels)
    assert found.metrics["tokens"] == count and found.metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_run_that_pauses_and_changes_its_mesh_learns_as_one_that_does_not(there, tmp_path):
    """Steps 1 to 3 on one device, the rest on eight, against all on eight."""
    data = dataclasses.replace(config_for(there, "").data, answers=0)
    few = dict(steps=6, log_every=1, eval_every=6, data=data)
    whole = main(config_for(there, tmp_path / "whole", **few, mesh=MeshConfig(2, 2, 2)))
    main(config_for(there, tmp_path / "parts", **few, stop_at=3))
    parts = main(config_for(there, tmp_path / "parts", **few, mesh=MeshConfig(2, 2, 2)))

    def losses(run):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    assert len(losses("whole")) == 6 and losses("parts") == pytest.approx(losses("whole"), rel=1e-4)
    assert parts["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-4)
    assert "answers" not in whole["metrics"]


def test_what_ends_an_answer_ends_a_text_of_the_exported_model(there, tmp_path):
    """A base model ends texts by its own token, and learns to end answers by that of the template."""
    from espalier.commands.convert import ExportConfig, export_model
    from espalier.models.hub import save_pretrained

    root = there[0]
    base = espalier.load(root / "decoder")
    tokenizer = base.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|pad|>")
    save_pretrained(tmp_path / "base", base.config, base.params, tokenizer)
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|pad|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    data = dataclasses.replace(config_for(there, "").data, answers=2, chat_template=str(tmp_path / "chat.jinja"))
    changes = dict(init_from=f"hf:{tmp_path}/base", steps=2, eval_every=2, data=data, export=str(tmp_path / "once"))
    main(config_for(there, tmp_path / "run", **changes))
    export_model(ExportConfig(str(tmp_path / "run"), str(tmp_path / "again")))
    for folder in ("once", "again"):
        values = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert values["eos_token_id"] == [tokenizer.eos_token_id, end]
        assert espalier.load(f"hf:{tmp_path / folder}").tokenizer.chat_template == (tmp_path / "chat.jinja").read_text()


def test_an_encoder_is_refused(there, tmp_path):
    from tiny_models import BERT

    write_run(tmp_path / "encoder", BERT, TEXTS)
    with pytest.raises(UserError, match="names an encoder .* name a decoder"):
        main(config_for(there, tmp_path / "run", init_from=str(tmp_path / "encoder")))
    assert not (tmp_path / "run").exists()


def test_show_marks_what_stands_in_no_text():
    class Named:
        def convert_ids_to_tokens(self, index):
            return {1: "<s>", 2: "</s>"}[index]

    example = Example([1, 7, 8, 2], [0] * 4, np.array([(-1, -1), (0, 2), (2, 4), (-1, -1)]), of_tokens={
        "loss_weights": np.array([0, 0, 1, 1.0])})  # fmt: skip
    item = Item("f:1", {"a": "ab"}, "ab", "cd", Chat("abcd", [(2, 4)]))
    assert shown(item, example, Named()).split("\n")[1].strip() == "<s>│ab[cd][</s>]"
