"""FLOPs and bytes of one device in a training step, from the model and the layout.

Times are roofline.py. Imports no JAX at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from espalier.models.config import ModelConfig
from espalier.models.counts import Product, products, visible_keys
from sharding.mesh import AXES
from sharding.topology import Architecture, Chip

TILE: Mapping[Architecture, int] = {"tpu": 128}
"""Matrices are padded to multiples of it: systolic arrays of 128 × 128 (256 × 256 from v6e on), GPU tiles of 64."""
ATTENTION_BLOCK = 128
"""Keys per block of a fused kernel: a block that is visible in part is computed whole."""
CHUNK_ELEMENTS = 2**24
"""models/vocabulary.py: more scores per device are computed in chunks, and again in the backward pass."""
RECOMPUTED: Mapping[str, Mapping[str, float]] = {
    "none": {},
    "dots": {"attention": 1.0, "elementwise": 1.0},
    "full": {"qkv": 1.0, "attention": 1.0, "out": 1.0, "up": 1.0, "elementwise": 1.0},
}
"""By policy, the part of each product's forward pass that is recomputed. Full has no `down`: only a norm after it needs
its result in the backward pass; without one XLA removes it."""


@dataclass(frozen=True)
class Job:
    """One training step to be timed."""

    model: ModelConfig
    chip: Chip
    sequence_length: int
    batch_rows: int
    """In the whole step: all devices, all micro-batches."""
    mesh: Mapping[str, int]
    """Sizes of AXES; a missing one is 1."""
    accumulation: int = 1
    predicted_fraction: float = 1.0
    """Part of the tokens that reach the head: 1 for causal LM, the masking rate for masked LM."""
    remat: Literal["none", "dots", "full"] = "none"
    scan: bool = False
    optimizer: str = "adamw"
    """A name in training.optimizers.OPTIMIZERS."""
    attention: Literal["fused", "stored"] = "fused"
    """fused: a kernel whose scores stay in the chip; stored: scores of all pairs are written to memory."""
    head: Literal["chunked", "stored", "fused"] = "chunked"
    """Scores over the vocabulary: chunked = float32 and, beyond CHUNK_ELEMENTS, recomputed in the backward pass
    (models/vocabulary.py); stored = float32, computed once; fused = bfloat16, overwritten by their gradient (llm.c)."""
    recomputed: Mapping[str, float] | None = None
    """Overrides `remat`: policies of other programs."""
    fast_domain: int | None = None
    """Overrides the chip's: devices connected by fast links. Unset on TPU = the devices of one replica."""
    slow_bandwidth: float | None = None
    """Overrides the chip's: bytes/s of a device beyond the fast domain."""

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.get(axis, 1) for axis in AXES)

    @property
    def chips(self) -> int:
        """As they are rented."""
        return self.devices // self.chip.devices_per_chip

    @property
    def tokens(self) -> int:
        """Of the whole step."""
        return self.batch_rows * self.sequence_length


def parameters(config: ModelConfig) -> float:
    """Parameters in matrices and tables, to within the norms and biases: models.counts.count_params without JAX."""
    c = config
    layers = sum(product.inputs * product.outputs * product.times for product in _layer_products(c))
    tables = c.vocab_size * (1 if c.tie_word_embeddings else 2) + c.type_vocab_size
    tables += c.max_position_embeddings if c.position_embedding == "learned" else 0
    return layers + tables * c.embedding_width + (c.embedding_width * c.hidden_size if c.embedding_size else 0)


def recomputed(job: Job) -> Mapping[str, float]:
    """Product → the part of its forward pass that is recomputed."""
    if job.recomputed is not None:
        return job.recomputed
    normed = job.remat == "full" and job.model.norm_position != "pre"
    return {**RECOMPUTED[job.remat], "down": 1.0} if normed else RECOMPUTED[job.remat]


def _layer_products(config: ModelConfig) -> list[Product]:
    return [product for product in products(config) if product.name in ("qkv", "out", "up", "down")]


def _padded(size: float, chip: Chip) -> float:
    tile = 256 if chip.name in ("v6e", "tpu7x") else TILE.get(chip.architecture, 64)
    return math.ceil(size / tile) * tile


def _head_again(job: Job, tensor: int) -> bool:
    tokens = job.tokens / (job.devices / tensor) / job.accumulation * job.predicted_fraction
    return job.head == "chunked" and tokens * job.model.padded_vocab_size / tensor > CHUNK_ELEMENTS


def matmul_flops(job: Job, again: Mapping[str, float], tensor: int) -> float:
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


def attention_flops(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of one token on one device. A fused backward pass recomputes the scores: five products to the forward's two."""
    c, length = job.model, job.sequence_length
    size = c.head_size
    if job.chip.architecture == "tpu":
        size = math.ceil(size / 128) * 128  # the lanes of the vector unit and the edge of the systolic array
    total = 0.0
    for kind in c.layers:
        if job.attention == "fused":
            keys = min(visible_keys(c, kind, length) + ATTENTION_BLOCK, length)
            passes = 1 + 2.5 + again.get("attention", 0.0)
        else:
            keys, passes = length, 3 + again.get("attention", 0.0)
        total += passes * 4 * c.num_attention_heads * size * keys
    return total / tensor


def product_bytes(config: ModelConfig, tensor: int) -> float:
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


def layer_bytes(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of one token on one device in all layers, forward and backward (twice as much); scores where they are stored."""
    c = job.model
    total = _elementwise_bytes(c, tensor) * (3 + again.get("elementwise", 0.0))
    if job.attention == "stored":
        # Float32 scores written and read twice, probabilities written and read: 16 bytes; backward 18, dropout 6.
        pair = 16 * (1 + again.get("attention", 0.0)) + 18 + 6 * (c.attention_dropout > 0)
        total += c.num_attention_heads / tensor * job.sequence_length * pair
    return c.num_hidden_layers * total


def vocabulary_bytes(job: Job, tensor: int) -> float:
    """Of one token on one device: its scores over the vocabulary, forward and backward.

    Float32, written and read twice; backward reads them, writes their gradient in bfloat16 and reads that twice. Fused:
    written, read, overwritten, read twice, all in bfloat16.
    """
    scores = 10 if job.head == "fused" else 12 * (1 + _head_again(job, tensor)) + 10
    return scores * job.predicted_fraction * job.model.padded_vocab_size / tensor


def weight_bytes(job: Job, again: Mapping[str, float], tensor: int) -> float:
    """Of a step on one device: bfloat16 weights read in each pass, float32 gradients written, cast and summed up."""
    weights = parameters(job.model) / tensor
    local = weights / job.mesh.get("fsdp", 1)
    passes = 2 + bool(again)
    sliced = 4 * passes if job.scan and job.chip.architecture != "tpu" else 0  # XLA:GPU copies a layer out of the stack
    micro = weights * (2 * passes + 4 + sliced) + local * (6 + (8 if job.accumulation > 1 else 0))
    return job.accumulation * micro


def optimizer_flops(config: ModelConfig, of_matrix: Callable[[int, int], float]) -> float:
    """What a step computes for the matrices of the layers. of_matrix: (rows, columns) → FLOPs for one."""
    c = config
    D, F, heads, keys = (
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads * c.head_size,
        c.kv_heads * c.head_size,
    )
    total = 0.0
    for width, count in ((heads, 2), (keys, 2), (F, 3 if c.gated_mlp else 2)):
        total += count * of_matrix(D, width)
    return c.num_hidden_layers * total
