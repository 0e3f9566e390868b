"""Tokenizers of `tokenizers` and `transformers`: load, save, compare, and find their special tokens."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from espalier.errors import UserError
from espalier.files import inside, sha256_of_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

WORDPIECE_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
BPE_SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
BPE_MASKED_LM_SPECIALS = BPE_SPECIALS | {"cls_token": "<|cls|>", "sep_token": "<|sep|>", "mask_token": "<|mask|>"}
SENTENCEPIECE_SPECIALS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
}


VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model")


class SpecialIds(NamedTuple):
    """Ids of the special tokens; cls and bos, sep and eos stand in for each other where a tokenizer has one of them."""

    pad: int
    cls: int | None
    sep: int | None
    mask: int | None
    bos: int | None
    eos: int | None
    all: tuple[int, ...]
    """Every special token of the tokenizer, sorted."""


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder (tokenizer.json, tokenizer_config.json) or a bare tokenizer.json; never the network.

    A folder with a model's config.json beside it is read as transformers does, with the special tokens of that model,
    and older files than tokenizer.json are taken too.
    """
    path = pathlib.Path(path).expanduser()
    folder = path.parent if path.name == "tokenizer.json" else path
    _check_names(folder)
    if path.is_dir() and (folder / "config.json").is_file() and has_tokenizer(folder):
        return _load_model_tokenizer(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer at {path}: expected tokenizer.json or a folder that holds one "
            "(in Python: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
        )
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust side raises plain Exception, from_pretrained many kinds
        raise UserError(f"{path} is no tokenizer that can be read: {' '.join(str(error).split())[:300]}") from error
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    known = (WORDPIECE_SPECIALS, BPE_MASKED_LM_SPECIALS, SENTENCEPIECE_SPECIALS)
    return wrap(backend, {name: text for specials in known for name, text in specials.items() if text in present})


def _check_names(folder: pathlib.Path) -> None:
    """UserError where tokenizer_config.json names files outside its folder, or templates by no name of a file.

    transformers reads the files, and writes the templates to files of their names. What it names of the machine where
    it was written is no harm if it is not here.
    """
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no JSON object")
    named = settings.get("fast_tokenizer_files") or []
    for name in named if isinstance(named, list) else [named]:
        inside(folder, name, path)
    for key, name in settings.items():
        if key.endswith("_file") and isinstance(name, str) and os.path.lexists(folder / name):
            inside(folder, name, path)
    templates = settings.get("chat_template")
    for template in templates if isinstance(templates, list) else []:
        name = template.get("name") if isinstance(template, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(
                f"{path} has a chat template called {str(name)[:100]!r}; a name has letters, digits, _ and -"
            )


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a folder in Hugging Face format holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def _load_model_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise UserError(f"{folder} has no tokenizer that can be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{folder} has a tokenizer without a fast form ({type(tokenizer).__name__}); save it once as tokenizer.json"
        )
    return tokenizer


def tokenizer_of(folder: str | os.PathLike, config: dict) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to saved weights; UserError unless it is the one that their config names.

    config: beside the weights; `fingerprints` only where they are those of a run. A vocabulary may have spare rows, and
    special tokens beyond its end (Gemma 3), which no text becomes.
    """
    tokenizer = load_tokenizer(folder)
    size, expected = vocabulary_size(tokenizer), config["model"]["vocab_size"]
    special = special_ids(tokenizer).all
    beyond = [index for index in range(expected, size) if index not in special]
    known = config.get("fingerprints", {}).get("tokenizer")
    if beyond or known and fingerprint(tokenizer) != known:
        found = f"{size:,} tokens" if size != expected else "other tokens"
        advice = "put back the tokenizer of that run" if known else "the two files do not belong together"
        raise UserError(f"{folder} has {found}, not the {expected:,} that the weights know; {advice}")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike, **more: object) -> None:
    """Write tokenizer.json and tokenizer_config.json, in the format that transformers 4 and 5 both load.

    more: further settings in tokenizer_config.json.
    Each file is replaced atomically, and a folder that already holds this tokenizer is left alone.
    """
    folder = pathlib.Path(folder)
    if (folder / "tokenizer.json").exists():
        with contextlib.suppress(UserError):
            there = load_tokenizer(folder)
            if fingerprint(there) == fingerprint(tokenizer) and there.chat_template == tokenizer.chat_template:
                return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
        tokenizer.save_pretrained(unfinished)
        path = pathlib.Path(unfinished, "tokenizer_config.json")
        settings = json.loads(path.read_text())
        # What a class of its own says, and the one named below would not.
        for name in ("padding_side", "truncation_side"):
            if getattr(tokenizer, name) != "right":
                settings[name] = getattr(tokenizer, name)
        # Version 5 writes the class name TokenizersBackend, which version 4 does not know; both know this one.
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | more
        for name in ("is_local", "local_files_only", "name_or_path"):  # of the machine that wrote it
            settings.pop(name, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        # tokenizer.json last: where it is, the others are.
        for path in sorted(pathlib.Path(unfinished).iterdir(), key=lambda path: path.name == "tokenizer.json"):
            os.replace(path, folder / path.name)


def framed_tokenizer(tokenizer: PreTrainedTokenizerFast, causal: bool) -> PreTrainedTokenizerFast:
    """A copy that puts the special tokens around one text or two as fine-tuning does (data.examples.encode_pairs).

    A decoder classifies by its last token, and transformers finds that by looking for padding: where padding is the
    end token too, another special token becomes padding; where there is none, no token (rows then go one by one).
    """
    specials = special_ids(tokenizer, need=("bos", "eos") if causal else ("cls", "sep"))
    first, between = (specials.bos, specials.eos) if causal else (specials.cls, specials.sep)
    framed = copy.deepcopy(tokenizer)
    assert first is not None and between is not None
    cls, sep = (str(tokenizer.convert_ids_to_tokens(index)) for index in (first, between))
    framed.backend_tokenizer.post_processor = template(framed.backend_tokenizer, cls, sep)
    if causal and tokenizer.pad_token_id in (None, between):
        others = [index for index in specials.all if index not in (first, between)]
        framed.pad_token = str(tokenizer.convert_ids_to_tokens(others[0])) if others else None
    return framed


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over what decides the ids of a text and its special tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calling a tokenizer with truncation or padding leaves these behind in its backend.
    content["truncation"] = content["padding"] = None
    encoded = json.dumps([content, special_ids(tokenizer)], sort_keys=True, ensure_ascii=False)
    return sha256_of_text(encoded)


def special_ids(tokenizer: PreTrainedTokenizerFast, need: tuple[str, ...] = ()) -> SpecialIds:
    """Ids of the special tokens. need: names in SpecialIds that the objective cannot do without."""

    def first(*names: str) -> int | None:
        found = (getattr(tokenizer, f"{name}_token_id") for name in names)
        return next((int(index) for index in found if index is not None), None)

    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    every = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    pad = first("pad", "eos", "sep")
    ids = SpecialIds(
        pad=0 if pad is None else pad,
        cls=first("cls", "bos", "eos"),
        sep=first("sep", "eos", "bos"),
        mask=first("mask"),
        bos=first("bos", "cls", "eos"),
        eos=first("eos", "sep", "bos"),
        all=tuple(sorted(int(index) for index in every)),
    )
    missing = [name for name in need if getattr(ids, name) is None]
    if missing:
        tokens = ", ".join(str(tokenizer.convert_ids_to_tokens(index)) for index in ids.all) or "none"
        raise UserError(
            f"the tokenizer has no {' and no '.join(missing)} token (its special tokens: {tokens}); take another one, "
            "or leave out --data.tokenizer to train one"
        )
    return ids


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """V: one more than the greatest id, added tokens included."""
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that turns text into tokens and nothing else: a literal "[SEP]" in the text is text, nothing is cut."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def pieces(text: str, limit: int = 20_000) -> Iterator[str]:
    """Cut a long text before blanks between letters, where no tokenizer joins what is on both sides.

    Tokenizers need memory in proportion to the length of their input. Without such a blank, any whitespace or, at
    worst, any place is taken.
    """
    start = 0
    while len(text) - start > limit:
        cut = end = start + limit
        while (cut := text.rfind(" ", start + 1, cut)) > 0:
            if text[cut - 1].isalnum() and text[cut + 1].isalnum():
                break
        if cut <= start:
            cut = next((at for at in range(end, start, -1) if text[at].isspace() and not text[at - 1].isspace()), end)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def wrap(backend: Tokenizer, specials: dict[str, str]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials)


def template(backend: Tokenizer, cls: str, sep: str):
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
