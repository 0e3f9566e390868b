"""The flags by which a command names the model that it uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from espalier.errors import UserError
from espalier.predict.sampling import check_stops

if TYPE_CHECKING:
    from espalier.predict.loaded import LoadedModel
    from espalier.predict.use import Use


@dataclass(frozen=True)
class AskedModel:
    """Which model, and how it computes."""

    model: str
    """Run directory, or hf: before a folder in Hugging Face format or an id on the Hub."""
    step: int | None = None
    """Which checkpoint of the run; unset = the newest."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; bfloat16 is faster on GPUs and TPUs."""
    bidirectional: bool = False
    """Let a decoder see both sides, as those of `mlm hybrid` are trained to: hidden tokens are predicted."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    debug: bool = False
    """Show the traceback of an error."""

    def loaded(self) -> LoadedModel:
        from espalier.loading import load

        model = load(self.model, step=self.step, revision=self.revision)
        model = model.bidirectional() if self.bidirectional else model
        return replace(model, execution=replace(model.execution, dtype=self.dtype))

    def opened(self, use: str | None, max_length: int | None) -> tuple[LoadedModel, Use]:
        """The model, and what is asked of it. max_length: as in `limited`."""
        from espalier.predict.use import named, use_of

        model = limited(self.loaded(), max_length)
        return model, named(use) if use else use_of(model)


def stopping(use: Use, stops: tuple[str, ...]) -> Use:
    """The use with text that ends at these stops, where a row names none of its own."""
    if not stops:
        return use
    if use.name != "generate":
        raise UserError(f"--stop is for models that write, and this one does {use.name}; leave it out")
    check_stops(stops)
    return replace(use, reads=lambda row: use.reads({"stop": list(stops)} | dict(row)))


def limited(model: LoadedModel, max_length: int | None) -> LoadedModel:
    """The model with inputs of so many tokens at most; None = as many as it says. UserError for more than it has."""
    if max_length is None:
        return model
    limit = model.config.max_length
    if max_length < 8 or limit is not None and max_length > limit:
        raise UserError(f"max_length={max_length} must lie between 8 and the model's {limit or 'many'} positions")
    saved = {**model.saved, "data": {**(model.saved.get("data") or {}), "max_length": max_length}}
    # Where embeddings have a length of their own.
    return replace(model, saved=saved | ({"longest": max_length} if "longest" in saved else {}))
