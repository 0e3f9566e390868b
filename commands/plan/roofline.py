"""How long a training step takes, by analysis: arithmetic, memory and network of one device, added up.

A roofline in the sense of Williams et al. 2009 and of "How to Scale Your Model" (Austin et al. 2025): every part is an
amount (FLOPs, bytes) that follows from the model, divided by a rate (the chip's, sharding/topology.py) times an
efficiency. The efficiencies are the seven numbers of `Efficiency`, fitted on half of the published runs in
commands/plan/runs.py and tested on the other half. Imports no JAX at the top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.config import ModelConfig
from models.counts import Product, flops_per_token, products, visible_keys
from sharding.mesh import AXES
from sharding.topology import Architecture, Chip


@dataclass(frozen=True)
class Efficiency:
    """What is reached of what the data sheet says. Fitted: `python -m commands.plan.published --fit`."""

    tpu: float = 0.94
    """Of the peak, in a large matrix product on a TPU."""
    ampere: float = 0.82
    """The same on NVIDIA's A100, and assumed of other GPUs up to it: Volta, Turing, Ada."""
    hopper: float = 0.66
    """The same on H100 and H200, whose power limit keeps them from their clock; assumed of Blackwell too."""
    attention: float = 0.31
    """A fused attention kernel, relative to a large matrix product."""
    memory: float = 0.38
    """Of the memory bandwidth, were every operation of a layer outside its products to read and write each activation
    only as often as `_layer_bytes` counts: programs move more, and not at full speed."""
    network: float = 0.40
    """Of the bandwidth of links and network cards."""
    overlap: float = 0.78
    """Of communication, the part that runs behind computation where there is enough of it."""


FITTED = Efficiency()
SPREAD = 0.20
"""The printed range is ± this part of the time: 9 of 10 held-out runs lie within (tests/test_plan_roofline.py)."""

TILE: Mapping[Architecture, int] = {"tpu": 128}
"""Matrices are padded to multiples of it: systolic arrays of 128 × 128 (256 × 256 from v6e on), GPU tiles of 64."""
ATTENTION_BLOCK = 128
"""Keys that a fused kernel treats as one: of a block that is seen in part, all is computed."""
STREAM = 0.85
"""Of the memory bandwidth, reading and writing long arrays: weights, optimizer state, scores over the vocabulary. What
BabelStream and similar copies reach on GPUs and TPUs."""
LAUNCH_SECONDS = 2e-6
"""From the end of one kernel to the start of the next."""
KERNELS_PER_LAYER = 20
"""In a forward pass; twice as many in the backward pass."""
HOP_SECONDS = 5e-6
"""What a collective takes beside its bytes, for each doubling of its devices."""
CHUNK_ELEMENTS = 2**24
"""models/vocabulary.py: beyond so many scores a device, they are formed in chunks and anew in the backward pass."""

RECOMPUTED: Mapping[str, Mapping[str, float]] = {
    "none": {},
    "dots": {"attention": 1.0, "elementwise": 1.0},
    "full": {"qkv": 1.0, "attention": 1.0, "out": 1.0, "up": 1.0, "elementwise": 1.0},
}
"""By policy, the part of each product's forward pass that runs again. Full has no `down`: only a norm behind it needs
its result in the backward pass; without one XLA drops it."""


@dataclass(frozen=True)
class Job:
    """One training step to be timed."""

    model: ModelConfig
    chip: Chip
    sequence_length: int
    batch_rows: int
    """Of the whole step: all devices, all micro-batches."""
    mesh: Mapping[str, int]
    """Sizes of AXES; one that is not named is 1."""
    accumulation: int = 1
    predicted_fraction: float = 1.0
    """Part of the tokens that reach the head: 1 for causal LM, the masking rate for masked LM."""
    remat: Literal["none", "dots", "full"] = "none"
    scan: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    attention: Literal["flash", "xla"] = "flash"
    """flash: scores stay in the chip (splash, cuDNN); xla: they are written to memory, all pairs of them."""
    head: Literal["chunked", "stored", "fused"] = "chunked"
    """How scores over the vocabulary are treated: chunked = float32 and, beyond CHUNK_ELEMENTS, formed anew in the
    backward pass (models/vocabulary.py); stored = float32, formed once; fused = bfloat16, turned into their gradient in
    place (llm.c)."""
    recomputed: Mapping[str, float] | None = None
    """Instead of `remat`'s: other programs' policies."""
    fast_domain: int | None = None
    """Instead of the chip's: devices that fast links join. Unset on TPU = the devices of one replica."""
    slow_bandwidth: float | None = None
    """Instead of the chip's: bytes/s of a device beyond the fast domain."""

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.get(axis, 1) for axis in AXES)

    @property
    def tokens(self) -> int:
        """Of the whole step."""
        return self.batch_rows * self.sequence_length


@dataclass(frozen=True)
class StepTime:
    """Where a step's seconds go; the first six add up to `step`. Rates are per second, `chip` means what is rented."""

    matmul: float
    attention: float
    memory: float
    """Activations and weights between chip and HBM."""
    optimizer: float
    launch: float
    """Gaps between kernels."""
    network: float
    """What of the communication is not hidden behind computation."""
    communication: Mapping[str, float]
    """Seconds that each axis' links are busy, hidden or not."""
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
    """What a number of tokens takes at a speed."""

    days: float
    chip_hours: float
    cost: float | None
    """In the currency of the price; None without one."""


def step_time(job: Job, efficiency: Efficiency = FITTED) -> StepTime:
    """The time of one optimizer step of `job`, all its micro-batches included."""
    chip, tensor = job.chip, job.mesh.get("tensor", 1)
    assert set(job.mesh) <= set(AXES), f"mesh axes {sorted(job.mesh)}"
    again = _again(job)
    tokens = job.tokens * tensor / job.devices
    rate = chip.flops * chip.sustained_clock * _matmul_efficiency(chip, efficiency)
    stream = chip.memory_bandwidth * STREAM

    # Operands stream in behind the arithmetic; small matrices are bound by that stream.
    streamed = (
        tokens * _product_bytes(job.model, tensor) * 3 + _weight_bytes(job, again, tensor)
    ) / chip.memory_bandwidth
    matmul = max(tokens * _matmul_flops(job, again, tensor) / rate, streamed)
    attention = tokens * _attention_flops(job, again, tensor) / (rate * efficiency.attention)
    memory = tokens * _layer_bytes(job, again, tensor) / (chip.memory_bandwidth * efficiency.memory)
    memory += (tokens * _vocabulary_bytes(job, tensor) + _weight_bytes(job, again, tensor)) / stream
    shard = parameters(job.model) / (tensor * job.mesh.get("fsdp", 1))
    # AdamW reads parameter, gradient and two moments and writes all but the gradient; clipping reads the gradient once.
    optimizer = shard * 4 * (8 if job.optimizer == "adamw" else 6) / stream
    if job.optimizer == "muon":
        optimizer += _muon_flops(job.model) / (tensor * job.mesh.get("fsdp", 1)) / rate
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


def bill(time: StepTime, job: Job, total_tokens: float, price_per_chip_hour: float | None = None) -> Bill:
    """Days, chip-hours and cost of training on total_tokens without a pause."""
    hours = total_tokens / time.tokens_per_second / 3600
    chip_hours = hours * job.devices / job.chip.devices_per_chip
    cost = None if price_per_chip_hour is None else chip_hours * price_per_chip_hour
    return Bill(hours / 24, chip_hours, cost)


def parameters(config: ModelConfig) -> float:
    """Parameters in matrices and tables, to within the norms and biases: models.counts.count_params without JAX."""
    c = config
    layers = sum(product.inputs * product.outputs * product.times for product in _layer_products(c))
    tables = c.vocab_size * (1 if c.tie_word_embeddings else 2) + c.type_vocab_size
    tables += c.max_position_embeddings if c.position_embedding == "learned" else 0
    return layers + tables * c.embedding_width + (c.embedding_width * c.hidden_size if c.embedding_size else 0)


def _again(job: Job) -> Mapping[str, float]:
    if job.recomputed is not None:
        return job.recomputed
    normed = job.remat == "full" and job.model.norm_position != "pre"
    return {**RECOMPUTED[job.remat], "down": 1.0} if normed else RECOMPUTED[job.remat]


def _layer_products(config: ModelConfig) -> list[Product]:
    return [product for product in products(config) if product.name in ("qkv", "out", "up", "down")]


def _matmul_efficiency(chip: Chip, efficiency: Efficiency) -> float:
    if chip.architecture == "tpu":
        return efficiency.tpu
    return efficiency.hopper if chip.architecture in ("hopper", "blackwell") else efficiency.ampere


def _padded(size: float, chip: Chip) -> float:
    tile = 256 if chip.name in ("v6e", "tpu7x") else TILE.get(chip.architecture, 64)
    return math.ceil(size / tile) * tile


def _head_again(job: Job, tensor: int) -> bool:
    tokens = job.tokens / (job.devices / tensor) / job.accumulation * job.predicted_fraction
    return job.head == "chunked" and tokens * job.model.padded_vocab_size / tensor > CHUNK_ELEMENTS


def _matmul_flops(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of one token on one device, padding and recomputation included."""
    total = 0.0
    for product in products(job.model, job.predicted_fraction):
        inputs = product.inputs / (tensor if product.split == "inputs" else 1)
        outputs = product.outputs / (tensor if product.split == "outputs" else 1)
        passes = 3 + again.get(product.name, 0.0)
        if product.name == "vocabulary":
            passes += _head_again(job, tensor)
        total += passes * 2 * _padded(inputs, job.chip) * _padded(outputs, job.chip) * product.times
    return total


def _attention_flops(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of one token on one device. A fused backward pass forms the scores anew: five products to the forward's two."""
    c, length = job.model, job.sequence_length
    size = c.head_size
    if job.chip.architecture == "tpu":
        size = math.ceil(size / 128) * 128  # the lanes of the vector unit and the edge of the systolic array
    total = 0.0
    for kind in c.layers:
        if job.attention == "flash":
            keys = min(visible_keys(c, kind, length) + ATTENTION_BLOCK, length)
            passes = 1 + 2.5 + again.get("attention", 0.0)
        else:
            keys, passes = length, 3 + again.get("attention", 0.0)
        total += passes * 4 * c.num_attention_heads * size * keys
    return total / tensor


def _product_bytes(config: ModelConfig, tensor: int) -> float:
    """Inputs and outputs, in bfloat16, of the layers' products in a token's forward pass."""
    total = 0.0
    for product in _layer_products(config):
        inputs = product.inputs / (tensor if product.split == "inputs" else 1)
        outputs = product.outputs / (tensor if product.split == "outputs" else 1)
        total += 2 * (inputs + outputs) * product.times
    return total


def _elementwise_bytes(config: ModelConfig, tensor: int) -> float:
    """What a layer's forward pass reads and writes for a token in bfloat16, outside the products and scores.

    Two norms (read, write), two residual sums (read two, write one), what dropout adds, rotation, activation.
    """
    c = config
    heads, keys = c.num_attention_heads * c.head_size, c.kv_heads * c.head_size
    total = c.hidden_size * (10.0 + 4 * (c.norm_position == "both") + 4 * (c.hidden_dropout > 0))
    if c.position_embedding == "rotary":
        total += 2 * (heads + keys) / tensor
    return 2 * (total + c.intermediate_size * (3 if c.gated_mlp else 2) / tensor)


def _layer_bytes(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of one token on one device in all layers, forward and backward (twice as much); scores where they are stored."""
    c = job.model
    total = _elementwise_bytes(c, tensor) * (3 + again.get("elementwise", 0.0))
    if job.attention == "xla":
        # Float32 scores written and read twice, probabilities written and read: 16 bytes; backward 18, dropout 6.
        pair = 16 * (1 + again.get("attention", 0.0)) + 18 + 6 * (c.attention_dropout > 0)
        total += c.num_attention_heads / tensor * job.sequence_length * pair
    return c.num_hidden_layers * total


def _vocabulary_bytes(job: Job, tensor: int) -> float:
    """Of one token on one device: its scores over the vocabulary, forward and backward.

    Float32, written and read twice; backward reads them, writes their gradient in bfloat16 and reads that twice. Fused:
    written, read, overwritten, read twice, all in bfloat16.
    """
    scores = 10 if job.head == "fused" else 12 * (1 + _head_again(job, tensor)) + 10
    return scores * job.predicted_fraction * job.model.padded_vocab_size / tensor


def _weight_bytes(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of a step on one device: bfloat16 weights read in each pass, float32 gradients written, cast and summed up."""
    weights = parameters(job.model) / tensor
    local = weights / job.mesh.get("fsdp", 1)
    passes = 2 + bool(again)
    sliced = 4 * passes if job.scan and job.chip.architecture != "tpu" else 0  # XLA:GPU copies a layer out of the stack
    micro = weights * (2 * passes + 4 + sliced) + local * (6 + (8 if job.accumulation > 1 else 0))
    return job.accumulation * micro


def _muon_flops(config: ModelConfig) -> float:
    """Five Newton-Schulz steps for every matrix of the layers (Jordan et al. 2024): X Xᵀ, its square, the product."""
    c = config
    D, F, heads, keys = (
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads * c.head_size,
        c.kv_heads * c.head_size,
    )
    total = 0.0
    for width, count in ((heads, 2), (keys, 2), (F, 3 if c.gated_mlp else 2)):
        short, long = sorted((D, width))
        total += count * 5 * (4 * short * short * long + 2 * short**3)
    return c.num_hidden_layers * total


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
    """Seconds of communication that computation does not hide.

    Gradients between copies travel behind the last backward pass, two thirds of a micro-batch; the rest behind
    everything. A GPU waits for tensor-parallel sums; on TPU they run piecewise beside the products (Wang et al. 2023).
    """
    copies = sum(communication.get(axis, 0.0) for axis in ("replica", "data"))
    waiting = 0.0 if job.chip.architecture == "tpu" else communication.get("tensor", 0.0)
    steady = sum(communication.values()) - copies - waiting
    hidden = min(efficiency.overlap * steady, compute)
    window = (compute - hidden) * 2 / 3 / job.accumulation
    hidden_copies = min(efficiency.overlap * copies, window)
    return waiting + steady - hidden + copies - hidden_copies
