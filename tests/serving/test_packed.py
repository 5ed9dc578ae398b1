"""The served model against the Linen model it was packed from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.ops import TiledWeight
from mobiquant_jax.serving import device_bytes, generate, prepare
from mobiquant_jax.serving.site import of_sites


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def model(request, random_elastic):
    return random_elastic(int(request.param), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def packed(model):
    """In the layout of the CUDA kernels, multiplied by XLA."""
    made = prepare(model, jnp.float32, "gpu")
    sites = {name: replace(site, implementation=None) for name, site in made.variables.sites.items()}
    assert all(isinstance(site.weight, TiledWeight) for site in sites.values())
    return replace(made, variables=replace(made.variables, sites=sites))


def test_prefill_and_steps_match_the_linen_model(model, packed):
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, 97, (3, 11)))
    want_decode, got_decode = jax.jit(model.decode), jax.jit(packed.decode)
    bits = jnp.asarray([3.7, 5.0, 2.0])
    want_cache = got_cache = KVCache.create(model.config, 3, 16)
    for part in (tokens[:, :8], tokens[:, 8:9], tokens[:, 9:10]):
        want, want_bits, want_cache = want_decode(model.variables, part, want_cache, bits)
        got, got_bits, got_cache = got_decode(packed.variables, part, got_cache, bits)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(jnp.abs(want).max()))
        np.testing.assert_allclose(got_bits, want_bits, rtol=1e-5)
        np.testing.assert_array_equal(got_cache.length, want_cache.length)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got_cache, want_cache)
    assert np.ptp(np.asarray(got_bits)) > 0, "the tokens must use different bits"


def test_a_request_alone_and_in_a_batch_gives_the_same_tokens(packed):
    rng = np.random.default_rng(5)
    prompts, lengths, bits = rng.integers(0, 97, (3, 9)), np.array([9, 4, 6]), np.array([2.5, 6.0, 4.0])
    together = generate(
        packed.decode, packed.variables, packed.config, prompts, lengths, bits=bits, max_new_tokens=6, eos_token_ids=()
    )
    for i in (1,):  # each length is another program
        alone = generate(
            packed.decode,
            packed.variables,
            packed.config,
            prompts[i : i + 1, : lengths[i]],
            lengths[i : i + 1],
            bits=bits[i : i + 1],
            max_new_tokens=6,
            eos_token_ids=(),
        )
        assert alone.tokens[0].tolist() == together.tokens[i].tolist()
        np.testing.assert_allclose(alone.mean_bits[0], together.mean_bits[i], rtol=1e-5)


def test_changing_bits_compiles_nothing(packed):
    decode = jax.jit(packed.decode)
    cache = KVCache.create(packed.config, 2, 4)
    tokens = jnp.ones((2, 1), jnp.int32)
    used = [float(decode(packed.variables, tokens, cache, jnp.full(2, bits))[1].mean()) for bits in (2.0, 4.0, 8.0)]
    assert used[0] == 2.0 and used[2] == 8.0 and decode._cache_size() == 1


def test_where_no_cuda_kernel_will_run_the_checkpoints_planes_are_read_in_place(model):
    slices = model.variables["slices"]["layers"]["attention"]
    for implementation in (None, "reference", "tpu"):
        weight = prepare(model, jnp.float32, implementation).variables.sites["qkv"].weight
        assert weight.segments == (64, 32, 32) and weight.in_features == 64 and weight.layers == 2
        for linear, name in zip(weight.linears, ("q_proj", "k_proj", "v_proj"), strict=True):
            assert all(a is b for a, b in zip(linear.planes, slices[name]["weight"].planes, strict=True))


@pytest.mark.parametrize(("implementation", "message"), [("gpu", "need a Hopper GPU"), ("tpu", "on a TPU")])
def test_the_implementation_reaches_the_matmul(model, implementation, message):
    forced = prepare(model, jnp.float32, implementation)
    cache = KVCache.create(model.config, 1, 2)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(forced.decode, forced.variables, jnp.ones((1, 1), jnp.int32), cache, 4.0)


def test_an_unquantized_model_is_refused(model):
    dense = replace(model, elastic=None)
    assert isinstance(dense, ElasticModel)
    with pytest.raises(ValueError, match="unquantized"):
        prepare(dense)


def test_an_array_of_some_linears_is_not_shared_out():
    shares = {name: part.shape for name, part in of_sites(jnp.zeros((2, 7, 3))).items()}
    assert shares == {"qkv": (2, 3, 3), "o": (2, 1, 3), "gate_up": (2, 2, 3), "down": (2, 1, 3)}
    with pytest.raises(ValueError, match="of 6 linears, not 7"):
        of_sites(jnp.zeros((2, 6, 3)))


def test_bytes_of_the_arrays():
    assert device_bytes({"a": jnp.zeros((3, 5), jnp.uint32), "b": (jnp.zeros(2, jnp.bfloat16),)}) == 64
