"""The command line of generation: where prompts come from, what is printed, what is refused."""

import json

import pytest
from tiny_models import BERT, LLAMA
from tiny_runs import write_run

import clm.generate
from clm.generate import GenerateConfig, SamplingConfig, main, read_prompts
from espalier.errors import UserError

TEXTS = ["To be, or not to be, that is the question.", "机器学习是人工智能的一个分支。"] * 9
SHORT = SamplingConfig(max_new_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("generate") / "run", LLAMA, TEXTS)


def test_prompts_come_from_the_line_or_a_file(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n二\n\n", encoding="utf-8")
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}, {"source": "c", "lines": "d"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(GenerateConfig("run", prompt=("x", ""))) == ["x", ""]
    assert read_prompts(GenerateConfig("run", prompt_file=str(tmp_path / "lines.txt"))) == ["one", "二", ""]
    read = read_prompts(GenerateConfig("run", prompt_file=str(tmp_path / "rows.jsonl")))
    assert read == ["a", [{"role": "user", "content": "b"}], {"source": "c", "lines": "d"}]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: no prompt: a row has prompt or messages"):
        read_prompts(GenerateConfig("run", prompt_file=str(tmp_path / "bad.jsonl")))
    with pytest.raises(UserError, match="both given; give one"):
        GenerateConfig("run", prompt=("x",), prompt_file="f")


def test_what_is_streamed_is_what_is_printed_at_once(decoder, capsys):
    config = GenerateConfig(str(decoder), prompt=("To be",), sampling=SHORT)
    whole = main(config)
    out = capsys.readouterr().out
    assert f"To be{whole['completions'][0]}\n" in out and "tokens/s" in out
    pieces = main(GenerateConfig(str(decoder), prompt=("To be",), sampling=SHORT, stream=True))
    assert pieces["completions"] == whole["completions"]
    out = capsys.readouterr().out
    assert f"To be{whole['completions'][0]}\n" in out and "tokens/s" in out


def test_an_interrupt_ends_the_line(decoder, capsys, monkeypatch):
    from espalier.predict import generate

    def interrupted(*given):
        yield "half", 1
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(GenerateConfig(str(decoder), stream=True))
    assert capsys.readouterr().out.endswith("half\n")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": -1.0}, "out of range"),
        ({"top_p": 0.0}, "out of range"),
        ({"max_new_tokens": 0}, "out of range"),
        ({"repetition_penalty": 0.0}, "out of range"),
        ({"beams": 0}, "out of range"),
        ({"beams": 2, "temperature": 0.5}, "give one of the two"),
        ({"stop": ("",)}, "an empty text"),
    ],
)
def test_bad_sampling_is_refused(bad, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**bad)


def test_what_writes_no_text_is_refused(decoder, tmp_path):
    encoder = write_run(tmp_path / "encoder", BERT, TEXTS)
    with pytest.raises(UserError, match="holds a model of task 'masked_lm', which does not generate text"):
        clm.generate.load_decoder(str(encoder))
    with pytest.raises(UserError, match="no chat template; give a text"):
        main(GenerateConfig(str(decoder), prompt=("x",), chat=True))


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="holds bytes that are not valid text"):
        GenerateConfig("run", prompt=("caf\udce9",))
