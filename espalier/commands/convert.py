"""To and from Hugging Face format: `./launch.sh import SRC DST` and `./launch.sh export RUN DST`.

An imported model is a run directory with one checkpoint at step 0, from which any training starts (--init-from DST).
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from espalier import cli, progress
from espalier.errors import UserError

if TYPE_CHECKING:
    from espalier.models.config import ModelConfig


@dataclass(frozen=True)
class ImportConfig:
    """Import a model in Hugging Face format: `import SRC DST`."""

    source: str
    """A folder with config.json, model.safetensors and a tokenizer, or the name of a repository on the Hub."""
    run_dir: str
    """The new run directory; `mlm`, `clm` and `finetune` start from it with --init-from, `generate` reads it."""
    head: str | None = None
    """Which head to take (masked_lm, causal_lm, …, embedding = none); unset = that of the file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    adapter: str | None = None
    """An adapter of PEFT (LoRA), to be merged into the weights: a folder, or the name of a repository on the Hub."""
    add_tokens: str | None = None
    """Tokens of a domain that join the vocabulary: a text file, one a line. Each begins as the mean of its pieces."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ExportConfig:
    """Write the model of a run in Hugging Face format: `export RUN DST`."""

    run_dir: str
    """The run directory."""
    destination: str
    """The new folder, which `AutoModel` and `pipeline` load."""
    step: int | None = None
    """Which checkpoint; unset = the best where the run keeps it (--keep-best), else the newest."""
    adapter: bool = False
    """Of a run with --lora: write the adapter alone, in the format of PEFT. Without, it is merged into the weights."""
    base: str | None = None
    """With --adapter: what it names as its base model; unset = the --init-from of the run."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the weights are written in; unset = as the model was when it was imported, else float32."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""


@progress.waiting("importing")
def import_model(config: ImportConfig) -> dict:
    """Check everything, then write the run directory as a whole; returns the `--json` object."""
    from pathlib import Path

    import jax

    from espalier.data.added_tokens import add_tokens
    from espalier.data.tokenizer import fingerprint, save_tokenizer, tokenizer_of
    from espalier.files import appearing, write_json
    from espalier.models.counts import count_params
    from espalier.models.hub import Pretrained, check_new, load_pretrained
    from espalier.models.published import published_beside, vocabulary_fingerprint
    from espalier.models.repository import PREFIX
    from espalier.models.sentence_transformers import read_modules
    from espalier.models.vocabulary import grown
    from espalier.training.checkpoint import save_params
    from espalier.training.run import RunDirectory

    target = RunDirectory(config.run_dir).path
    check_new(target)
    source = Pretrained(config.source, config.revision)
    head = config.head or source.head
    tokenizer = tokenizer_of(source.tokenizer_folder, source.config)
    model, params, _ = load_pretrained(source.folder, head)
    if config.adapter:
        from espalier.models.peft import read_adapter

        params = read_adapter(config.adapter, model, head, params)
    published, also = published_beside(source.config), ""
    if config.add_tokens:
        assert tokenizer is not None
        added = add_tokens(tokenizer, config.add_tokens)
        model, params = grown(model, params, added.pieces)
        if published.get("published"):
            # The special tokens are where they were.
            published["published"] = published["published"] | {"vocabulary": vocabulary_fingerprint(tokenizer)}
        also = f" with {len(added.pieces)} tokens of {config.add_tokens}"
        there = f"; {len(added.known)} are there already" if added.known else ""
        progress.say(f"{len(added.pieces)} tokens added, {model.vocab_size:,} in the vocabulary{there}")
    given = config.source.removeprefix(PREFIX)
    named = given if Path(given).expanduser().exists() else PREFIX + given
    saved = {
        "task": head,
        "model": asdict(model),
        "labels": list(model.labels),
        "fingerprints": {"tokenizer": fingerprint(tokenizer)},
        **published,
        **read_modules(source.folder),
        "imported_from": named
        + (f" at {config.revision}" if config.revision else "")
        + (f" with the adapter {config.adapter}" if config.adapter else "")
        + also,
    }
    with appearing(target) as folder:
        run = RunDirectory(folder)
        save_tokenizer(tokenizer, run.tokenizer)
        save_params(run.checkpoints, jax.block_until_ready(params), saved)
        write_json(run.config, saved)
    parameters = count_params(model, head)
    progress.say(f"{config.source}: {model.model_type} with head {head}, {parameters / 1e6:,.1f} million parameters")
    progress.say(f"imported to {config.run_dir}; start from it with --init-from {config.run_dir}")
    return {"run_dir": str(target), "head": head, "model_type": model.model_type, "parameters": parameters}


@progress.waiting("exporting")
def export_model(config: ExportConfig) -> dict:
    """Write the folder as a whole; returns the `--json` object."""
    from espalier.data.chat import end_of_turn
    from espalier.data.tokenizer import framed_tokenizer, tokenizer_of
    from espalier.loading import FRAMED
    from espalier.models.config import ModelConfig
    from espalier.models.hub import check_export, save_pretrained
    from espalier.models.pretrained import beside_of, part_of
    from espalier.models.published import Published
    from espalier.models.sentence_transformers import module_files
    from espalier.report.card import model_card
    from espalier.training.fallback import given_step
    from espalier.training.frozen import restore_model
    from espalier.training.restore import read_config
    from espalier.training.run import RunDirectory, tuned_file

    run = RunDirectory(config.run_dir)
    step = given_step(run.path) if config.step is None else config.step
    saved = read_config(run.path, step)
    if "task" not in saved:
        raise UserError(f"{run.path} holds no run of mlm, clm or finetune; name a run directory with a checkpoint")
    model, head = ModelConfig.from_dict(saved["model"]), saved.get("head", saved["task"])
    if config.adapter:
        return _export_adapter(config, step, saved, model, head)
    tokenizer = tokenizer_of(run.tokenizer, saved)
    published = Published.beside(saved)
    if head in FRAMED and "imported_from" not in saved:
        tokenizer = framed_tokenizer(tokenizer, model.causal)
        if published and model.causal:
            published = published.padded_by(tokenizer)
    check_export(config.destination, model, head, tokenizer, published, beside=beside_of(None, saved))
    if published and saved["task"] == "instruction_tuning" and not saved["data"]["template"]:
        published = published.ended_by(end_of_turn(tokenizer))
    params = restore_model(run.path, step=step)
    dtype = config.dtype or (published.dtype if published else "float32")
    card = model_card(run.path)
    also = module_files(saved, model.hidden_size) | tuned_file(run)
    save_pretrained(
        *(config.destination, model, part_of(params, saved), tokenizer),
        head=head,
        card=card,
        dtype=dtype,
        published=published,
        also=also,
        beside=beside_of(params, saved),
    )
    progress.say(f"exported to {config.destination}: {head} of type {model.model_type}, {dtype}, step {step}")
    return {"path": config.destination, "head": head, "model_type": model.model_type, "dtype": dtype, "step": step}


def _export_adapter(config: ExportConfig, step: int, saved: dict, model: ModelConfig, head: str) -> dict:
    from pathlib import Path

    from espalier.models.hub import check_new
    from espalier.models.peft import save_adapter
    from espalier.models.repository import PREFIX
    from espalier.report.card import model_card
    from espalier.training.frozen import restore_complete

    lora = saved.get("lora") or {}
    if not lora.get("rank"):
        raise UserError(f"{config.run_dir} was trained without adapters (--lora.rank); leave out --adapter")
    check_new(Path(config.destination).expanduser())
    base = config.base or str(saved["init_from"]).removeprefix(PREFIX)
    settings = {name: lora[name] for name in ("rank", "alpha", "rslora", "dropout")}
    params = restore_complete(config.run_dir, step=step)
    save_adapter(config.destination, model, head, params, base, card=model_card(Path(config.run_dir)), **settings)
    progress.say(f"exported the adapter of step {step} to {config.destination}: PEFT puts it on {base}")
    return {"path": config.destination, "head": head, "model_type": model.model_type, "base": base, "step": step}


if __name__ == "__main__":
    direction = sys.argv[1] if len(sys.argv) > 1 else ""
    if direction == "import":
        cli.run_config(import_model, ImportConfig, prog="import", argv=sys.argv[2:])
    elif direction == "export":
        cli.run_config(export_model, ExportConfig, prog="export", argv=sys.argv[2:])
    else:
        sys.exit("usage: ./launch.sh import|export …; `import --help` and `export --help` say more")
