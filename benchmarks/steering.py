"""A decoder is steered by a reward model: SST-2 → reward → samples of the decoder, scored → `prefer` → what changed.

    python -m benchmarks.steering --base RUN --sst train.tsv --text BOOK.txt --folder runs/steering --losses dpo ipo

Two reward models are learnt from halves of SST-2: by one the pairs are made, the other one judges. A control has the
same pairs with chosen and rejected drawn by lot. Among the losses, `reinforce` is no loss of pairs: it draws anew at
each step behind the same prompts, rewards log p(positive) by a classifier of the sentences of the first half, and takes
--beta of the KL off. Printed a line each: how often the judge prefers the continuation of the tuned decoder to one of
the base's behind the same unseen prompt, the mean of its score, and KL(π ‖ π_ref) in nats a text, the mean of log π -
log π_ref over samples of π.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import espalier
from espalier.data.chat import Chat
from espalier.data.text_template import encode_filled
from espalier.data.tokenizer import special_ids
from espalier.training.config import CheckpointConfig
from finetune.config import FinetuneOptimizer
from finetune.tasks.classify.record import ClassifyConfig, ClassifyData
from finetune.tasks.prefer.record import PreferConfig, PreferData
from finetune.tasks.prefer.reference import answer_logprobs
from finetune.tasks.reinforce.record import PolicyGradient, ReinforceConfig, ReinforceData
from finetune.tasks.reward.record import RewardConfig, RewardData
from finetune.train import main
from sharding.mesh import MeshConfig

TOKENS, LONGEST = 20, 48
SHARED: dict[str, Any] = {"checkpoint": CheckpointConfig(every=10_000), "mesh": MeshConfig(1, 1, 1), "log_every": 20}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentiment_pairs(path: Path, count: int, seed: int) -> list[dict]:
    """A positive sentence is preferred to a negative one; no sentence is in two pairs."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    random = np.random.default_rng(seed)
    sides = [[text.strip() for text, label in lines if label == sign and len(text) > 40] for sign in ("1", "0")]
    good, bad = ([side[at] for at in random.permutation(len(side))[:count]] for side in sides)
    return [{"chosen": one, "rejected": other} for one, other in zip(good, bad, strict=True)]


def reward_model(args: argparse.Namespace, name: str, pairs: list[dict]):
    """A run of `reward` on these pairs, the last 100 of which are measured on."""
    folder = args.folder / name
    data = RewardData(
        write_rows(args.folder / f"{name}.train.jsonl", pairs[:-100]),
        write_rows(args.folder / f"{name}.dev.jsonl", pairs[-100:]),
        max_length=LONGEST,
    )
    summary = main(
        RewardConfig(
            init_from=args.base, run_dir=str(folder), steps=args.reward_steps, batch_size=32, data=data,
            eval_every=10_000,
            optimizer=FinetuneOptimizer(learning_rate=5e-4), **SHARED,
        )
    )  # fmt: skip
    return espalier.load(folder), summary["metrics"]["accuracy"]


def classifier(args: argparse.Namespace, pairs: list[dict]) -> Path:
    """A run of `classify` on the sentences of these pairs; its last label is positive."""
    folder = args.folder / "classifier"
    rows = [{"text": pair[name], "label": label} for pair in pairs
            for name, label in (("rejected", "0"), ("chosen", "1"))]  # fmt: skip
    data = ClassifyData(
        write_rows(args.folder / "classifier.train.jsonl", rows[:-200]),
        write_rows(args.folder / "classifier.dev.jsonl", rows[-200:]),
        max_length=LONGEST,
    )
    main(
        ClassifyConfig(
            init_from=args.base, run_dir=str(folder), steps=args.reward_steps, batch_size=64, data=data,
            eval_every=10_000, optimizer=FinetuneOptimizer(learning_rate=5e-4), **SHARED,
        )
    )  # fmt: skip
    return folder


def reinforced(args: argparse.Namespace, pairs: list[dict], train: list[str], held_out: list[str]) -> ReinforceConfig:
    """From the rewards of a classifier, drawn behind the same prompts."""
    rows = [[{"prompt": prompt} for prompt in part] for part in (train, held_out)]
    data = ReinforceData(
        write_rows(args.folder / "prompts.train.jsonl", rows[0]),
        write_rows(args.folder / "prompts.dev.jsonl", rows[1]),
        max_length=LONGEST - TOKENS,
        reward=(f"model:{classifier(args, pairs)}",),
        validation_samples=2,
    )
    policy = PolicyGradient(samples=args.samples, max_new_tokens=TOKENS, beta=args.beta, cut="scored", solved=-0.1)
    return ReinforceConfig(
        init_from=args.base, run_dir=str(args.folder / "reinforce"), steps=args.steps, batch_size=16, policy=policy,
        eval_every=10_000, data=data, optimizer=FinetuneOptimizer(learning_rate=args.rate), **SHARED,
    )  # fmt: skip


def openings(path: Path, count: int, seed: int) -> list[str]:
    """The first words of sentences of a book, each once."""
    text = " ".join(path.read_text(encoding="utf-8").split())
    found = {" ".join(sentence.split()[:5]) for sentence in re.findall(r"(?<=[.!?] )[A-Z][^.!?]{60,}", text)}
    return [sorted(found)[at] for at in np.random.default_rng(seed).permutation(len(found))[:count]]


def samples(model, prompts: list[str], count: int, seed: int) -> list[list[str]]:
    """`count` continuations of each prompt."""
    drawn = [
        model.generate(prompts, max_new_tokens=TOKENS, temperature=1.0, seed=seed + number) for number in range(count)
    ]
    return [list(texts) for texts in zip(*drawn, strict=True)]


def divergence(tuned, base, prompts: list[str], texts: list[str]) -> float:
    """KL(π ‖ π_ref) in nats a text, from samples of π; the end of a text is not a part of it."""
    chats = [
        Chat(prompt + text, [(len(prompt), len(prompt + text))]) for prompt, text in zip(prompts, texts, strict=True)
    ]
    examples = []
    for example in encode_filled(tuned.tokenizer, chats):
        weights = np.array(example.of_tokens["loss_weights"])
        weights[-1] = 0
        examples.append(example._replace(of_tokens={"loss_weights": weights}))
    pad = special_ids(tuned.tokenizer).pad
    now, before = (answer_logprobs(m.config, m.execution, m.params, examples, pad) for m in (tuned, base))
    return float((now - before).mean())


def run(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    pairs = sentiment_pairs(args.sst, 2 * args.pairs, 0)
    maker, accuracy = reward_model(args, "maker", pairs[: args.pairs])
    judge, other = (maker, accuracy) if args.no_judge else reward_model(args, "judge", pairs[args.pairs :])
    print(f"reward models prefer the positive sentence in {accuracy:.0%} and {other:.0%} of 100 pairs", flush=True)
    base = espalier.load(args.base)
    prompts = openings(args.text, args.prompts + args.held_out, 0)
    train, held_out = prompts[: args.prompts], prompts[args.prompts :]
    rows = []
    for prompt, texts in zip(train, samples(base, train, args.samples, 100), strict=True):
        scores = maker.score([prompt + text for text in texts])
        rows.append(
            {"prompt": prompt, "chosen": texts[int(np.argmax(scores))], "rejected": texts[int(np.argmin(scores))]}
        )
    random = np.random.default_rng(5)
    by_lot = [
        row
        | dict(zip(("chosen", "rejected"), random.permutation([row["chosen"], row["rejected"]]).tolist(), strict=True))
        for row in rows
    ]
    files = {name: [write_rows(args.folder / f"{name}.{side}.jsonl", part) for side, part in
                    (("train", made[: -args.dev]), ("dev", made[-args.dev :]))]
             for name, made in (("scored", rows), ("lot", by_lot))}  # fmt: skip
    asked = [prompt for prompt in held_out for _ in range(2)]
    before = samples(base, asked, 1, 900)
    judged = np.array(judge.score([prompt + texts[0] for prompt, texts in zip(asked, before, strict=True)]))
    print(f"base: mean score {judged.mean():+.3f}", flush=True)
    for loss, name in [*((loss, "scored") for loss in args.losses), ("dpo", "lot")]:
        if loss == "reinforce":
            config = reinforced(args, pairs[: args.pairs], train, held_out)
        else:
            config = PreferConfig(
                init_from=args.base, run_dir=str(args.folder / f"{loss}-{name}"), loss=loss, steps=args.steps,
                batch_size=16, eval_every=10_000, data=PreferData(*files[name], max_length=LONGEST, pairs_per_row=0),
                optimizer=FinetuneOptimizer(learning_rate=args.rate), **SHARED,
            )  # fmt: skip
        accuracy = main(config)["metrics"].get("accuracy", float("nan"))
        tuned = espalier.load(config.run_dir)
        after = [texts[0] for texts in samples(tuned, asked, 1, 500)]
        now = np.array(judge.score([prompt + text for prompt, text in zip(asked, after, strict=True)]))
        print(
            f"{loss} ({name}): preferred to the base in {(now > judged).mean():.0%}, mean score {now.mean():+.3f}, "
            f"KL {divergence(tuned, base, asked, after):.2f} nats, accuracy {accuracy:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("base", None), ("sst", None), ("text", None), ("folder", "runs/steering")):
        kind = str if name == "base" else Path
        parser.add_argument(f"--{name}", type=kind, default=default, required=default is None)
    parser.add_argument("--losses", nargs="+", default=["dpo"])
    for name, default in (("pairs", 1500), ("reward-steps", 150), ("prompts", 352), ("held-out", 100), ("samples", 4),
                          ("steps", 120), ("dev", 32)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-judge", action="store_true", help="the reward model that made the pairs judges, too")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL in reinforce")
    run(parser.parse_args())
