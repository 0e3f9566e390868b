"""Which tokens of a chat the assistant writes: in templates as models are published with, against transformers."""

import re

import numpy as np
import pytest

from espalier.data.chat import (
    Chat,
    chat_template,
    default_template,
    encode_chats,
    end_of_turn,
    messages_of,
    render,
    render_chat,
    template_from,
)
from espalier.data.text_template import encode_filled, filled, prompt_text, template_fields
from espalier.data.tokenizer import load_tokenizer, save_tokenizer
from espalier.data.train_tokenizer import train_tokenizer
from espalier.errors import UserError

TEXTS = ["user assistant system hello what is it?", "机器学习是人工智能的一个分支。"] * 9
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hello\n\n"},
    {"role": "assistant", "content": "机器学习是什么？"},
    {"role": "user", "content": "what is it? 🤖"},
    {"role": "assistant", "content": "it is\nuser"},
]
# With (( … )) around what the assistant writes: without them as published, or as {% generation %}.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "(({{ m.content + '<|im_end|>' }}))"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}(({{ m.content | trim + '<|eot_id|>' }})){% else %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}(({{ ' ' + m.content + ' ' + eos_token }})){% else %}"
    "{{ '<<SYS>>' + m.content + '<</SYS>>' }}{% endif %}{% endfor %}",
}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer_with(template: str | None = None):
    tokenizer = train_tokenizer(TEXTS, "bpe", 330, for_masked_lm=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return tokenizer


def marked(template: str, begin: str, end: str) -> str:
    return template.replace("((", begin).replace("))", end)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learnt_is_what_transformers_marks(name):
    """By rendered prefixes, and by {% generation %}: both are the mask of transformers on the template that marks."""
    with_marks = marked(TEMPLATES[name], "{% generation %}", "{% endgeneration %}")
    theirs = tokenizer_with(with_marks).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    for template in (with_marks, marked(TEMPLATES[name], "", "")):
        tokenizer = tokenizer_with(template)
        [example] = encode_chats(tokenizer, [render_chat(tokenizer, CHAT)])
        assert example.ids == theirs["input_ids"]
        assert np.asarray(example.of_tokens["loss_weights"]).tolist() == theirs["assistant_masks"]
        # What the model is asked in use is what stands before its answer.
        prompt = tokenizer.encode(render(tokenizer, CHAT[:-1], invite=True), add_special_tokens=False)
        assert prompt == example.ids[: len(prompt)] and example.of_tokens["loss_weights"][len(prompt)] == 1
        assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")


def test_the_default_template_needs_no_new_token_and_is_kept(tmp_path):
    tokenizer = tokenizer_with()
    before = len(tokenizer)
    tokenizer.chat_template = default_template(tokenizer)
    assert len(tokenizer) == before and end_of_turn(tokenizer) == tokenizer.eos_token_id
    chat = render_chat(tokenizer, CHAT)
    assert [chat.text[begin:end] for begin, end in chat.answers] == [
        "机器学习是什么？<|endoftext|>", "it is\nuser<|endoftext|>",
    ]  # fmt: skip
    assert chat.text.startswith("<|endoftext|><|system|>\nBe brief.\n<|user|>\n hello")
    save_tokenizer(tokenizer_with(), tmp_path / "there")
    save_tokenizer(tokenizer, tmp_path / "there")  # the same vocabulary, another template
    assert chat_template(load_tokenizer(tmp_path / "there")) == tokenizer.chat_template
    # A vocabulary of words that cannot spell the roles.
    words = train_tokenizer(["only plain words here"] * 9, "wordpiece", 300, for_masked_lm=True)
    with pytest.raises(UserError, match=r"no token for a part of '<\|system\|>'"):
        default_template(words)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (TEMPLATES["chatml"], CHAT[:2], r"without an assistant's turn has .* \(its roles: system, user"),
        ("{{ raise_exception('only users here') }}", CHAT, "does not take this chat .*: only users here"),
        ("{% for m in messages %}{{ m.content.nothing.more }}{% endfor %}", CHAT, "does not take this chat"),
        # As Qwen 3: thoughts are kept in the last answer alone.
        (
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
            "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            CHAT,
            "writes turn 3 in another way when more follows",
        ),
        # As R1's: it invites to a thought that answers do not have.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: <think>{% endif %}",
            CHAT,
            "does not begin turn 3, the assistant's, as it invites it",
        ),
    ],
)  # fmt: skip
def test_a_template_in_which_the_answers_cannot_be_told_is_refused(template, chat, message):
    tokenizer = tokenizer_with(marked(template, "", ""))
    with pytest.raises(UserError, match=message) as caught:
        render_chat(tokenizer, chat)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "x:1: messages are a list .* this is text"),
        ([], "an empty list"),
        (["hello"], "x:1, message 1 is text"),
        ([{"role": "user"}], "x:1, message 1 needs 'role' and 'content', both text; it has 'role'"),
        ([{"role": "user", "content": None}], "its content is null"),
    ],
)
def test_messages_that_are_none_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        messages_of(value, "x:1")


def test_messages_of_other_forms_are_read():
    assert messages_of([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "x") == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of([{"role": "user", "content": parts}], "x") == [{"role": "user", "content": "ab"}]


def test_a_template_file_is_checked(tmp_path):
    (tmp_path / "good.jinja").write_text("{% generation %}{{ messages }}{%- endgeneration -%}")
    (tmp_path / "bad.jinja").write_text("\n{% for m in %}")
    assert "generation" in template_from(str(tmp_path / "good.jinja"))
    with pytest.raises(UserError, match=re.escape("bad.jinja:2: ")):
        template_from(str(tmp_path / "bad.jinja"))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        template_from(str(tmp_path / "none.jinja"))


@pytest.mark.parametrize("template", ["{source} = {target}", "Q: {source}\nA: {target}\n", "{source}{target}。"])
def test_the_answer_in_a_template_begins_with_its_blank(template):
    """So that the prompt's tokens are those that stand before the answer in training."""
    tokenizer = tokenizer_with()
    texts = {"source": "hello what", "target": "机器 学习"}
    chat = filled(template, texts)
    assert chat.text == template.format(**texts) and template_fields(template) == ["source", "target"]
    [(begin, end)] = chat.answers
    assert chat.text[:begin] == prompt_text(template, texts) and end == len(chat.text)
    assert chat.text[begin:].lstrip(" ").startswith("机器 学习")
    [example] = encode_filled(tokenizer, [chat])
    weights = np.asarray(example.of_tokens["loss_weights"])
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(chat.text[:begin], add_special_tokens=False)]
    assert example.ids[: len(prompt)] == prompt and not weights[: len(prompt)].any() and weights[len(prompt) :].all()
    assert example.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["{target}", "no fields", "{} = {}", "{a"])
def test_a_template_that_asks_for_nothing_is_refused(template):
    with pytest.raises(UserError, match="try '{source} = {target}'"):
        template_fields(template)


def test_special_tokens_in_texts_of_a_template_are_text():
    tokenizer = tokenizer_with()
    [example] = encode_filled(tokenizer, [Chat("a<|endoftext|>b", [(1, 15)])])
    assert example.ids.count(tokenizer.eos_token_id) == 2  # its ends
