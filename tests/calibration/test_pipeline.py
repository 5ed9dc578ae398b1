"""Calibration of a whole model: the two streams, what is written when, and how a run continues.

Training itself is tested in test_block.py and, in processes that are killed, in tests/experiments/test_calibrate.py;
here a block's parameters are a function of what it was given, so that any mistake in the streams shows.
"""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.channel_scales import fold, stack_scales
from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import Block
from mobiquant_jax.models.elastic import ElasticLinear
from mobiquant_jax.routing import BatchBudget


def test_the_streams_of_two_blocks_and_a_run_that_continues(
    recorder, calibrator, trained, params, windows, config, elastic, recipe
):
    observer = recorder()
    whole = calibrator("whole", observer)
    variables = whole.calibrate(params, windows)
    assert observer.events == [
        ("start", 2, 0),
        ("epoch", 0, "nested"),
        ("block", 0, 0.5),
        ("epoch", 1, "nested"),
        ("block", 1, 1.5),
        ("fitted", 1, 2, True),
        ("fitted", 2, 2, True),
        *(("budget", bits) for bits in reversed(elastic.budget_grid)),
    ]
    rows = [json.loads(line) for line in (whole.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["block"], row["before"], row["after"], row["bits"], row["note"]) for row in rows[:2]] == [
        (0, 1.0, 0.5, 5.0, "as told"),
        (1, 1.0, 1.5, 5.0, "as told"),
    ]

    # The full-precision stream is the dense model's, whatever the quantized blocks do.
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
    dense_block = jax.jit(lambda p, x: Block(config).apply({"params": p}, x, positions)[0])
    stream = np.asarray(params["embedder"]["embedding"])[windows]
    # Samples are ordered by budget: windows 0 and 2 at 5 bits, 1 and 3 at 6.
    quantized, budgets = stream[[0, 2, 1, 3]], [5.0, 5.0, 6.0, 6.0]
    elastic_block = Block(config, linear=partial(ElasticLinear, elastic=elastic))
    run_packed = jax.jit(lambda v, x, bits: elastic_block.apply(v, x, positions[:1], None, BatchBudget(bits=bits))[0])
    for index in range(2):
        dense, given, target = trained[index]
        want = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, dense, want)))
        stream = dense_block(want, stream)
        np.testing.assert_allclose(target, stream, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(given, quantized, rtol=1e-4, atol=1e-4)
        packed = jax.tree.map(
            lambda leaf, index=index: leaf[index],
            {
                name: variables[name]["layers"]  # thresholds are recorded by now; a batch's own budget ignores them
                for name in ("params", "slices", "routing")
            },
        )
        quantized = [run_packed(packed, x[None], bits)[0] for x, bits in zip(given, budgets, strict=True)]

    # What comes out is a checkpoint's tree: the trained blocks, and around them the model's own parts.
    wanted = abstract_variables(config, elastic)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), wanted
    )
    for part in ("embedder", "final_norm", "lm_head"):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, variables["params"][part], params[part])))

    # A run that ends after block 0 keeps it, and the one that continues trains block 1 only, on the same numbers.
    first = dict(trained)
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        calibrator("cut", recorder(stop_after=0)).calibrate(params, windows)
    assert list(trained) == [0]
    trained.clear()
    observer = recorder()
    continued = calibrator("cut", observer).calibrate(params, windows)
    assert observer.events[:2] == [("start", 2, 1), ("epoch", 1, "nested")] and list(trained) == [1]
    for got, expected in zip(jax.tree.leaves(trained[1]), jax.tree.leaves(first[1]), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(jax.tree.leaves(continued), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_windows_and_sizes_that_do_not_fit_are_named_before_anything_is_written(
    recorder, calibrator, trained, params, windows, config
):
    for bad in (windows[:3], windows[:, :8]):
        with pytest.raises(ValueError) as error:
            calibrator("run", recorder()).calibrate(params, bad)
        assert str(error.value) == f"windows {bad.shape} are not the recipe's (4, 16)"
    with pytest.raises(ValueError, match="start below the first slice's 4 bits"):
        calibrator("run", recorder(), budgets=(3.0, 8.0)).calibrate(params, windows)
    assert not trained and not list(calibrator("run", recorder()).run.path.iterdir())


def test_a_damaged_block_is_named_and_trained_again(recorder, calibrator, trained, recorded, params, windows):
    """One bit of the first block; the second one stays as it is."""
    with pytest.raises(KeyboardInterrupt):
        calibrator("run", recorder(stop_after=1)).calibrate(params, windows)
    damaged = calibrator("run", observer := recorder())
    files = (file for file in damaged.run.block(0).rglob("*") if file.is_file())
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    untouched = damaged.run.block(1).stat().st_mtime_ns
    largest.write_bytes(content)
    trained.clear()
    damaged.calibrate(params, windows)
    assert [event[:2] for event in observer.events[:4]] == [
        ("start", 2),
        ("damaged", observer.events[1][1]),
        ("epoch", 0),
        ("block", 0),
    ]
    name = largest.relative_to(damaged.run.block(0)).as_posix()
    message = (
        f"'{damaged.run.block(0)}' cannot be read as this model's variables: file '{name}' is not what was written"
    )
    assert observer.events[1][1].startswith(message) and "\n" not in observer.events[1][1]
    assert list(trained) == [0] and damaged.run.block(1).stat().st_mtime_ns == untouched


def test_a_full_disk_ends_the_run_with_what_was_saved(
    recorder, calibrator, trained, recorded, params, windows, monkeypatch
):
    def full(path):
        return SimpleNamespace(free=0 if list(trained) == [0, 1] else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", full)
    run = calibrator("run", recorder())
    with pytest.raises(OSError, match="no space left"):
        run.calibrate(params, windows)
    assert [entry.name for entry in run.run.blocks.iterdir()] == ["000"]
    assert len((run.run.path / "metrics.jsonl").read_text().splitlines()) == 1
    trained.clear()
    run.calibrate(params, windows)
    assert list(trained) == [1]


def test_channels_are_scaled_before_blocks_train_and_a_run_continues_with_the_same_scales(
    recorder, calibrator, trained, recorded, params, windows
):
    first = calibrator("run", recorder(stop_after=0), scale_width=3)
    with pytest.raises(KeyboardInterrupt):
        first.calibrate(params, windows)
    moved = [jax.tree.map(lambda leaf: 1.5 * leaf, first.run.load_scales()[0])]
    first.run.save_scales(moved)  # not what a search would find: what is there counts
    shutil.rmtree(first.run.blocks)
    second = calibrator("run", recorder(), scale_width=3)
    variables = second.calibrate(params, windows)
    scales = second.run.load_scales()
    jax.tree.map(np.testing.assert_array_equal, scales[0], moved[0])
    found = fold(params["layers"], stack_scales(scales))
    for index, (dense, _, _) in sorted(trained.items()):
        expected = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], found)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), dense, expected)
    assert all(np.ptp(leaf) > 0.1 for leaf in scales[1])  # found, not 1
    targets = {index: target for index, (_, _, target) in trained.items()}
    plain = calibrator("plain", recorder())
    plain.calibrate(params, windows)
    assert plain.run.load_scales() == []  # trained now holds what blocks without scales were given
    for index, (dense, _, _) in sorted(trained.items()):
        jax.tree.map(
            lambda leaf, all_, index=index: np.testing.assert_array_equal(leaf, all_[index]), dense, params["layers"]
        )
        # the blocks' function stays
        np.testing.assert_allclose(targets[index], trained[index][2], rtol=1e-4, atol=1e-5)
    norms = np.asarray(variables["params"]["layers"]["mlp_norm"]["scale"], np.float64)
    given = np.asarray(params["layers"]["mlp_norm"]["scale"])
    ratio = given / norms / np.stack([one.mlp_norm for one in scales])  # a block's stub scales all it is given alike
    assert np.ptp(ratio, axis=1).max() < 1e-5 * ratio.max()

    # Where all blocks are there but no scales, these are found again.
    second.run.scales.unlink()
    calibrator("run", recorder(), scale_width=3).calibrate(params, windows)
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    again = second.run.load_scales()
    jax.tree.map(lambda found, other: close(1.5 * found, other), again[0], moved[0])
    jax.tree.map(close, again[1], scales[1])


def test_activations_that_are_not_finite_are_named_and_leave_no_scales(recorder, calibrator, trained, params, windows):
    broken = params | {"embedder": jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), params["embedder"])}
    run = calibrator("run", recorder(), scale_width=3)
    with pytest.raises(ValueError, match=r"^the unquantized model's activations in block 0 are not finite$"):
        run.calibrate(broken, windows)
    assert not trained and not run.run.scales.exists()
