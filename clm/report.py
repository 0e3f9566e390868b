"""The report of a causal-LM run: texts that the model wrote. samples.json: {"texts": [str]}."""

from __future__ import annotations

from collections.abc import Iterable

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport


def sections(run: RunFiles) -> list[Section]:
    """Generated texts."""
    written = run.json("samples.json").get("texts")
    return [Section("Generated texts", texts(written), "From an empty prompt.", STYLE)] if written else []


def texts(items: Iterable[str]) -> str:
    """Generated texts, as they are."""
    return "".join(
        page.marked("blockquote", text.strip()) if text.strip() else "<blockquote>(nothing)</blockquote>"
        for text in items
    )


STYLE = """
blockquote{margin:0 0 1rem;padding:.8rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:10px;
white-space:pre-wrap;font-family:ui-serif,Georgia,"Times New Roman",var(--han),serif}
"""

REPORT = TaskReport(
    title=lambda config: "Causal language model",
    unit="token",
    sections=sections,
    pipeline="text-generation",
    loader="AutoModelForCausalLM",
    words="pretrained by causal language modelling",
)
