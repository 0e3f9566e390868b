"""What each layer knows of tagged words: `./launch.sh look probe RUN|hf:ID --data.train F --data.validation F`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from espalier import progress
from espalier.commands.asked_model import AskedModel
from espalier.commands.look import pages
from espalier.errors import UserError
from finetune.tasks.tag.record import TagData


@dataclass(frozen=True)
class ProbeConfig(AskedModel):
    """What layers know: `look probe RUN --data.train F --data.validation F` learns a linear probe of the tags of words
    on every layer, and a control task beside it, and writes a page. The model itself is not trained.
    """

    data: TagData = field(default_factory=TagData)
    words: int = 20_000
    """Words of each file at most."""
    seed: int = 0
    """Draws the tags of the control task."""
    output: str = "probe.html"
    """The page; the numbers go beside it, probe.npz."""

    def __post_init__(self):
        if self.words < 10:
            raise UserError(f"words={self.words} are too few; give at least 10")
        pages.page_path(self.output)


def main(config: ProbeConfig) -> dict[str, Any]:
    """Write page and numbers; returns the `--json` object."""
    from espalier.look.probes import probes
    from espalier.look.sections import probes as page
    from espalier.predict.loaded import on_all_devices

    train, held_out = (_tagged(config, name) for name in ("train", "validation"))
    with progress.waiting(f"loading {config.model}"):
        model = config.loaded()
    with progress.waiting("probing") as said, on_all_devices(model) as model:
        found = probes(model, train, held_out, config.seed, said)
    best = int(found.selectivity_E.argmax())
    figures = {
        "best accuracy": f"{100 * found.accuracy_E.max():.1f} % (layer {found.accuracy_E.argmax()})",
        "best selectivity": f"{100 * found.selectivity_E[best]:+.1f} points (layer {best})",
        "most frequent tag of each word": f"{100 * found.by_word:.1f} %",
        "most frequent tag": f"{100 * found.majority:.1f} %",
    }
    arrays = {"accuracy_E": found.accuracy_E, "control_E": found.control_E}
    arrays |= {"by_word": found.by_word, "majority": found.majority}
    title = f"What each layer knows of {config.data.validation}"
    written = pages.write(config.output, config.model, title, page.sections(found), figures.items(), arrays)
    progress.block(figures | written)
    return {
        "accuracy": found.accuracy_E.tolist(),
        "control": found.control_E.tolist(),
        "by_word": found.by_word,
        "majority": found.majority,
        "page": written["page"],
    }


def _tagged(config: ProbeConfig, name: str) -> Any:
    from espalier.data.tagged import read_tagged
    from espalier.data.word_pieces import sentence_of_words

    data, path = config.data, getattr(config.data, name)
    if not path:
        raise UserError(f"no --data.{name} FILE given: name sentences whose words have tags (docs/tasks/tag.md)")
    file = read_tagged(path, data.tokens, data.tags, data.encoding)
    sentences, tags, count = [], [], 0
    for words, of_words in zip(file.words, file.tags, strict=True):
        if count + len(words) > config.words and sentences:
            break
        sentences.append(sentence_of_words(words))
        tags.append(of_words)
        count += len(words)
    return sentences, tags
