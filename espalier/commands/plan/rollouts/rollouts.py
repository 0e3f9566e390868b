"""Time of a step that draws completions and learns from them, by analysis.

Drawing a token reads all weights and the keys and values of all rows: on every chip of today memory is what it waits
for until hundreds of rows are drawn at once (Pope et al. 2023, "Efficiently scaling transformer inference"). The upper
bound is that alone: rows ÷ (bytes of a turn ÷ bandwidth). The expected time divides the bandwidth by what long arrays
reach, and adds arithmetic where it is more, exchanges between the devices of a copy, and gaps between kernels. Prefill
is arithmetic; the training pass is `plan.time.roofline.step_time`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from espalier.commands.plan.objectives import PRESETS
from espalier.commands.plan.rollouts.settings import RolloutsConfig
from espalier.commands.plan.time.amounts import Job
from espalier.commands.plan.time.roofline import (
    FITTED,
    HOP_SECONDS,
    KERNELS_PER_LAYER,
    LAUNCH_SECONDS,
    STREAM,
    matmul_efficiency,
    step_time,
)
from espalier.errors import UserError
from espalier.models.config import ModelConfig
from espalier.models.counts import attention_flops, count_params, products
from sharding.advice import KEPT_FREE, MOST_TENSOR
from sharding.topology import Chip, chip_named

ITEM = 2
"""Bytes of a weight, a key or a value in bfloat16."""
STATE = 16
"""Bytes of a parameter in training: itself, its gradient and two moments, float32."""
STEADY = 16_384
"""Tokens of a device in a micro-batch of the training: enough that gathering weights overlaps."""


@dataclass(frozen=True)
class Rollouts:
    """Of one step. Seconds are expected, but for the bound."""

    model: str
    chip: str
    chips: int
    params: int
    tensor: int
    copies: int
    """Of the weights, each on `tensor` devices, which draw a part of the rows."""
    rows: int
    """Completions of the step."""
    slots: int
    """That are drawn at once, on all copies."""
    turns: int
    """How often a token is drawn in every slot."""
    weight_bytes: float
    """That a copy reads in a turn."""
    cache_bytes: float
    """Keys and values that a copy reads in a turn, on average."""
    cache_bytes_per_token: float
    bound_tokens_per_second: float
    """Of drawing, by memory bandwidth alone, all slots taken."""
    tokens_per_second: float
    """Of drawing, expected."""
    prefill: float
    decode: float
    training: float
    step: float
    cost: float | None
    """Of 1,000 steps."""


def plan(config: RolloutsConfig) -> Rollouts:
    """UserError where the chips do not hold the model, or do not divide."""
    chip, model = chip_named(config.chip), PRESETS["clm"][config.preset]().model
    devices = config.chips * chip.devices_per_chip
    params = count_params(model, "causal_lm")
    rows = config.prompts * config.samples
    weights = ITEM * sum(product.inputs * product.outputs * product.times for product in products(model))
    row_bytes = cache_bytes_per_token(model) * (config.prompt_length + config.max_new_tokens)
    tensor = config.tensor or _fewest(config, chip, devices, params, weights, row_bytes)
    if devices % tensor or model.kv_heads % tensor:
        raise UserError(
            f"tensor={tensor} must divide {devices} devices and the model's {model.kv_heads} key/value heads; try "
            f"--tensor {math.gcd(devices, model.kv_heads)}"
        )
    copies = devices // tensor
    room = int(_room(chip, devices, tensor, params, weights) * tensor / row_bytes) * copies
    slots = min(rows, config.slots or rows, room) // config.samples * config.samples
    if slots < 1:
        raise UserError(
            f"{config.chips} × {chip.name} hold no {config.samples} completions of "
            f"{config.prompt_length + config.max_new_tokens:,} tokens of {config.preset} beside its training; give "
            "more --chips or a larger --tensor"
        )
    mean = config.mean_new_tokens or config.max_new_tokens
    # In one batch as many as the longest has; in slots that are filled again as the tokens divide, and the last ends.
    turns = config.max_new_tokens if slots == rows else math.ceil(rows * mean / slots) + config.max_new_tokens - mean
    each = slots / copies
    cache = each * cache_bytes_per_token(model) * (config.prompt_length + (mean + 1) / 2)
    turn = turn_seconds(model, chip, tensor, each, weights, cache, config.prompt_length + mean)
    prefill = config.prompts / devices * prefill_seconds(model, chip, config.prompt_length)
    job = Job(
        model=model,
        chip=chip,
        sequence_length=config.prompt_length + mean,
        batch_rows=rows,
        mesh={"fsdp": devices},
        accumulation=max(1, round(rows * (config.prompt_length + mean) / devices / STEADY)),
        remat="full",
        scan=chip.architecture == "tpu",
    )
    training = step_time(job).step
    decode = turns * turn
    step = prefill + decode + training
    hours = step * 1000 / 3600 * config.chips
    return Rollouts(
        model=config.preset,
        chip=chip.name,
        chips=config.chips,
        params=params,
        tensor=tensor,
        copies=copies,
        rows=rows,
        slots=slots,
        turns=turns,
        weight_bytes=weights,
        cache_bytes=cache,
        cache_bytes_per_token=cache_bytes_per_token(model),
        bound_tokens_per_second=slots / bound_seconds(chip, tensor, weights, cache),
        tokens_per_second=rows * mean / decode,
        prefill=prefill,
        decode=decode,
        training=training,
        step=step,
        cost=None if config.price is None else hours * config.price,
    )


def cache_bytes_per_token(model: ModelConfig) -> float:
    """Keys and values of all layers, in bfloat16. Espalier keeps those of local layers at full length too."""
    return 2.0 * ITEM * model.kv_heads * model.head_size * model.num_hidden_layers


def bound_seconds(chip: Chip, tensor: int, weights: float, cache: float) -> float:
    """Of a turn: every weight and every cached key and value once through the memory of the devices of a copy."""
    return (weights + cache) / (tensor * chip.memory_bandwidth)


def turn_seconds(
    model: ModelConfig, chip: Chip, tensor: int, rows: float, weights: float, cache: float, keys: float
) -> float:
    """Expected of a turn of one copy, for so many rows that see so many keys."""
    flops = rows * (
        weights / ITEM * 2 + 4 * model.num_attention_heads * model.head_size * keys * model.num_hidden_layers
    )
    rate = chip.flops * chip.sustained_clock * matmul_efficiency(chip, FITTED)
    seconds = max(bound_seconds(chip, tensor, weights, cache) / STREAM, flops / tensor / rate)
    seconds += model.num_hidden_layers * KERNELS_PER_LAYER * LAUNCH_SECONDS
    if tensor > 1:
        # Two sums of the states a layer, and the scores gathered once.
        volume = 2 * model.num_hidden_layers * 2 * rows * model.hidden_size * ITEM + rows * model.vocab_size * 4
        seconds += volume * (tensor - 1) / tensor / (chip.fast_bandwidth * FITTED.network)
        seconds += 2 * model.num_hidden_layers * HOP_SECONDS * math.log2(tensor)
    return seconds


def prefill_seconds(model: ModelConfig, chip: Chip, length: int) -> float:
    """Of a forward pass over one prompt on one device; the head is asked at its last token alone."""
    flops = sum(product.flops for product in products(model, 1 / length)) * length
    attention = sum(attention_flops(model, kind, length) for kind in model.layers) * length
    rate = chip.flops * chip.sustained_clock * matmul_efficiency(chip, FITTED)
    return flops / rate + attention / (rate * FITTED.attention)


def _room(chip: Chip, devices: int, tensor: int, params: int, weights: float) -> float:
    """Bytes of a device for keys and values, beside the state of the training and the weights as they are drawn by."""
    return chip.memory * (1 - KEPT_FREE) - STATE * params / devices - weights / tensor


def _fewest(config: RolloutsConfig, chip: Chip, devices: int, params: int, weights: float, row_bytes: float) -> int:
    sizes = [size for size in range(1, MOST_TENSOR + 1) if devices % size == 0]
    for tensor in sizes:
        if _room(chip, devices, tensor, params, weights) * tensor >= row_bytes * config.samples:
            return tensor
    raise UserError(
        f"{config.preset} with the state of its training does not fit {config.chips} × {chip.name} "
        f"({chip.memory / 2**30:.0f} GiB each); give more --chips"
    )
