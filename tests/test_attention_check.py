"""A kernel that does not compute what the reference does on the device that is here is not chosen."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from tiny_models import BERT

from espalier.models import attention
from espalier.models.attention import choose_backend
from espalier.models.attention_backend import Use
from espalier.models.attention_check import disagreement
from espalier.models.attention_spec import Places
from espalier.models.attention_triton import TRITON, triton_attention

RIGHT = dataclasses.replace(TRITON, run=functools.partial(triton_attention, interpret=True))
USE = Use.of(BERT, 512, dtype="bfloat16", dropping=False, platform="gpu", capability=9.0, parts=1)


def across(q, k, v, spec, places, rate, key):
    """As the kernel, but documents see each other."""
    one = (places.q_segments_BT > 0).astype(jnp.int32)
    return RIGHT.run(q, k, v, spec, Places(one, one, places.q_index_BT, places.k_index_BS), rate, key)


def other_gradient(q, k, v, spec, places, rate, key):
    """The right values; the gradient of keys is a tenth too large."""
    return RIGHT.run(q, k * 1.1 - jax.lax.stop_gradient(k * 0.1), v, spec, places, rate, key)


def breaks(*arguments):
    raise RuntimeError("no kernel image is available for execution on the device\nand more")


WRONG = {
    "agree with the reference on this GPU: its values are off": across,
    "agree with the reference on this GPU: its gradients of keys are off": other_gradient,
    "run on this GPU .no kernel image is available for execution on the device.": breaks,
}


def test_a_kernel_that_is_right_agrees():
    assert disagreement(RIGHT, USE) is None


@pytest.mark.parametrize("words", WRONG)
def test_one_that_is_not_is_passed_over_and_named(words, monkeypatch):
    wrong = dataclasses.replace(TRITON, run=WRONG[words])
    monkeypatch.setattr(attention, "kernels", lambda platform: [wrong])
    # As if the GPU were here.
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    backend, reason = choose_backend("auto", USE)
    assert backend.name == "xla"
    assert re.search(f"triton attention does not {words}", reason)


def test_within_a_trace_and_a_mesh_it_is_tried_apart(monkeypatch):
    monkeypatch.setattr(attention, "kernels", lambda platform: [RIGHT])
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    chosen = []

    @jax.jit
    def step(x):
        chosen.append(choose_backend("auto", dataclasses.replace(USE, length=1024))[0])
        return x

    step(jnp.ones(2))
    assert chosen == [RIGHT]
