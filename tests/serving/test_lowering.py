"""A decoding step lowered for accelerators that are not there: its kernels take the stacks of all layers as they are.

A slice of a stack would be copied before every kernel, which costs more than the kernel itself.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from mobiquant_jax import quant
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.models.kv_cache import KVCache
from mobiquant_jax.ops import decode_layers, sliced_matmul, tile_weight
from mobiquant_jax.ops.sliced_matmul import gpu
from mobiquant_jax.serving import one_call, prepare

LAYERS = 3


def lowered(model, implementation, platform):
    """The step as text."""
    packed = prepare(model, jnp.bfloat16, implementation)
    arguments = packed.variables, jnp.ones((2, 1), jnp.int32), KVCache.create(model.config, 2, 8, jnp.bfloat16), 4.0
    return packed, jax.jit(packed.decode).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def calls(text, target):
    """Operand types of each call of a kernel."""
    lines = [line for line in text.splitlines() if "custom_call" in line and target in line]
    return [re.findall(r"tensor<([^>]*)>", line.rpartition(" : (")[2].partition(") -> ")[0]) for line in lines]


def mlir_type(array):
    names = {jnp.dtype(jnp.uint32): "ui32", jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.int16): "i16"}
    return "x".join(map(str, array.shape)) + "x" + names[array.dtype]


def check_no_copies(text, found, arrays, kernels):
    """Every array is an operand of a kernel, whole, and nothing makes a slice of it."""
    assert len(found) == kernels
    operands = [operand for call in found for operand in call]
    for array in arrays:
        assert array.shape[0] == LAYERS and mlir_type(array) in operands
        cut = re.search(rf"stablehlo\.(dynamic_slice|slice|gather)[^\n]*\(tensor<{mlir_type(array)}>", text)
        assert cut is None, cut and cut.group(1)


def test_cuda_kernels_take_whole_stacks(random_elastic, monkeypatch):
    monkeypatch.setattr(gpu, "check_supported", lambda *_: None)
    monkeypatch.setattr(gpu, "ffi_targets", lambda _: {"decode": "our_decode", "prefill": "our_prefill"})
    packed, text = lowered(random_elastic(0, num_hidden_layers=LAYERS), "gpu", "cuda")
    weights = [site.weight for site in packed.variables.sites.values()]
    arrays = [array for weight in weights for array in (*weight.planes, weight.affine)]
    check_no_copies(text, calls(text, "our_decode"), arrays, kernels=4)


@pytest.mark.parametrize(("dtype", "made"), [("bfloat16", "bf16"), (jnp.bfloat16, "bf16"), ("float16", "f32")])
def test_a_cuda_prefill_makes_the_type_asked_for_and_has_room_for_its_plan(dtype, made, monkeypatch):
    monkeypatch.setattr(gpu, "check_supported", lambda *_: None)
    monkeypatch.setattr(gpu, "ffi_targets", lambda _: {"decode": "our_decode", "prefill": "our_prefill"})
    weights = [jax.vmap(lambda kernel: quant.round_to_nearest(kernel, 64))(jnp.ones((1, 192, n))) for n in (48, 16)]
    matmul = partial(sliced_matmul, implementation="gpu", dtype=dtype)
    arguments = jnp.ones((100, 192), jnp.bfloat16), tile_weight(weights), jnp.ones((2, 100), jnp.int32)
    text = jax.jit(matmul).trace(*arguments, layer=jnp.int32(0)).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "our_prefill" in line]
    results = re.findall(r"tensor<([^>]*)>", call.rpartition(") -> ")[2])
    assert results == [f"100x64x{made}", f"{gpu.plan_integers(100)}xi32", f"2x{gpu.packed_rows(100)}x256xbf16"]


def test_a_cuda_step_in_one_call_takes_whole_stacks(random_elastic, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (one_call, decode_layers):
        monkeypatch.setattr(module, "check_supported", lambda *_: None)
    monkeypatch.setattr(decode_layers, "_register", lambda _: "our_layers")
    packed, text = lowered(random_elastic(0, num_hidden_layers=LAYERS), "gpu", "cuda")
    sites = packed.variables.sites.values()
    arrays = [array for site in sites for array in (*site.weight.planes, site.weight.affine, site.router.hidden)]
    check_no_copies(text, calls(text, "our_layers"), arrays, kernels=1)
    config = packed.config
    (operands,) = calls(text, "our_layers")  # each further array would cost a step one more small kernel
    for place, made in (1, f"2x2x{config.head_dim // 2}xf32"), (7, f"{LAYERS}x7x2xf32"):  # cosine, sine; thresholds
        assert operands[place] == made and operands.count(made) == 1


def test_tpu_kernels_take_whole_stacks(random_elastic, monkeypatch):
    sizes = dict(hidden_size=2048, intermediate_size=2048, num_hidden_layers=LAYERS, head_dim=512)
    elastic = ElasticConfig(group_size=128, router_hidden_size=8)
    model = random_elastic(0, elastic, **sizes)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    packed, text = lowered(model, "tpu", "tpu")
    linears = [linear for site in packed.variables.sites.values() for linear in site.weight.linears]
    arrays = [array for linear in linears for array in (*linear.planes, linear.scale, linear.zero)]
    check_no_copies(text, calls(text, "tpu_custom_call"), arrays, kernels=7)


def test_a_copied_slice_would_be_seen(random_elastic):
    packed, text = lowered(random_elastic(0, num_hidden_layers=LAYERS), "reference", "cpu")
    plane = packed.variables.sites["down"].weight.linears[0].planes[0]
    with pytest.raises(AssertionError, match="dynamic_slice"):
        check_no_copies(text, [[mlir_type(plane)]], [plane], kernels=1)
