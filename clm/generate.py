"""Text from a decoder: `python -m clm.generate RUN --prompt "…" "…"`.

The command line; prompts become tokens and tokens text in `espalier.predict.generate`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from espalier import cli, progress
from espalier.errors import UserError
from espalier.predict.sampling import SAMPLED, SamplingConfig, UnmaskingConfig

if TYPE_CHECKING:
    from espalier.predict.generate import Prompt
    from espalier.predict.loaded import LoadedModel


@dataclass(frozen=True)
class GenerateConfig:
    """Generate text with a run of clm, finetune instruct or mlm diffusion-…, or a decoder in Hugging Face format."""

    run_dir: str
    """Run directory, or hf:PATH_OR_ID."""
    prompt: tuple[str, ...] = ("",)
    """One or more beginnings; an empty one starts from nothing. Of a run tuned on chats: what the user says."""
    prompt_file: str | None = None
    """File with a prompt a line, or .jsonl with prompt, messages, or the fields of the template of the run."""
    chat: bool = False
    """Put each prompt as the user's turn into the chat template of the tokenizer; runs tuned on chats always do."""
    stream: bool | None = None
    """Show each word as it is drawn; unset = on a terminal, where there is one prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    unmasking: UnmaskingConfig = field(default_factory=UnmaskingConfig)
    json: bool = False
    """Print one JSON object with prompts and completions as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self):
        if not self.prompt:
            raise UserError('--prompt needs a text, for instance --prompt "Once upon a time"; leave it out for none')
        if self.prompt_file is not None and self.prompt != ("",):
            raise UserError("--prompt and --prompt-file are both given; give one")
        for text in self.prompt:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(
                    f"--prompt {ascii(text)} holds bytes that are not valid text; write it in UTF-8, with LANG=C.UTF-8"
                )


def main(config: GenerateConfig) -> dict:
    """Load the newest checkpoint of the run and print a completion for every prompt."""
    from espalier.predict import unmask
    from espalier.predict.generate import generate

    prompts = read_prompts(config)
    with progress.waiting("loading the model"):
        model = load_decoder(config.run_dir, config.unmasking)
    unmasks = model.head == "masked_lm"
    if unmasks:
        if config.chat or config.stream:
            raise UserError("--chat and --stream are of decoders; this model writes by unmasking, all at once")
        generate = functools.partial(unmask.unmask, config=config.unmasking)
    if config.chat:
        prompts = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    if not unmasks:
        _say_ignored(model, config.sampling)
    streamed = config.stream if config.stream is not None else sys.stdout.isatty() and len(prompts) == 1
    streamed = streamed and not unmasks
    if streamed:
        completions = [_streamed(model, prompt, config.sampling) for prompt in prompts]
    else:
        began, drawn = time.perf_counter(), 0

        def said(done: int, tokens: int) -> None:
            nonlocal drawn
            drawn = tokens
            far(f"{done:,} of {len(prompts):,} prompts")

        with progress.waiting("continuing the text") as far:
            completions = generate(model, prompts, config.sampling, said=said)
        for prompt, completion in zip(prompts, completions, strict=True):
            print(f"{'─' * 60}\n{_harmless(shown(prompt) + completion)}")
        _say_speed(drawn, time.perf_counter() - began, " with compiling")
    return {"prompts": prompts, "completions": completions, "run_dir": config.run_dir}


def read_prompts(config: GenerateConfig) -> list[Prompt]:
    """The prompts of the command line or of the file. UserError where a line of it will not do."""
    if config.prompt_file is None:
        return list(config.prompt)
    from espalier.data.tables import read_table, read_text
    from espalier.predict.generate import prompt_of

    path = os.path.expanduser(config.prompt_file)
    if not path.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")):
        lines = read_text(path).text.removesuffix("\n").split("\n")
        if lines == [""]:
            raise UserError(f"{path} is empty; write a prompt a line")
        return list(lines)
    prompts = []
    for record in read_table(path).records:
        try:
            prompts.append(prompt_of(dict(zip(record.columns, record.values, strict=True))))
        except UserError as error:
            raise UserError(f"{record.name}: {error}") from error
    return prompts


def load_decoder(source: str, unmasking: UnmaskingConfig | None = None) -> LoadedModel:
    """The model of a run or of hf:…, computing in the type that is fast here. UserError where it writes no text.

    unmasking: what was asked of a model of masked diffusion.
    """
    from espalier.loading import load
    from espalier.models.config import Execution
    from espalier.predict import unmask

    model = load(source)
    by_unmasking = unmasking is not None and unmask.writes(model, unmasking)
    if model.head != "masked_lm" and unmasking is not None and unmasking != UnmaskingConfig():
        raise UserError("--unmasking.steps and order are of masked diffusion, and this is none; leave them out")
    if model.head not in ("causal_lm", "seq2seq_lm") and not by_unmasking:
        raise UserError(
            f"{source} holds a model of task {model.saved.get('task') or model.head!r}, which does not generate text; "
            "give the run directory of a `clm` run or of `mlm diffusion-…`, or a decoder"
        )
    return dataclasses.replace(model, execution=Execution())


def shown(prompt: Prompt) -> str:
    """A prompt before its completion: a text, or roles and fields by name."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        turns = [f"{message['role']}: {message['content']}\n" for message in prompt]
        return f"{''.join(turns)}assistant: "
    return f"{json.dumps(prompt, ensure_ascii=False)}\n"


def _streamed(model: LoadedModel, prompt: Prompt, sampling: SamplingConfig) -> str:
    """The completion, shown while it is written. Ctrl-C ends the line before it ends the command."""
    from espalier.predict.generate import stream

    print(f"{'─' * 60}\n{_harmless(shown(prompt))}", end="", flush=True)
    pieces, first, tokens, before = [], None, 0, 0
    try:
        for piece, tokens in stream(model, prompt, sampling):
            print(_harmless(piece), end="", flush=True)
            pieces.append(piece)
            if first is None:
                first, before = time.perf_counter(), tokens
    finally:
        print(flush=True)
    if first is not None and tokens > before:
        _say_speed(tokens - before, time.perf_counter() - first, " after the first")
    return "".join(pieces)


def _harmless(text: str) -> str:
    """On a terminal, without what would steer it; a file gets what the model wrote."""
    return progress.visible(text) if sys.stdout.isatty() else text


def _say_speed(tokens: int, seconds: float, what: str) -> None:
    progress.say(f"{tokens:,} tokens in {seconds:.1f} s{what}: {tokens / max(seconds, 1e-9):,.1f} tokens/s")


def _say_ignored(model: LoadedModel, sampling: SamplingConfig) -> None:
    """What of the model's generation_config.json is applied, and what is not."""
    from espalier.models.published import Published
    from espalier.predict.generate import way_of

    way = way_of(model, sampling)
    if Published.beside(model.saved) and (way.config != sampling or way.ignored):
        values = (getattr(way.sampling, name) for name in SAMPLED)
        how = ", ".join(
            f"{name} {value:g}"
            for name, value in zip(SAMPLED, values, strict=True)
            if name != "repetition_penalty" or value != 1
        )
        but = f"; what it says of {', '.join(way.ignored)} is not applied" if way.ignored else ""
        progress.say(f"by the model's generation_config.json: {how}{but}")


if __name__ == "__main__":
    cli.run_config(main, GenerateConfig, prog="generate")
