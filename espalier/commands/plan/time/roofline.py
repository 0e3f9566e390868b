"""Time of a training step by analysis: the sum of arithmetic, memory and network time of one device.

A roofline in the sense of Williams et al. 2009 and of "How to Scale Your Model" (Austin et al. 2025): each part is an
amount (FLOPs, bytes) that follows from the model, divided by a rate of the chip (sharding/topology.py) times an
efficiency. The efficiencies are the seven numbers of `Efficiency`, fitted on half of the published runs in
runs.json and tested on the other half. Imports no JAX at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from espalier.commands.plan.time import amounts
from espalier.commands.plan.time.amounts import Job, parameters
from espalier.models.counts import flops_per_token
from espalier.training.optimizers import OPTIMIZERS
from sharding.mesh import AXES
from sharding.topology import Chip


@dataclass(frozen=True)
class Efficiency:
    """Part of the nominal rates that is reached; fitted by `python -m espalier.commands.plan.time.published --fit`."""

    tpu: float = 0.94
    """Part of the peak in a large matrix product on a TPU."""
    ampere: float = 0.82
    """The same on NVIDIA's A100, and assumed of other GPUs up to it: Volta, Turing, Ada."""
    hopper: float = 0.66
    """The same on H100 and H200, whose power limit keeps them from their clock; assumed of Blackwell too."""
    attention: float = 0.31
    """A fused attention kernel, relative to a large matrix product."""
    memory: float = 0.38
    """Part of the memory bandwidth, if operations outside the products read and wrote activations only as often as
    `amounts.layer_bytes` counts: programs move more, and not at full speed."""
    network: float = 0.40
    """Part of the bandwidth of links and network cards."""
    overlap: float = 0.78
    """Part of the communication that overlaps with computation, if there is enough of that."""


FITTED = Efficiency()
SPREAD = 0.20
"""The printed range is ± this part of the time: 9 of 10 held-out runs lie within (tests/test_plan_roofline.py)."""
STREAM = 0.85
"""Part of the memory bandwidth reached with long arrays: weights, optimizer state, scores over the vocabulary. What
BabelStream and similar copies reach on GPUs and TPUs."""
LAUNCH_SECONDS = 2e-6
"""From the end of one kernel to the start of the next."""
KERNELS_PER_LAYER = 20
"""In a forward pass; twice as many in the backward pass."""
HOP_SECONDS = 5e-6
"""Latency of a collective for each doubling of its devices."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; the first six add up to `step`. Rates are per second; a chip is what is rented."""

    matmul: float
    attention: float
    memory: float
    """Activations and weights between chip and HBM."""
    optimizer: float
    launch: float
    """Gaps between kernels."""
    network: float
    """Communication that does not overlap with computation."""
    communication: Mapping[str, float]
    """Seconds that the links of each axis are busy, overlapped or not."""
    step: float
    low: float
    high: float
    """The step may take from low to high seconds (SPREAD)."""
    tokens_per_second: float
    tokens_per_second_per_chip: float
    model_flops_per_token: float
    mfu: float
    """model_flops_per_token × tokens_per_second ÷ the peak of all devices."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part, in the order of the fields."""
        names = ("matmul", "attention", "memory", "optimizer", "launch", "network")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Bill:
    """Time and cost of training on a number of tokens."""

    days: float
    chip_hours: float
    cost: float | None
    """In the currency of the price; None without one."""


def step_time(job: Job, efficiency: Efficiency = FITTED) -> StepTime:
    """The time of one optimizer step of `job`, all its micro-batches included."""
    chip, tensor = job.chip, job.mesh.get("tensor", 1)
    assert set(job.mesh) <= set(AXES), f"mesh axes {sorted(job.mesh)}"
    again = amounts.recomputed(job)
    tokens = job.tokens * tensor / job.devices
    rate = chip.flops * chip.sustained_clock * matmul_efficiency(chip, efficiency)
    stream = chip.memory_bandwidth * STREAM

    # Loading operands overlaps with the arithmetic; small matrices are bound by it.
    streamed = (
        tokens * amounts.product_bytes(job.model, tensor) * 3 + amounts.weight_bytes(job, again, tensor)
    ) / chip.memory_bandwidth
    matmul = max(tokens * amounts.matmul_flops(job, again, tensor) / rate, streamed)
    attention = tokens * amounts.attention_flops(job, again, tensor) / (rate * efficiency.attention)
    memory = tokens * amounts.layer_bytes(job, again, tensor) / (chip.memory_bandwidth * efficiency.memory)
    memory += (tokens * amounts.vocabulary_bytes(job, tensor) + amounts.weight_bytes(job, again, tensor)) / stream
    shard = parameters(job.model) / (tensor * job.mesh.get("fsdp", 1))
    kind = OPTIMIZERS[job.optimizer]
    # It reads parameter, gradient and moments and writes all but the gradient; clipping reads the gradient once.
    optimizer = shard * 4 * (4 + 2 * kind.matrix_moments) / stream
    extra = amounts.optimizer_flops(job.model, kind.matrix_flops)
    optimizer += extra / (tensor * job.mesh.get("fsdp", 1)) / rate
    kernels = job.model.num_hidden_layers * KERNELS_PER_LAYER * (3 + bool(again))
    launch = job.accumulation * kernels * LAUNCH_SECONDS

    communication = _communication(job, again, efficiency)
    network = _exposed(job, communication, matmul + attention + memory, efficiency)
    step = matmul + attention + memory + optimizer + launch + network
    flops = flops_per_token(job.model, job.sequence_length, job.predicted_fraction)
    speed = job.tokens / step
    return StepTime(
        matmul,
        attention,
        memory,
        optimizer,
        launch,
        network,
        communication,
        step,
        low=step * (1 - SPREAD),
        high=step * (1 + SPREAD),
        tokens_per_second=speed,
        tokens_per_second_per_chip=speed / job.devices * chip.devices_per_chip,
        model_flops_per_token=flops,
        mfu=flops * speed / (job.devices * chip.flops),
    )


def together(times: Sequence[StepTime], job: Job) -> StepTime:
    """Of several models in one step, one after the other. job: of any of them."""
    if len(times) == 1:
        return times[0]
    names = ("matmul", "attention", "memory", "optimizer", "launch", "network", "step", "low", "high")
    sums = {name: sum(getattr(one, name) for one in times) for name in names}
    flops, speed = sum(one.model_flops_per_token for one in times), job.tokens / sums["step"]
    return StepTime(
        **sums,
        communication={axis: sum(one.communication[axis] for one in times) for axis in times[0].communication},
        tokens_per_second=speed,
        tokens_per_second_per_chip=speed / job.devices * job.chip.devices_per_chip,
        model_flops_per_token=flops,
        mfu=flops * speed / (job.devices * job.chip.flops),
    )


def bill(time: StepTime, job: Job, total_tokens: float, price_per_chip_hour: float | None = None) -> Bill:
    """Days, chip-hours and cost of training on total_tokens without interruption."""
    hours = total_tokens / time.tokens_per_second / 3600
    chip_hours = hours * job.chips
    cost = None if price_per_chip_hour is None else chip_hours * price_per_chip_hour
    return Bill(hours / 24, chip_hours, cost)


def matmul_efficiency(chip: Chip, efficiency: Efficiency) -> float:
    if chip.architecture == "tpu":
        return efficiency.tpu
    return efficiency.hopper if chip.architecture in ("hopper", "blackwell") else efficiency.ampere


def _communication(job: Job, again: Mapping[str, float], efficiency: Efficiency) -> dict[str, float]:
    """Seconds by axis that a device communicates in a step; axes of size 1 are left out."""
    c, mesh = job.model, {axis: job.mesh.get(axis, 1) for axis in AXES}
    tensor, layers, micro = mesh["tensor"], c.num_hidden_layers, job.accumulation
    tokens = job.tokens / (job.devices / tensor) / micro
    weights = parameters(c) / tensor
    shard = weights / mesh["fsdp"]
    kv = tokens * mesh["sequence"] * 2 * c.kv_heads * c.head_size / tensor
    found: dict[str, float] = {}
    for axis in AXES:
        if mesh[axis] == 1:
            continue
        # (bytes that one device would hold of the whole, how often it passes the ring, how many collectives)
        if axis in ("replica", "data"):
            volume, count = 2 * 4 * shard, 2.0
        elif axis == "fsdp":
            # bfloat16 weights gathered for the forward and for the backward pass, float32 gradients scattered.
            volume, count = micro * weights * (2 + 2 + 4), 3.0 * layers * micro
        elif axis == "sequence":
            # Keys and values gathered forward and backward, their gradients scattered; and the weights' gradients.
            volume = micro * layers * kv * 2 * (3 + bool(again)) + 2 * 4 * shard
            count = 3.0 * layers * micro
        else:
            # Megatron (Shoeybi et al. 2019): two all-reduces of the activations forward, two backward.
            passes = 4 + 2 * again.get("out", 0.0)
            volume, count = micro * layers * passes * 2 * tokens * c.hidden_size * 2, layers * micro * passes
        found[axis] = _ring_seconds(job, axis, volume, efficiency) + count * HOP_SECONDS * math.log2(mesh[axis])
    return found


def _ring_seconds(job: Job, axis: str, volume: float, efficiency: Efficiency) -> float:
    """Seconds to gather or scatter `volume` bytes over an axis: by fast links, or network cards if those take longer.

    Of devices in several fast domains, those of one domain share what comes from outside (hierarchical collectives).
    """
    size = job.mesh[axis]
    inner = math.prod(job.mesh.get(name, 1) for name in AXES[AXES.index(axis) + 1 :])
    domain = job.fast_domain or job.chip.fast_domain or job.devices // job.mesh.get("replica", 1)
    together = max(1, min(size, domain // inner))
    domains = math.ceil(size / together)
    fast = job.chip.fast_bandwidth * efficiency.network
    if job.chip.torus_dimensions and axis in ("tensor", "sequence"):
        fast /= job.chip.torus_dimensions  # these rings run along one dimension of the torus
    slow = (job.slow_bandwidth or job.chip.slow_bandwidth) * efficiency.network
    within = volume * (together - 1) / together / fast
    beyond = volume * (domains - 1) / domains / (together * slow)
    return max(within, beyond)


def _exposed(job: Job, communication: Mapping[str, float], compute: float, efficiency: Efficiency) -> float:
    """Seconds of communication that do not overlap with computation.

    The exchange of gradients between copies overlaps with the last backward pass, two thirds of a micro-batch; the rest
    with everything. GPUs wait for tensor-parallel sums; on TPU they overlap with the products (Wang et al. 2023).
    """
    copies = sum(communication.get(axis, 0.0) for axis in ("replica", "data"))
    waiting = 0.0 if job.chip.architecture == "tpu" else communication.get("tensor", 0.0)
    steady = sum(communication.values()) - copies - waiting
    hidden = min(efficiency.overlap * steady, compute)
    window = (compute - hidden) * 2 / 3 / job.accumulation
    hidden_copies = min(efficiency.overlap * copies, window)
    return waiting + steady - hidden + copies - hidden_copies
