"""The CUDA decode kernel itself, compiled for the CPU with a thread for each lane, against float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.ops import tile_weight
from mobiquant_jax.ops.sliced_matmul import gpu

HERE = Path(__file__).parent / "cuda_on_cpu"
WARPS = 3
# Rounding to 16 bits within a group of 128 costs at most sqrt(128 / 12) / 32639 = 1e-4 of its largest input's part.
LIMIT = 2e-4


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that gives the kernel for so many groups in a block."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("decode.cuh", "common.cuh"):
        shutil.copy(gpu.SOURCE.parent / name, folder)
    for path in HERE.iterdir():
        shutil.copy(path, folder)

    def compile_for(groups):
        library = folder / f"decode{groups}.so"
        if not library.exists():
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-DMOBIQUANT_GROUPS={groups}"]
            flags += [f"-DMOBIQUANT_WARPS={WARPS}", f"-I{folder}"]
            subprocess.run(["g++", *flags, "-o", str(library), str(folder / "decode.cpp")], check=True)
        kernel = ctypes.CDLL(str(library)).decode
        kernel.restype = ctypes.c_bool
        return kernel

    return compile_for


def run(kernel, tiled, x, depths, layer, splits, walkers, expected=None, prefetch=0):
    """The product, and the bytes that were fetched ahead."""
    planes = [np.ascontiguousarray(plane) for plane in tiled.planes]
    affine, layer = np.ascontiguousarray(tiled.affine), np.array([layer], np.int32)
    tokens, inputs = x.shape
    tiles, blocks = planes[0].shape[1:3]
    x, depths = np.asarray(x).view(np.uint16), np.ascontiguousarray(depths, np.int32)
    out = np.full((splits, tokens, tiles * 16), np.nan, np.float32)
    ends = np.cumsum(tiled.segment_tiles)
    sizes = [tiles, blocks, tokens, inputs, splits, walkers, len(planes[0]), prefetch, len(ends), *ends]
    sizes, fetched = np.array(sizes, np.int32), None if expected is None else np.array([expected], np.int32)
    pointers = (ctypes.c_void_p * len(planes))(*(plane.ctypes.data for plane in planes))
    arrays = (affine, layer, x, depths, out, sizes)
    hint = ctypes.c_void_p(None if fetched is None else fetched.ctypes.data)
    assert kernel(pointers, *(ctypes.c_void_p(array.ctypes.data) for array in arrays), hint), "an access was wrong"
    starts = ends - tiled.segment_tiles
    parts = [out[:, :, 16 * s : 16 * s + n] for s, n in zip(starts, tiled.segments, strict=True)]
    return np.concatenate(parts, axis=2).sum(0), None if fetched is None else fetched.item()


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group_size", "splits", "walkers"),
    [
        (1, 160, (40, 16), 32, 1, 1),  # fewer blocks than warps, padding on both sides, several tiles added up at once
        (3, 640, (16, 32), 128, 1, 2),  # blocks that do not fill the last round
        (6, 384, (48,), 64, 2, 2),
        (13, 640, (16, 16, 16), 128, 3, 1),
        (16, 192, (24,), 64, 1, 1),
    ],
)
def test_matches_float64(
    tokens, inputs, outputs, group_size, splits, walkers, compiled, stacked_weights, exact_product
):
    rng = np.random.default_rng(tokens)
    weights = stacked_weights(rng, 2, inputs, outputs, group_size)
    x = jnp.asarray(rng.normal(loc=0.1, size=(tokens, inputs)), jnp.bfloat16).at[0, 5].multiply(500.0)
    depths = rng.integers(1, 5, (len(outputs), tokens))
    got, _ = run(compiled(128 // group_size), tile_weight(weights), x, depths, 1, splits, walkers)
    want = exact_product(x, weights, depths, 1)
    for t in range(tokens):
        assert np.linalg.norm(got[t] - want[t]) / np.linalg.norm(want[t]) < LIMIT


def test_a_token_next_to_nothing_and_one_that_is_not_finite(compiled, stacked_weights, exact_product):
    rng = np.random.default_rng(0)
    weights = stacked_weights(rng, 1, 256, (16,))
    x = jnp.asarray(rng.normal(size=(3, 256)), jnp.bfloat16).at[0].multiply(1e-20).at[1, 3].set(jnp.inf)
    depths = np.array([[4, 2, 3]])
    got, _ = run(compiled(1), tile_weight(weights), x, depths, 0, 1, 1)
    want = exact_product(x[::2], weights, depths[:, ::2], 0)
    assert (np.linalg.norm(got[::2] - want, axis=1) < LIMIT * np.linalg.norm(want, axis=1)).all()
    assert not np.isfinite(got[1]).any()


@pytest.mark.parametrize(
    ("expected", "budget", "pieces", "scales"),
    [
        (1, 1 << 20, 12, 12),  # all of the first slice, its scales with it
        (3, 1 << 20, 36, 12),
        (99, 1 << 20, 48, 12),  # as many slices as there are
        (-3, 1 << 20, 12, 12),
        (2, 17 * 512 + 100, 17, 12),  # up to a part of a tile
        (2, 3 * 512, 3, 3),
        (4, 0, 0, 0),
        (2, 12 * 512, 12, 12),
        (4, 12 * 512, 18, 12),  # half as much again where three or four are expected, of any slice
        (4, 4 * 512, 6, 6),
        (4, 3 * 512, 4, 4),  # before another tile is begun
    ],
)
@pytest.mark.parametrize("group_size", [32, 128])
def test_what_is_fetched_ahead_lies_in_the_weights_and_changes_nothing(
    expected, budget, pieces, scales, group_size, compiled, stacked_weights
):
    rng = np.random.default_rng(0)
    tiled = tile_weight(stacked_weights(rng, 2, 512, (24, 16), group_size))
    x, depths = jnp.asarray(rng.normal(size=(2, 512)), jnp.bfloat16), np.array([[1, 3], [4, 2]])
    kernel = compiled(128 // group_size)
    plain, _ = run(kernel, tiled, x, depths, 1, 1, 1)
    got, fetched = run(kernel, tiled, x, depths, 1, 1, 1, expected, budget)
    np.testing.assert_array_equal(got, plain)
    assert fetched == pieces * 512 + scales * (128 // group_size) * 64


def test_a_split_without_inputs_fetches_nothing(compiled, stacked_weights, exact_product):
    rng = np.random.default_rng(1)
    weights = stacked_weights(rng, 1, 512, (16,))
    x, depths = jnp.asarray(rng.normal(size=(1, 512)), jnp.bfloat16), np.array([[2]])
    got, fetched = run(compiled(1), tile_weight(weights), x, depths, 0, 3, 1, 2, 1 << 20)  # 4 blocks: 2, 2 and none
    want = exact_product(x, weights, depths, 0)
    assert np.linalg.norm(got - want) < LIMIT * np.linalg.norm(want)
    assert fetched == 2 * 4 * 512 + 4 * 64
