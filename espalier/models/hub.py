"""Import and export of Hugging Face folders: config.json, model.safetensors, tokenizer.json, a model card.

    config, params, tokenizer = load_pretrained("bert-base-uncased")
    save_pretrained("exported", config, params, tokenizer)

Files from outside are data, never code: no pickles, no remote code, no file outside its folder. Everything is checked
from headers before a weight is read, and a folder is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from espalier.errors import UserError
from espalier.files import appearing, read_json
from espalier.models import tensor_files
from espalier.models.config import ModelConfig
from espalier.models.families import family_of
from espalier.models.heads import bare_head, has_pooler
from espalier.models.hf_config import (
    CLASSIFIERS,
    config_values,
    published_config,
    read_config,
    to_hf,
    to_ours,
)
from espalier.models.placement import place
from espalier.models.published import Published, generation_values, vocabulary_fingerprint
from espalier.models.repository import local_folder, revision_of
from espalier.models.tensor_files import TensorFiles, write_tensors
from espalier.models.weight_map import (
    Tensor,
    export,
    known_names,
    leaves_of,
    param_shapes,
    parts_by_path,
    plain_name,
    tensors_of,
    tree_of,
)
from sharding.rules import shard_params

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"


def load_pretrained(
    path_or_id: str | os.PathLike, head: str | None = None, revision: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict, PreTrainedTokenizerFast | None]:
    """(config, params, tokenizer) of a folder in Hugging Face format, or of a repository on the Hub.

    head: a name in models.heads.HEADS; default: that of the file. revision: branch, tag or commit on the Hub. mesh:
    where the float32 parameters are laid out by sharding/rules.py; default: the first device. Raises UserError where
    the files are not supported. The tokenizer is None where the folder has none.
    """
    source = Pretrained(path_or_id, revision)
    head = head or source.head
    config = source.config_for(head)
    shapes = source.shapes(head)
    if mesh is None:
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        layout = jax.tree.map(lambda _: where, shapes)
    else:
        layout = shard_params(shapes, mesh)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    tokenizer = source.tokenizer()
    return config, source.read(head, abstract), tokenizer


def save_pretrained(
    path: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    head: str | None = None,
    card: str | None = None,
    dtype: str | None = None,
    published: Published | None = None,
    also: Mapping[str, Any] | None = None,
    beside: Mapping[str, Export] | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModel*.from_pretrained` and `pipeline` load without remote code.

    params: as trained or loaded. head: which class is to load them (models.heads.HEADS); default: by the parameters,
    and for those of a decoder without any of its own, a language model. card: the text of README.md. dtype: float32,
    bfloat16 or float16, in which the weights are written, in files of about shard_bytes. published: the files that the
    model comes from (Pretrained.published); what nothing has changed is written as it stood there, and dtype is theirs
    unless it is given; else float32. also: further files, path → JSON value. beside: further models, each in a
    folder of this name within. The folder must be new or empty; it appears whole. UserError where the architecture is
    not that of a class in transformers.
    """
    head = head or head_of(config, params)
    dtype = dtype or (published.dtype if published else "float32")
    hf = to_hf(config, head, tokenizer, dtype, published)
    tensors = _complete_tensors(config, head, params)
    path = Path(path).expanduser()
    check_new(path)
    with appearing(path) as folder:
        _write_values(folder / "config.json", config_values(hf, config, published))
        writes = head in ("causal_lm", "seq2seq_lm")
        if writes and (generation := generation_values(published, tokenizer)) is not None:
            start = {"decoder_start_token_id": config.decoder_start_token_id} if config.num_decoder_layers else {}
            _write_values(folder / GENERATION, generation | start)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder, config, published)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        for name, values in (also or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            _write_values(folder / name, values)
        write_tensors(folder, export(tensors, params), dtype, shard_bytes)
        for name, one in (beside or {}).items():
            how: Any = dict(head=one.head, dtype=dtype, shard_bytes=shard_bytes)
            save_pretrained(folder / name, one.config, one.params, tokenizer, **how)


class Export(NamedTuple):
    """A model that is written beside another."""

    config: ModelConfig
    params: Any
    """None where only the settings are known yet."""
    head: str


class Pretrained:
    """A folder in Hugging Face format, checked and opened; of the weights only the headers have been read.

    Also what a run may start from (training.start.Origin).
    """

    resumed, done = False, 0

    def __init__(self, path_or_id: str | os.PathLike, revision: str | None = None):
        self.name = str(path_or_id)
        self.folder = self.tokenizer_folder = local_folder(path_or_id, revision)
        self._hf, self._config = read_config(self.folder)
        self._family = family_of(self._hf.model_type)
        self._files = TensorFiles(self.folder)
        self._views: dict[str, Any] = {}
        for name, view in self._files.items():
            plain = plain_name(self._family, name)
            if plain in self._views:
                raise UserError(f"{self.folder} holds {plain} twice, with and without a prefix; keep one of them")
            self._views[plain] = view
        self.head = self._own_head()

    @property
    def config(self) -> dict:
        """JSON values, as they stand beside the weights of a run."""
        return {
            "task": self.head,
            "model": dataclasses.asdict(self.config_for(self.head)),
            "published": dataclasses.asdict(self.published),
        }

    @property
    def revision(self) -> str:
        """Its name, and the commit on the Hub or the SHA-256 of its files."""
        return f"{self.name} at {revision_of(self.folder)}"

    @functools.cached_property
    def published(self) -> Published:
        """What an export of this model, or of one that was trained from it, is to say as well."""
        generation, tokenizer = self.folder / GENERATION, self.tokenizer()
        values = read_json(self.folder / "config.json")
        # In the tensors, for config.json often names the type in which they were trained.
        kinds = {
            view.dtype.name
            for name, view in self._files.items()
            if view.dtype in tensor_files.DTYPES.values() and not re.search(self._family.ignored, name)
        }
        return Published(
            config={name: value for name, value in values.items() if name != "auto_map"},
            generation_config=read_json(generation) if generation.is_file() else None,
            dtype=kinds.pop() if len(kinds) == 1 else "float32",
            vocabulary=None if tokenizer is None else vocabulary_fingerprint(tokenizer),
        )

    def restore_params(self, abstract: dict) -> dict:
        """The parameters, laid out as `abstract` says; it may leave out the head."""
        return self.read(head_of(self._config, abstract), abstract)

    def config_for(self, head: str) -> ModelConfig:
        """The model with this head; UserError if the file has no such head."""
        if head not in self._family.classes and head != "embedding":
            raise UserError(
                f"a model of type {self._config.model_type} has no head {head!r}; it may have "
                f"{', '.join(self._family.classes)}"
            )
        if head in CLASSIFIERS:
            labels = tuple(str(self._hf.id2label[number]) for number in sorted(self._hf.id2label))
            return dataclasses.replace(self._config, labels=labels, problem_type=self._hf.problem_type)
        return self._config

    def shapes(self, head: str) -> dict:
        """ShapeDtypeStructs of the parameters with this head; the optional pooler only where the file has one."""
        shapes = param_shapes(self.config_for(head), head)
        if head == "embedding" and has_pooler(self._config) and not self._holds(head):
            del shapes["head"]
        return shapes

    def read(self, head: str, abstract: dict) -> dict:
        """The parameters, laid out as `abstract` says (ShapeDtypeStructs with shardings).

        UserError lists every tensor that is missing, not expected, or of another shape or type.
        """
        if head not in ("embedding", "causal_lm", bare_head(self._config)) and not self._holds(head):
            advice = (
                f"but {self.head}; leave the head out to take that one" if head != self.head else "as its config says"
            )
            raise UserError(f"{self.folder} has no head {head}, {advice}")
        self._check_shapes(head, abstract)
        tensors = tensors_of(self._family, self.config_for(head), head, abstract)
        views, faults = {}, []
        for tensor in tensors:
            names = [plain_name(self._family, name) for name in (tensor.name, *tensor.also, *tensor.copies)]
            view = next((self._views[name] for name in names if name in self._views), None)
            if view is None:
                faults.append(f"{tensor.name} is missing")
            elif view.shape != tensor.shape or view.dtype not in tensor_files.DTYPES.values():
                faults.append(f"{tensor.name} is {view.dtype} {view.shape}, expected {tensor.shape}")
            else:
                views[tensor.name] = view
        known = known_names(self._family, self._config)
        for name in self._files:
            if plain_name(self._family, name) not in known and not re.search(self._family.ignored, name):
                faults.append(f"{name} is not expected")
        if faults:
            raise UserError(
                f"the weights of {self.folder} do not match its config.json, a {self._config.model_type}: "
                f"{'; '.join(faults)}"
            )
        parts = parts_by_path(tensors, views)
        return tree_of({path: place(leaf, parts[path]) for path, leaf in leaves_of(abstract)})

    def _check_shapes(self, head: str, abstract: dict) -> None:
        """UserError where `abstract` is another model than this one, because settings were changed."""
        own, wanted = dict(leaves_of(self.shapes(head))), dict(leaves_of(abstract))
        faults = [
            f"{'/'.join(path)} is {own[path].shape if path in own else 'not there'}, wanted "
            f"{wanted[path].shape if path in wanted else 'none'}"
            for path in own | wanted
            if (path in wanted or path[0] != "head")
            and (path not in own or path not in wanted or own[path].shape != wanted[path].shape)
        ]
        if faults:
            raise UserError(
                f"the weights of {self.folder} do not fit the model: {'; '.join(faults[:4])}; leave out the settings "
                "of the model that change its shape"
            )

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer of the folder, None where it has none."""
        from espalier.data.tokenizer import has_tokenizer, load_tokenizer

        return load_tokenizer(self.folder) if has_tokenizer(self.folder) else None

    def _own_head(self) -> str:
        named = {name: head for head, name in self._family.classes.items()} | {"BertForPreTraining": "masked_lm"}
        for architecture in self._hf.architectures or ():
            if architecture in named:
                return named[architecture]
        heads = (head for head in self._family.classes if self._family.heads.get(head) and self._holds(head))
        return next(heads, bare_head(self._config) or "embedding")

    def _holds(self, head: str) -> bool:
        """Whether the file has a tensor of this head that the stack does not have."""
        names = (plain_name(self._family, name) for name in self._family.heads.get(head, ()))
        shared = {plain_name(self._family, name) for name in self._family.heads.get("embedding", ())}
        return any(name in self._views for name in names if head == "embedding" or name not in shared)


def head_of(config: ModelConfig, params: dict) -> str:
    """The head in a parameter tree; a tied language model without transform and bias has no parameters of its own."""
    heads = sorted(params.get("head", {}))
    assert len(heads) <= 1, f"several heads: {heads}"
    if not heads:
        return bare_head(config) or "embedding"
    return "embedding" if heads == ["pooler"] else heads[0]


def check_new(path: Path) -> None:
    """UserError unless `path` may become a new folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; give the name of a new folder")


def check_export(
    path: str | os.PathLike,
    config: ModelConfig,
    head: str,
    tokenizer: Any,
    published: Published | None = None,
    shapes: Any = None,
    beside: Mapping[str, Export] | None = None,
) -> None:
    """UserError where `save_pretrained` would refuse: before the work, rather than after it.

    shapes: the parameters to come, or nothing where they are known to be the model's; as are those of `beside`.
    """
    check_new(Path(path).expanduser())
    to_hf(config, head, tokenizer, published=published)
    if shapes is not None:
        _complete_tensors(config, head, shapes)
    for one in (beside or {}).values():
        to_hf(one.config, one.head, tokenizer)


def _complete_tensors(config: ModelConfig, head: str, params: Any) -> list[Tensor]:
    """The tensors of a file; UserError unless the parameters are those of the model, all of them and no others."""
    tensors = tensors_of(family_of(config.model_type), config, head, params)
    there = {path for path, _ in leaves_of(params)}
    missing = ["/".join(path) for path, _ in leaves_of(param_shapes(config, head)) if path not in there]
    if head == "embedding" and "head" not in params:  # The pooler, which not every file has.
        missing = [path for path in missing if not path.startswith("head/pooler/")]
    if missing:
        raise UserError(
            f"{', '.join(missing[:6])}: not among the parameters, and a model of type {config.model_type} needs them; "
            "give the complete model, frozen parameters included"
        )
    return tensors


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: Path, config: ModelConfig, published: Published | None
) -> None:
    from espalier.data.tokenizer import save_tokenizer

    names = ["input_ids"] + ["token_type_ids"] * (config.type_vocab_size > 1) + ["attention_mask"]
    length = config.max_length or config.max_position_embeddings
    more: dict[str, Any] = {"model_input_names": names, "model_max_length": length}
    source = published_config(published, config)
    if source is not None and to_ours(source).max_position_embeddings == config.max_position_embeddings:
        # What the tokenizer says of itself holds still.
        del more["model_max_length"]
        if "model_input_names" in tokenizer.init_kwargs:
            del more["model_input_names"]
    save_tokenizer(tokenizer, folder, **more)


def _write_values(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
