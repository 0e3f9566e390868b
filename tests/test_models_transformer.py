"""The stack: who influences whom, packing, the ways to run it, the cache, dropout, meshes, and its numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (  # noqa: F401
    BERT,
    EVERYTHING,
    FAMILIES,
    GPT,
    LLAMA,
    MODERN,
    OUTPUT_NORMS,
    as_jax,
    batch_of,
    close,
    random_params,
    strict_and_quick,
)

from espalier.models.config import Execution
from espalier.models.heads import causal_lm_head, masked_lm_head
from espalier.models.transformer import _dropout_keys, apply, init_cache, init_params, matrix_axes
from espalier.models.vocabulary import token_logprobs
from sharding.mesh import MeshConfig, build_mesh, place_batch
from sharding.rules import shard_params

# ------------------------------------------------------------------------------------------ who influences whom


@pytest.mark.parametrize(
    "config",
    [
        BERT,
        GPT,
        dataclasses.replace(MODERN, prefix_layers=(), layer_period=("local",), first_attention_norm=True),
        dataclasses.replace(LLAMA, num_hidden_layers=3, layer_period=("local",), sliding_window=3),
    ],
    ids=["bidirectional", "causal", "bidirectional window", "causal window"],
)
def test_gradients_reach_exactly_the_tokens_that_may_be_seen(config):
    """In two rows of documents and padding; every token has an id of its own, whose embedding takes the gradient."""
    batch = batch_of(config, [[9, 4, -3], [-2, 11]], 16)
    batch["input_ids"] = np.arange(32, dtype=np.int32).reshape(2, 16)
    params = random_params(config)
    direction = np.random.default_rng(0).normal(size=config.hidden_size).astype(np.float32)

    @jax.jit
    def influence(table):
        def outputs(table):
            embeddings = params["embeddings"] | {"token": {"embedding": table}}
            return (apply(config, params | {"embeddings": embeddings}, batch) @ direction).reshape(32)

        _, pull = jax.vjp(outputs, table)
        return jnp.abs(jax.vmap(lambda output: pull(output)[0])(jnp.eye(32, dtype=jnp.float32))).max(-1)[:, :32]

    segments, row = batch["segment_ids"].reshape(32), np.repeat([0, 1], 16)
    ahead = np.arange(32)[None, :] - np.arange(32)[:, None]
    seen = (segments[:, None] == segments) & (segments != 0) & (row[:, None] == row)
    seen &= (ahead <= 0) if config.causal else True
    if config.sliding_window:
        seen &= (ahead > -config.sliding_window) if config.causal else (np.abs(ahead) <= config.sliding_window // 2)
    reached = np.linalg.matrix_power(seen | np.eye(32, dtype=bool), config.num_hidden_layers)
    if config.sliding_window:
        assert (reached ^ (seen | np.eye(32, dtype=bool))).sum() > 0
    np.testing.assert_array_equal(np.asarray(influence(params["embeddings"]["token"]["embedding"])) > 0, reached)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_equals_its_documents_alone(name):
    config, params = FAMILIES[name], random_params(FAMILIES[name])
    batch = batch_of(config, [[7, 5, 3], [-4, 7], [5], [3]], 16)
    ids = batch["input_ids"]
    ids[1, 4:11], ids[2, :5], ids[3, :3] = ids[0, :7], ids[0, 7:12], ids[0, 12:15]
    x_BTD = np.asarray(jax.jit(functools.partial(apply, config))(params, batch))
    alone = np.concatenate([x_BTD[1, 4:11], x_BTD[2, :5], x_BTD[3, :3]])
    close(x_BTD[0, :15], alone)


# --------------------------------------------------------------------------------------------- the ways to run it


def operations(function, *arguments, name):
    """The operations of this name in a program, inner programs included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == name:
                yield equation
            for leaf in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(leaf, "jaxpr", leaf)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def loss(config, params, batch, execution):
    x_BTD = apply(config, params, batch, execution=execution)
    head = causal_lm_head if config.causal else masked_lm_head
    chunk = 4 * batch["input_ids"].shape[0] * config.padded_vocab_size // max(1, jax.sharding.get_abstract_mesh().size)
    labels = jnp.flip(jnp.asarray(batch["input_ids"]), axis=1)
    scores = head(config, params, x_BTD, execution)
    sizes = dict(vocab_size=config.vocab_size, softcap=config.final_logit_softcapping, chunk_elements=chunk)
    logprob_BT, _ = token_logprobs(*scores, labels, **sizes)
    return -jnp.where(batch["segment_ids"] != 0, logprob_BT, 0.0).sum(), x_BTD


@functools.cache
def problem():
    batch = batch_of(EVERYTHING, [[7, 5], [12], [-3, 9], [4, -1, 6]] * 2, 12)
    batch["token_type_ids"] = (batch["positions"] > 3).astype(np.int32)
    return random_params(EVERYTHING, ("masked_lm",)), batch


def value_and_gradients(params, batch, execution):
    """((loss, hidden states), gradients)."""
    return jax.value_and_grad(loss, argnums=1, has_aux=True)(EVERYTHING, params, batch, execution)


@functools.cache
def plainest_run():
    """Unrolled, nothing recomputed, on one device."""
    return jax.device_get(jax.jit(value_and_gradients, static_argnums=2)(*problem(), Execution(scan_layers=False)))


@pytest.mark.parametrize(
    "execution",
    [Execution(scan_layers=True), Execution(remat="full"), Execution(scan_layers=True, remat="dots")],
    ids=["scan", "remat full", "scan and remat dots"],
)
def test_scan_and_rematerialisation_change_nothing(execution):
    close(jax.jit(value_and_gradients, static_argnums=2)(*problem(), execution), plainest_run())


def test_rematerialisation_recomputes_and_scan_scans():
    def count(name, axis=None, **execution):
        run = functools.partial(value_and_gradients, execution=Execution(**execution))
        found = operations(run, *problem(), name=name)
        return sum(axis is None or operation.params["axis"] == axis for operation in found)

    none, dots, full = (count("dot_general", remat=remat) for remat in ("none", "dots", "full"))
    assert none < dots < full
    scans = [count("scan", scan_layers=scan) for scan in (False, True)]
    assert scans[1] == scans[0] + 2  # One loop forward, one backward.
    # Without a loop the stacked gradients are put together once, not padded to full size once a layer.
    kernels = len(jax.tree.leaves(problem()[0]["layers"]["period"]))
    assert count("split", axis=0, scan_layers=False) == kernels
    assert count("split", axis=0, scan_layers=True) == 0


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_meshes_change_nothing(sizes):
    params, batch = problem()
    mesh = build_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        arguments = (jax.device_put(params, shard_params(params, mesh)), place_batch(batch, mesh))
        program = jax.jit(value_and_gradients, static_argnums=2).lower(*arguments, Execution()).compile()
        close(program(*arguments), plainest_run())
    assert "all-reduce" in program.as_text()


def test_dropout_is_the_same_on_every_mesh_and_in_a_loop():
    params, batch, key = random_params(BERT), batch_of(BERT, [[9]] * 8, 9), jax.random.key(0)

    def run(params, batch, execution):
        return apply(BERT, params, batch, execution=execution, key=key)

    expected = jax.jit(run, static_argnums=2)(params, batch, Execution(scan_layers=False))
    mesh = build_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        arguments = (jax.device_put(params, shard_params(params, mesh)), place_batch(batch, mesh))
        close(jax.jit(run, static_argnums=2)(*arguments, Execution(scan_layers=True)), expected)


def test_a_batch_that_no_mesh_divides_still_runs():
    """One prompt on eight devices, as in generation."""
    params, batch = random_params(LLAMA), batch_of(LLAMA, [[5]], 6)
    expected = jax.jit(functools.partial(apply, LLAMA))(params, batch)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, tensor=4))):
        close(jax.jit(functools.partial(apply, LLAMA))(params, batch), expected)


def test_bfloat16_computes_in_bfloat16_and_differentiates_in_float32(monkeypatch):
    params, batch = random_params(LLAMA), batch_of(LLAMA, [[12]], 12)
    run = jax.value_and_grad(loss, argnums=1, has_aux=True)
    in_bfloat16 = functools.partial(run, LLAMA, batch=batch, execution=Execution(dtype="bfloat16"))
    (value, x_BTD), gradients = jax.jit(in_bfloat16)(params)
    jax.clear_caches()  # what was traced for a CPU
    with monkeypatch.context() as patch:
        patch.setattr("espalier.models.layers.mesh_platform", lambda: "tpu")  # on CPUs some products are widened
        products = operations(in_bfloat16, params, name="dot_general")
    assert {operand.aval.dtype for product in products for operand in product.invars} == {jnp.dtype("bfloat16")}
    assert x_BTD.dtype == jnp.bfloat16 and value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    close(x_BTD.astype(jnp.float32), jax.jit(functools.partial(apply, LLAMA))(params, batch), 3e-2)


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["masked", "causal"])
def test_products_in_bfloat16_leave_the_rest_in_float32(config):
    """Nearer to float32 than all in bfloat16. One device multiplies bfloat16 matrices, several of them float32 ones
    that were rounded: to the same numbers.
    """
    params = random_params(config, ("causal_lm" if config.causal else "masked_lm",))
    batch = batch_of(config, [[12], [7, 4]], 12)
    run = jax.jit(jax.value_and_grad(functools.partial(loss, config), has_aux=True), static_argnames="execution")
    in_bfloat16 = Execution(products="bfloat16")
    (value, x_BTD), gradients = run(params, batch, execution=in_bfloat16)
    operands = {
        jnp.dtype(operand.aval.dtype).name
        for product in operations(
            functools.partial(run, batch=batch, execution=in_bfloat16), params, name="dot_general"
        )
        for operand in product.invars
    }
    assert operands == {"bfloat16", "float32"} and x_BTD.dtype == value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    (_, plain_x_BTD), _ = run(params, batch, execution=Execution())
    (_, all_x_BTD), _ = run(params, batch, execution=Execution(dtype="bfloat16"))

    def far(one, other):
        return np.square(np.float32(one) - np.float32(other))[batch["segment_ids"] != 0].mean() ** 0.5

    assert 0 < far(x_BTD, plain_x_BTD) < far(all_x_BTD, plain_x_BTD)
    mesh = build_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        (split, split_x_BTD), _ = run(
            jax.device_put(params, shard_params(params, mesh)), place_batch(batch, mesh), execution=in_bfloat16
        )
    # A sum in another order moves a factor over the border between two bfloat16 numbers now and then.
    assert far(split_x_BTD, x_BTD) < 0.1 * far(x_BTD, plain_x_BTD) and abs(split - value) < 1e-5 * abs(value)


# ------------------------------------------------------------------------------------------------- cache, dropout


@pytest.mark.parametrize(
    ("config", "scan"),
    [
        (GPT, False),
        (
            dataclasses.replace(
                LLAMA, num_hidden_layers=4, prefix_layers=("global",), layer_period=("local",), sliding_window=5
            ),
            True,
        ),
        (OUTPUT_NORMS, True),
    ],
    ids=["gpt2", "llama with windows, scanned", "norms of outputs, scanned"],
)
def test_decoding_with_the_cache_equals_the_whole_sequence(config, scan):
    """Prompts of 5, 8 and 1 tokens, padded on the left; then four tokens, one at a time."""
    params, batch = random_params(config), batch_of(config, [[-3, 9], [12], [-7, 5]], 12)
    execution = Execution(scan_layers=scan)
    expected = jax.jit(lambda params: apply(config, params, batch))(params)

    @jax.jit
    def go_on(cache, part):
        return apply(config, params, part, execution=execution, cache=cache)

    cache, parts = init_cache(config, 3, 14), []
    for start, end in ((0, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        x_BTD, cache = go_on(cache, {name: array[:, start:end] for name, array in batch.items()})
        parts.append(x_BTD)
    assert int(cache["end"]) == 12
    real = (batch["segment_ids"] != 0)[:, :, None]
    close(np.where(real, np.concatenate(parts, axis=1), 0), np.where(real, expected, 0))


def test_a_cache_that_is_too_small_is_refused():
    batch = batch_of(GPT, [[9]], 9)
    with pytest.raises(AssertionError, match="9 tokens do not fit a cache of 8"):
        apply(GPT, random_params(GPT), batch, cache=init_cache(GPT, 1, 8))


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_only_with_a_key_and_at_every_place(scan):
    params, batch = problem()

    def draws(key, config=EVERYTHING):
        run = functools.partial(apply, config, params, batch, execution=Execution(scan_layers=scan))
        return len(operations(lambda key: run(key=key), key, name="random_bits"))

    # Embeddings once; attention probabilities, attention output and MLP output of each layer that is written out.
    layers = 1 + 1 + 1 if scan else 4
    assert draws(None) == 0
    assert draws(jax.random.key(0)) == 1 + 3 * layers
    assert draws(jax.random.key(0), dataclasses.replace(EVERYTHING, hidden_dropout=0.0)) == layers
    assert draws(jax.random.key(0), dataclasses.replace(EVERYTHING, attention_dropout=0.0)) == 1 + 2 * layers


def test_every_dropout_has_a_key_of_its_own():
    first, layers = _dropout_keys(EVERYTHING, jax.random.key(0))
    keys = [np.asarray(jax.random.key_data(key)).reshape(-1, 2) for key in [first, *jax.tree.leaves(layers)]]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 1 + 3 * EVERYTHING.num_hidden_layers
    params, _ = problem()
    assert {section: set(keys) for section, keys in layers.items()} == {
        section: set(layers) for section, layers in params["layers"].items()
    }


# ------------------------------------------------------------------------------------------------ heads and numbers


@pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modernbert"])
def test_the_head_of_some_positions_equals_the_whole_head_there(config):
    params = random_params(config, ("masked_lm",))
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(2, 10, config.hidden_size)).astype(np.float32)
    positions_BM = np.array([[1, 7, 3], [0, 9, 9]])
    some = np.take_along_axis(x_BTD, positions_BM[:, :, None], axis=1)
    features, table, bias = masked_lm_head(config, params, some, Execution())
    whole, _, _ = masked_lm_head(config, params, x_BTD, Execution())
    close(features, np.take_along_axis(np.asarray(whole), positions_BM[:, :, None], axis=1))
    assert table is params["embeddings"]["token"]["embedding"] and bias is params["head"]["masked_lm"]["bias"]


def test_initial_parameters():
    repeated = dict(prefix_layers=(), suffix_layers=(), first_attention_norm=True)
    config = dataclasses.replace(EVERYTHING, hidden_size=64, intermediate_size=96, **repeated)

    def init(key):
        labelled = dataclasses.replace(config, labels=("a", "b", "c"))
        return init_params(config, key), init_params(labelled, key, ("sequence_classification",))

    params, classifier = jax.device_get(jax.jit(init)(jax.random.key(0)))
    spread = 0.02 * 0.8796  # A normal distribution cut at two standard deviations.
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        expected_mean = {"scale": 1.0}.get(names[-1], 0.0)
        expected_spread = {"scale": 0.0, "bias": 0.0}.get(names[-1], spread)
        if names[-2] in ("out", "down"):
            expected_spread /= 8**0.5
        error = 5 * expected_spread / leaf.size**0.5 + 1e-9
        assert leaf.dtype == np.float32
        assert abs(leaf.mean() - expected_mean) <= error, names
        assert abs(leaf.std() - expected_spread) <= error, names
        if names[1] == "period" and expected_spread:
            assert not np.allclose(leaf[0], leaf[1]), names
    # The trunk is the same whatever stands on it.
    for part in ("embeddings", "layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, params[part], classifier[part])
    assert set(classifier["head"]) == {"sequence_classification"}


def test_layers_whose_outputs_begin_at_0_begin_as_the_identity():
    zero = dataclasses.replace(LLAMA, zero_outputs=True)
    params, plain = (jax.jit(functools.partial(init_params, c))(jax.random.key(0)) for c in (zero, LLAMA))
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(plain), strict=True):
        names = [entry.key for entry in path]
        if names[-2] in ("out", "down"):
            assert not leaf.any() and other.any(), names
        else:
            np.testing.assert_array_equal(leaf, other)
    batch = batch_of(LLAMA, [[7, 2]], 9)
    x_BTD = np.asarray(params["embeddings"]["token"]["embedding"])[batch["input_ids"]]
    root_BT1 = np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + LLAMA.norm_eps)
    close(apply(zero, params, as_jax(batch)), x_BTD / root_BT1)


@pytest.mark.parametrize("config", [EVERYTHING, BERT, LLAMA], ids=["everything", "bert", "llama"])
def test_matrix_axes_multiply_what_the_layers_multiply(config):
    D, N, K, H, F = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size, 48
    sizes = {
        "q": ((D,), (N, H)),
        "kv": ((D,), (K, H)),
        "out": ((N, H), (D,)),
        "up": ((D,), (F,)),
        "gate_up": ((D,), (F,)),
        "down": ((F,), (D,)),
    }
    params = random_params(config, ("masked_lm",) if not config.causal else ("causal_lm",))
    structure = jax.tree.structure(params)
    for (path, leaf), axes in zip(
        jax.tree_util.tree_leaves_with_path(params), structure.flatten_up_to(matrix_axes(params)), strict=True
    ):
        names = [entry.key for entry in path]
        if names[0] == "layers" and names[-1] == "kernel":
            reduction, output = axes
            found = tuple(tuple(leaf.shape[axis] for axis in group) for group in (reduction, output))
            assert found == sizes[names[-2]], names
            rest = set(range(leaf.ndim)) - {*reduction, *output}
            assert len(rest) == (names[1] == "period") + (names[-2] in ("kv", "gate_up"))
        else:
            assert axes is None, names


def test_an_untied_masked_lm_scores_with_a_table_of_its_own():
    config = dataclasses.replace(BERT, tie_word_embeddings=False)
    params = random_params(config, ("masked_lm",))
    _, table, _ = masked_lm_head(config, params, jnp.zeros((1, 2, 32), jnp.float32), Execution())
    assert table is params["head"]["masked_lm"]["kernel"] and table.shape == (config.padded_vocab_size, 32)


def test_output_norms_leave_the_scale_of_what_they_normalise_alone():
    params = jax.jit(functools.partial(init_params, OUTPUT_NORMS))(jax.random.key(0))
    layer = params["layers"]["period"]["0"]
    assert layer.keys() == {"attention", "attention_post_norm", "mlp", "mlp_post_norm"}
    assert layer["attention"]["q_norm"]["scale"].shape == (2, 4, 8)
    assert layer["attention"]["k_norm"]["scale"].shape == (2, 2, 8)
    for matrix in (layer["attention"]["out"], layer["mlp"]["down"]):
        assert 0.8 < matrix["kernel"].std() / (0.02 * 0.8796) < 1.2
