"""Learning rates that fall from layer to layer: PyTorch's AdamW with a group for each, over names of Hugging Face."""

import re

import jax
import numpy as np
import pytest
import torch
import toy
from tiny_models import BERT, EVERYTHING, GPT, MODERN, OUTPUT_NORMS, close, random_params
from toy import quick_compilation  # noqa: F401

from espalier.errors import UserError
from espalier.models.families import family_of
from espalier.models.transformer import layer_depths, matrix_axes
from espalier.models.weight_map import export, tensors_of
from espalier.training.config import OptimizerConfig
from espalier.training.optimizer import build_optimizer

RATES = {"learning_rate": 0.01, "muon_learning_rate": 0.02, "weight_decay": 0.1}
DECAY = 0.7


def named(config, head, params) -> dict[str, np.ndarray]:
    """As in a file of Hugging Face."""
    return dict(export(tensors_of(family_of(config.model_type), config, head, params), params))


def torch_depth(name: str, layers: int) -> int:
    """BEiT numbers embeddings 0, layer i i + 1, and what comes after the layers L + 1; here counted from the head."""
    if re.search(r"embeddings|wte|wpe", name):
        return layers + 1
    found = re.search(r"(?:layer|layers|h)\.(\d+)\.", name)
    return layers - int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("config", "head"), [(BERT, "masked_lm"), (GPT, "causal_lm"), (MODERN, "masked_lm")], ids=["bert", "gpt2", "modern"]
)
def test_it_is_adamw_with_a_group_for_each_layer(config, head):
    params = random_params(config, (head,))
    gradients = [random_params(config, (head,), seed=seed) for seed in (1, 2, 3)]
    settings = OptimizerConfig(layer_decay=DECAY, no_decay="", clip_norm=0.0)
    optimizer = build_optimizer(settings, params, matrix_axes(params), depths=layer_depths(config, params))
    state, step, new = jax.jit(optimizer.init)(params), jax.jit(optimizer.update), params
    for gradient in gradients:
        new, state, _ = step(gradient, state, new, RATES, 0.5)

    theirs = {name: torch.tensor(value) for name, value in named(config, head, params).items()}
    groups = [
        {"params": [tensor], "lr": 0.005 * DECAY ** torch_depth(name, config.num_hidden_layers)}
        for name, tensor in theirs.items()
    ]
    assert len({group["lr"] for group in groups}) == config.num_hidden_layers + 2
    adamw = torch.optim.AdamW(groups, betas=(settings.b1, settings.b2), eps=settings.eps, weight_decay=0.1)
    for gradient in gradients:
        for name, value in named(config, head, gradient).items():
            theirs[name].grad = torch.tensor(value)
        adamw.step()
    close(named(config, head, new), {name: tensor.numpy() for name, tensor in theirs.items()}, 2e-6)


def test_every_layer_of_a_stack_with_all_parts_has_its_depth():
    """Prefix, periods of two kinds and suffix: the depths of the layers are those of its list of layers, once each."""
    for config in (EVERYTHING, OUTPUT_NORMS):
        depths = layer_depths(config, random_params(config))["layers"]
        found = []
        for section in depths.values():
            for layer in section.values():
                one = {tuple(np.ravel(depth)) for depth in jax.tree.leaves(layer)}
                assert len(one) == 1
                found += one.pop()
        assert sorted(found) == list(range(1, config.num_hidden_layers + 1))


def test_without_it_rates_are_the_numbers_they_were():
    """One is off: the compiled step is the same; and what it needs to know is asked for."""
    params = jax.eval_shape(toy.init_params, jax.random.key(0))
    plain, one = (
        build_optimizer(OptimizerConfig(layer_decay=1.0), params, toy.matrix_axes(params), depths=depths)
        for depths in (None, jax.tree.map(lambda _: 3, params))
    )

    def program(optimizer):
        state = jax.eval_shape(optimizer.init, params)
        return jax.jit(optimizer.update).lower(params, state, params, RATES, 1.0).as_text()

    assert program(plain) == program(one)
    with pytest.raises(UserError, match="not known which layers"):
        build_optimizer(OptimizerConfig(layer_decay=0.9), params, toy.matrix_axes(params))
    for wrong in (0.0, 1.1):
        with pytest.raises(UserError, match="must be above 0 and at most 1; try 0.9"):
            OptimizerConfig(layer_decay=wrong)
