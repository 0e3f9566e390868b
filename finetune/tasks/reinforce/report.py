"""The report of a reinforcement: the best, the worst and a random completion of its steps, beside their rewards.

rollouts.jsonl     {"step", "which", "prompt", "completion", "reward", "tokens", "ended"} a line
predictions.jsonl  {"prompt", "answer", "prediction", "rewards", "solved"} a line
"""

from __future__ import annotations

from espalier.report import page
from espalier.report.page import Section
from espalier.report.run_files import RunFiles
from espalier.report.task import TaskReport

SHOWN = 4
"""How many steps are shown, from the first to the last, and how many answers."""


def sections(run: RunFiles) -> list[Section]:
    """Completions of a few steps; answers to the validation prompts."""
    found = []
    # A resumed run may have written a step twice.
    rows = list({(row["step"], row["which"]): row for row in run.jsonl("rollouts.jsonl")}.values())
    steps = sorted({row["step"] for row in rows})
    shown = {steps[number * (len(steps) - 1) // max(SHOWN - 1, 1)] for number in range(SHOWN)} if steps else set()
    bodies = page.entries(
        (
            page.shortened(row["completion"], 300) or "(nothing)",
            f"step {row['step']:,}, {row['which']}: reward {row['reward']:.3g}, {row['tokens']} tokens"
            + ("" if row["ended"] else ", cut off"),
            page.shortened(row["prompt"], 300),
        )
        for row in rows
        if row["step"] in shown
    )
    if shown:
        note = f"The best, the worst and a random completion of {len(shown)} steps; rollouts.jsonl holds those of all."
        found.append(Section("Rollouts", bodies, note))
    answers = run.jsonl("predictions.jsonl")
    if answers:
        spaced = answers[:: max(1, len(answers) // (3 * SHOWN))][: 3 * SHOWN]
        bodies = page.entries(
            (
                page.shortened(row["prediction"], 300) or "(nothing)",
                f"{row['solved']} of {len(row['rewards'])} completions solved it"
                + (f"; wanted: {page.shortened(str(row['answer']), 300)}" if row["answer"] else ""),
                page.shortened(row["prompt"], 300),
            )
            for row in spaced
        )
        found.append(Section("Answers", bodies, f"{len(spaced)} of {len(answers):,}; predictions.jsonl holds all."))
    return found


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The metrics of the validation file."""
    final = run.summary.get("metrics") or {}
    shown = [("reward", final.get("reward")), ("pass@1", final.get("pass@1"))]
    shown += [(name, value) for name, value in final.items() if name.startswith("pass@") and name != "pass@1"]
    return [(name, f"{value:.3f}") for name, value in shown if value is not None]


REPORT = TaskReport(
    title=lambda config: "Learnt from rewards",
    unit="completion",
    loss=lambda config: "the mean reward, negated",
    sections=sections,
    tiles=tiles,
    pipeline="text-generation",
    loader="AutoModelForCausalLM",
    words="fine-tuned by reinforcement",
    metric_names={"loss": "mean reward, negated", "reward": "mean reward"},
)
