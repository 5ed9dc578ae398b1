"""What comes before the CUDA prefill kernel, compiled for the CPU: every token's every output is made once."""

import ctypes
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mobiquant_jax.ops.sliced_matmul import gpu
from mobiquant_jax.ops.sliced_matmul.layout import BLOCK_INPUTS

HERE = Path(__file__).parent / "cuda_on_cpu"
FIELDS = ("segment", "depth", "first", "tokens", "row", "tile", "end_tile")
UNIT, STAGE, ITEM_TILES, GROUP_TILES, LEAST_UNITS, MOST_UNITS, FIXED = 16, 64, 8, 16, 4, 16, 10  # of prefill_plan.cuh

GUARD = 64  # of what lies around an array and must stay as it is


@pytest.fixture(scope="module")
def prefill_plan(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda")
    for path in (*(gpu.SOURCE.parent / name for name in ("prefill_plan.cuh", "common.cuh")), *HERE.iterdir()):
        shutil.copy(path, folder)
    library = folder / "prefill_plan.so"
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{folder}"]
    subprocess.run(["g++", *flags, "-o", str(library), str(folder / "prefill_plan.cpp")], check=True)
    function = ctypes.CDLL(str(library)).prefill_plan
    function.restype = ctypes.c_bool
    return function


def run(function, x, depths, segment_tiles, clusters):
    """Tokens in the order of the plan, packed tokens as bits, and each cluster's two blocks' items as dictionaries."""
    segments, tokens = depths.shape
    blocks = -(-x.shape[1] // BLOCK_INPUTS)
    guarded_plan = np.full(gpu.plan_integers(tokens) + 2 * GUARD, -1, np.int32)
    shape = segments, gpu.packed_rows(tokens), blocks * BLOCK_INPUTS
    guarded_packed = np.full(np.prod(shape) + 2 * GUARD, 0xFFFF, np.uint16)
    plan, packed = (whole[GUARD:-GUARD] for whole in (guarded_plan, guarded_packed))
    tiles = tokens // (LEAST_UNITS * UNIT) + 4
    most = 1 + tiles * sum(-(-tile // GROUP_TILES) for tile in segment_tiles) // clusters
    items = np.zeros((clusters, 2, most, len(FIELDS)), np.int32)
    sizes = [tokens, x.shape[1], blocks, clusters, most, plan.size, packed.size, segments, *np.cumsum(segment_tiles)]
    arrays = (x, depths, np.array(sizes, np.int32), plan, packed, items)
    assert function(*(ctypes.c_void_p(array.ctypes.data) for array in arrays)), "an access was wrong"
    for whole, filling in (guarded_plan, -1), (guarded_packed, 0xFFFF):
        assert (whole[:GUARD] == filling).all() and (whole[-GUARD:] == filling).all()
    order = plan[plan.size - gpu.MOST_SEGMENTS * tokens :][: segments * tokens].reshape(segments, tokens)
    taken = [
        [[dict(zip(FIELDS, item, strict=True)) for item in block.tolist() if item[3] > 0] for block in cluster]
        for cluster in items
    ]
    return order, packed.reshape(shape), taken


def draw_depths(rng, segments, tokens, shares):
    return np.stack([rng.choice(4, tokens, p=shares) + 1 for _ in range(segments)]).astype(np.int32)


@pytest.mark.parametrize(
    ("tokens", "inputs", "segment_tiles", "clusters", "shares"),
    [
        (2048, 64, (64, 16, 16), 9, (0.25, 0.25, 0.25, 0.25)),
        (300, 200, (5, 3), 2, (0.25, 0.25, 0.25, 0.25)),  # tiles without outputs, inputs that end within a stage
        (1030, 64, (40,), 3, (0.01, 0.98, 0.0, 0.01)),
        (17, 64, (16, 16, 16, 16), 7, (0.5, 0.0, 0.5, 0.0)),
        (513, 64, (33,), 1, (0.0, 0.0, 0.0, 1.0)),
    ],
)
def test_every_token_meets_every_output_once(tokens, inputs, segment_tiles, clusters, shares, prefill_plan):
    rng = np.random.default_rng(tokens)
    depths = draw_depths(rng, len(segment_tiles), tokens, shares)
    x = rng.integers(1, 1 << 15, (tokens, inputs), dtype=np.uint16)
    order, packed, taken = run(prefill_plan, x, depths, segment_tiles, clusters)
    starts = np.cumsum((0, *segment_tiles))
    made = np.zeros((tokens, starts[-1]), int)
    for cluster in taken:
        assert len(cluster[0]) == len(cluster[1])
        widths = [-(-item["tokens"] // UNIT) for item in cluster[0]]
        assert widths == sorted(widths, reverse=True) and max(widths, default=0) <= 16
        for one, other in zip(*cluster, strict=True):
            assert one | {"tile": other["tile"]} == other and other["tile"] == one["tile"] + ITEM_TILES
            for item in (one, other):
                s = item["segment"]
                assert item["end_tile"] == starts[s + 1] and item["tile"] >= starts[s]
                rows = order[s, item["first"] : item["first"] + item["tokens"]]
                assert (depths[s, rows] == item["depth"]).all()
                made[rows, item["tile"] : min(item["tile"] + ITEM_TILES, item["end_tile"])] += 1
                assert_packed(packed[s], item, x[rows])
    np.testing.assert_array_equal(made, 1)


def assert_packed(packed, item, x):
    """A tile's rows are its tokens, stage after stage, in swizzled chunks of 16 bytes, filled up with zeros."""
    rows = -(-item["tokens"] // UNIT) * UNIT
    want = np.zeros((rows, packed.shape[1]), np.uint16)
    want[: len(x), : x.shape[1]] = x
    stages = packed[item["row"] : item["row"] + rows].reshape(-1, rows, STAGE // 8, 8)
    chunks = np.arange(STAGE // 8) ^ (np.arange(rows) % 8)[:, None]
    got = np.take_along_axis(stages, chunks[None, :, :, None], axis=2)
    np.testing.assert_array_equal(got, want.reshape(rows, -1, STAGE // 8, 8).swapaxes(0, 1))


@pytest.mark.parametrize(
    ("runs", "segment_tiles", "clusters"),
    [
        ([[128, 128, 128, 128]], (32,), 9),  # four tiles fill eight of nine clusters, eight would take two turns
        ([[0, 0, 256, 0]], (48,), 6),  # one tile leaves half of the clusters idle, two of half its width do not
        ([[0, 512, 0, 0]], (112,), 5),  # seven items a tile on five clusters: wide tiles
        ([[2, 262, 53, 7]], (48,), 7),  # of equal ones the widest
        ([[0, 256, 0, 0], [0, 0, 0, 256]], (16, 80), 12),  # the second linear decides
        ([[500, 17, 300, 1], [1, 2, 3, 812]], (40, 16), 7),
        ([[130, 120, 125, 137], [100, 156, 90, 166], [512, 0, 0, 0]], (64, 16, 16), 11),
    ],
)
def test_tiles_are_cut_so_that_the_turns_are_over_soonest(runs, segment_tiles, clusters, prefill_plan):
    depths = np.array([np.repeat(np.arange(1, 5), run) for run in runs], np.int32)
    *_, taken = run(prefill_plan, np.ones((depths.shape[1], 64), np.uint16), depths, segment_tiles, clusters)
    got = {(item["segment"], item["depth"], item["first"], item["tokens"]) for one, _ in taken for item in one}
    groups = [-(-tiles // GROUP_TILES) for tiles in segment_tiles]
    assert got == tiles_of(runs, min(range(MOST_UNITS, LEAST_UNITS - 1, -1), key=partial(cost, runs, groups, clusters)))


def tiles_of(runs, most):
    """Segment, depth, first token and tokens of each tile, where tiles have up to so many units."""
    tiles = set()
    for segment, lengths in enumerate(runs):
        first = 0
        for depth, length in enumerate(lengths, 1):
            count = -(-length // (most * UNIT))
            even = -(-length // (count * UNIT)) * UNIT if count else 1
            tiles |= {(segment, depth, first + done, min(even, length - done)) for done in range(0, length, even)}
            first += length
    return tiles


def cost(runs, groups, clusters, most):
    """How long all turns take, each as long as its widest tile."""
    widths = [-(-tokens // UNIT) for segment, *_, tokens in tiles_of(runs, most) for _ in range(groups[segment])]
    return sum(width + FIXED for width in sorted(widths, reverse=True)[::clusters])
