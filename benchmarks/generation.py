"""Tokens a second of drawing: Espalier against transformers' generate, and what the memory would allow.

    ./launch.sh python -m benchmarks.generation --out generation.json

The same weights (random, of GPT-2's shape), the same prompts, both in one process in turn, float32 on a CPU:

alike    rows that all get as many tokens, the most probable ones; the ids of both must agree
uneven   rows that end where one of many end tokens is drawn, so that lengths are geometric: in batches, each as long as
         its longest row, and in slots that are filled again (espalier/models/slots.py)

The bound is that of a turn: weights, keys and values by the memory bandwidth that a sum over a long array reaches here,
or its arithmetic by what a large product reaches, whichever is longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from clm.presets import PRESETS
from espalier.models import generate
from espalier.models.config import Execution, ModelConfig
from espalier.models.counts import count_params, products
from espalier.models.decoding import Sampling
from espalier.models.slots import rows_as_they_end
from espalier.models.transformer import init_params

FLOAT32 = Execution(dtype="float32")
PROMPT = 32
"""Tokens of a prompt."""


class Drawn(NamedTuple):
    tokens: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="benchmarks.generation", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--preset", default="gpt2", help="of clm")
    parser.add_argument("--model", default="{}", help='settings of it as JSON: {"num_hidden_layers": 2}')
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows that are all alike")
    parser.add_argument("--new", type=int, default=64, help="tokens that are drawn at most")
    parser.add_argument("--uneven", type=int, default=64, help="rows of uneven lengths, in batches or slots of --slots")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    given = parser.parse_args(arguments)
    model = dataclasses.replace(PRESETS[given.preset]().model, **json.loads(given.model))
    model = model.fitted(model.vocab_size, PROMPT + given.new)
    race = Race(model, given)
    found = {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "jax": jax.__version__, "torch": _version()},
        "model": {"preset": given.preset, "params": count_params(model, "causal_lm"), "prompt": PROMPT},
        "bandwidth": bandwidth(),
        "flops": product_rate(),
    }
    found["alike"] = [race.alike(rows, found) for rows in given.rows]
    found["uneven"] = race.uneven(found)
    text = json.dumps(found, indent=2)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)
    print(table(found))
    return found


class Race:
    """Both with the same weights."""

    def __init__(self, model: ModelConfig, given: argparse.Namespace):
        import torch
        from transformers import AutoModelForCausalLM

        from espalier.models.hub import save_pretrained

        self._model, self._given, self._torch = model, given, torch
        self._params = init_params(model, jax.random.key(0))
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(Path(folder), model, self._params)
            self._other: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        draw = np.random.default_rng(0)
        self._prompts = draw.integers(0, model.vocab_size, (max(*given.rows, given.uneven), PROMPT)).tolist()

    def alike(self, rows: int, measured: dict[str, Any]) -> dict[str, Any]:
        """tokens/s of both, the ids compared."""
        new, prompts = self._given.new, self._prompts[:rows]
        ids: dict[str, np.ndarray] = {}

        def ours() -> int:
            sampling = Sampling(new, temperature=0.0)
            shape = (rows, PROMPT)
            drawn = generate.generate(
                self._model, self._params, prompts, jax.random.key(0), sampling, execution=FLOAT32, shape=shape
            )
            ids["espalier"] = drawn.tokens_BG
            return drawn.tokens_BG.size

        def theirs() -> int:
            ids["transformers"] = self._generated(prompts, do_sample=False, min_new_tokens=new)
            return ids["transformers"].size

        speeds = self._in_turn({"espalier": ours, "transformers": theirs})
        same = float((ids["espalier"] == ids["transformers"]).mean())
        return {"rows": rows, "same_ids": same, "tokens_per_second": speeds, "bound": self._bound(rows, measured)}

    def uneven(self, measured: dict[str, Any]) -> dict[str, Any]:
        """tokens/s where rows end at an end token that a quarter of the budget brings on the average."""
        given, model = self._given, self._model
        prompts, slots = self._prompts[: given.uneven], given.slots
        every = max(2, given.new // 4)
        sampling = Sampling(given.new, end_ids=tuple(range(0, model.vocab_size, every)))
        key = jax.random.key(0)
        turns: dict[str, int] = {}

        def in_batches() -> int:
            drawn = [
                generate.generate(
                    model, self._params, prompts[at : at + slots], key, sampling, execution=FLOAT32,
                    numbers=range(at, at + slots), shape=(slots, PROMPT),
                )
                for at in range(0, len(prompts), slots)
            ]  # fmt: skip
            turns["espalier, batches"] = sum(int((part.tokens_BG >= 0).sum(1).max()) for part in drawn)
            return sum(int((part.tokens_BG >= 0).sum()) for part in drawn)

        def in_slots() -> int:
            how: dict[str, Any] = dict(execution=FLOAT32, length=PROMPT)
            parts = list(rows_as_they_end(model, self._params, prompts, key, sampling, slots, **how))
            turns["espalier, slots"] = parts[-1].turns
            return sum(int((part.drawn.tokens_BG >= 0).sum()) for part in parts)

        def theirs() -> int:
            ends = list(sampling.end_ids)
            parts = [
                self._generated(prompts[at : at + slots], do_sample=True, top_k=0, eos_token_id=ends)
                for at in range(0, len(prompts), slots)
            ]
            turns["transformers, batches"] = sum(part.shape[1] for part in parts)
            # Its padding stands behind the first end token.
            ended = [np.isin(part, ends) for part in parts]
            return sum(int(np.where(end.any(1), end.argmax(1) + 1, end.shape[1]).sum()) for end in ended)

        named = {"espalier, batches": in_batches, "espalier, slots": in_slots, "transformers, batches": theirs}
        speeds = self._in_turn(named)
        return {
            "rows": len(prompts), "slots": slots, "tokens_per_second": speeds, "turns": turns,
            "bound": self._bound(slots, measured),
        }  # fmt: skip

    def _generated(self, prompts: Sequence[Sequence[int]], **how: Any) -> np.ndarray:
        torch = self._torch
        ids = torch.tensor(prompts)
        end = how.pop("eos_token_id", None)
        with torch.inference_mode():
            out = self._other.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._given.new, pad_token_id=0,
                eos_token_id=end, **how,
            )  # fmt: skip
        return out[:, ids.shape[1] :].numpy()

    def _in_turn(self, named: dict[str, Callable[[], int]]) -> dict[str, dict[str, float]]:
        """Medians and bests of rounds, after one that compiles."""
        for run in named.values():
            run()
        speeds: dict[str, list[float]] = {name: [] for name in named}
        for number in range(self._given.rounds):
            for name, run in list(named.items())[:: 1 if number % 2 else -1]:
                began = time.perf_counter()
                tokens = run()
                speeds[name].append(tokens / (time.perf_counter() - began))
        return {name: {"median": statistics.median(each), "best": max(each)} for name, each in speeds.items()}

    def _bound(self, rows: int, measured: dict[str, Any]) -> dict[str, Any]:
        """tokens/s at most, of turns in which every row gets a token."""
        c = self._model
        weights = sum(product.inputs * product.outputs * product.times for product in products(c))
        cache = 2 * c.kv_heads * c.head_size * c.num_hidden_layers * (PROMPT + self._given.new / 2) * rows
        memory = 4 * (weights + cache) / measured["bandwidth"]
        arithmetic = 2 * weights * rows / measured["flops"]
        limit = "memory" if memory > arithmetic else "arithmetic"
        return {"tokens_per_second": rows / max(memory, arithmetic), "by": limit}


def bandwidth() -> float:
    """Bytes/s at which a long array is read, by the best of several sums."""
    import torch

    long = torch.ones(2**27)
    return long.numel() * 4 / min(_seconds(lambda: long.sum()) for _ in range(7))


def product_rate() -> float:
    """FLOP/s of a large product of XLA."""
    size = 2048
    one = jax.numpy.ones((size, size))
    multiply = jax.jit(lambda a: a @ a)
    multiply(one).block_until_ready()
    return 2 * size**3 / min(_seconds(lambda: multiply(one).block_until_ready()) for _ in range(7))


def table(found: dict[str, Any]) -> str:
    """The results as a table for a page."""
    lines = ["| rows | who | tokens/s (best) | of the bound |", "|---|---|---|---|"]
    for part in found["alike"]:
        lines += _lines(f"{part['rows']} alike", part)
    uneven = found["uneven"]
    lines += _lines(f"{uneven['rows']} uneven, {uneven['slots']} at once", uneven)
    return "\n".join(lines)


def _lines(name: str, part: dict[str, Any]) -> list[str]:
    bound = part["bound"]["tokens_per_second"]
    lines = [
        f"| {name} | {who} | {speed['median']:,.0f} ({speed['best']:,.0f}) | {speed['median'] / bound:.0%} |"
        for who, speed in part["tokens_per_second"].items()
    ]
    return [*lines, f"| {name} | bound, by {part['bound']['by']} | {bound:,.0f} | |"]


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version() -> str:
    import torch

    return torch.__version__


if __name__ == "__main__":
    main()
