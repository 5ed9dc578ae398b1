"""Calibration on one device, on eight and on two processes of four: the same losses, the same depths."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockTrainer, CalibrationConfig, Calibrator, ConsoleObserver, RunDir
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.linears import trainable
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.io import save_hf
from mobiquant_jax.io.checkpoint import load_checkpoint, load_tree
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.sharding import job_mesh

ROOT = Path(__file__).parents[2]
SHAPE = {"data": 2, "fsdp": 2, "model": 2}
SECTIONS = {
    "quant": dict(group_size=8, slice_bits=(2, 2, 2, 2)),
    "router": dict(hidden_size=4, budget_grid=(2.0, 3.0, 4.0, 6.0, 8.0)),
    "calibration": dict(
        windows=8,
        window_length=16,
        budgets=(5.0, 6.0),
        batch_size=4,
        scale_width=3,
        epochs=1,
        weight_lr=1e-5,  # low rates: Adam makes whole steps of gradients that are rounding alone
        clipping_lr=1e-3,
        end_epochs=1,
        end_batch_size=4,
        routed_epochs=1,
        routed_weight_lr=1e-5,
        routed_router_lr=1e-5,
        slice_epochs=1,
        slice_lr=2.5e-5,
        fine_above=6,
        fit_epochs=1,
        fit_batch_size=4,
        threshold_windows=4,
    ),
}


@pytest.fixture(scope="module")
def mesh_model(small_config):
    """Two layers whose every dimension splits in two, and tokens to calibrate it on."""
    config = small_config(vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8, max_position_embeddings=32)
    params = jax.device_get(jax.jit(Llama(config).init)(jax.random.key(70), jnp.zeros((1, 2), jnp.int32))["params"])
    # Logits of some size: the divergences of flat predictions are the small differences of numbers of order one.
    params["lm_head"]["kernel"] = 4 * params["lm_head"]["kernel"]
    return config, params, np.random.default_rng(73).integers(0, 64, 256).astype(np.int32)


@pytest.fixture(scope="module")
def elastic():
    quant, router = SECTIONS["quant"], SECTIONS["router"]
    return ElasticConfig(**quant, router_hidden_size=router["hidden_size"], budget_grid=router["budget_grid"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("mesh_runs")


@pytest.fixture(scope="module")
def calibrate(mesh_model, elastic, runs):
    """``(name, mesh sizes, observer) -> variables``: calibrates, or continues, the run of that name."""
    config, params, tokens = mesh_model
    calibration = CalibrationConfig(**SECTIONS["calibration"])

    def run(name, sizes, observer=None):
        folder = RunDir(path=runs / name)
        folder.path.mkdir(exist_ok=True)
        calibrator = Calibrator(
            config=config,
            elastic=elastic,
            calibration=calibration,
            run=folder,
            observer=observer or ConsoleObserver(),
            mesh=job_mesh(**sizes),
        )
        return jax.device_get(calibrator.calibrate(params, tokens[: 8 * 16].reshape(8, 16)))

    return run


@pytest.fixture(scope="module")
def on_one(calibrate):
    """What one device makes of it."""
    return calibrate("one", dict(data=1, fsdp=1, model=1))


def thresholds(run):
    """Of routed tuning, at the budgets whose thresholds are finite."""
    pairs = np.load(run / "thresholds.npy")
    assert pairs[:, 0].tolist() == [2.0, 3.0, 4.0, 6.0]
    return pairs[1:3, 1]


def metrics(run):
    """The losses in order, and the bits that were used."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row[name] for row in rows for name in ("before", "after", "divergence") if name in row]
    return losses, [row["bits"] for row in rows if "bits" in row]


def assert_close(found, wanted):
    """Trees of the same leaves, within 1e-5 of each other; integers are equal."""
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        within = 0.0 if np.issubdtype(np.asarray(leaf).dtype, np.integer) else 1e-5
        other, leaf = np.asarray(other, np.float64), np.asarray(leaf, np.float64)
        np.testing.assert_allclose(other, leaf, rtol=within, atol=within, err_msg=jax.tree_util.keystr(path))


def assert_alike(run, variables, wanted_run, wanted):
    """Losses and checkpoint within 1e-5 of each other, depths and codes the same."""
    (losses, bits), (wanted_losses, wanted_bits) = metrics(run), metrics(wanted_run)
    assert len(losses) == 2 * 2 + 4
    np.testing.assert_allclose(thresholds(run), thresholds(wanted_run), rtol=1e-5)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    np.testing.assert_array_equal(bits, wanted_bits)
    assert_close(variables, wanted)


def test_a_run_that_ends_on_eight_devices_continues_on_one(on_one, calibrate, runs, mesh_model, elastic):
    """The first block is trained on eight, the second on one; what comes then is computed of the folder's content.

    End-to-end tuning on a mesh is the last test's.
    """
    calibration = CalibrationConfig(**SECTIONS["calibration"])

    class EndingObserver(ConsoleObserver):
        def on_block(self, block, report, seconds):
            raise KeyboardInterrupt

    moved, one = (RunDir(path=runs / name) for name in ("moved", "one"))
    for sizes, blocks in ((SHAPE, ["000"]), (dict(data=1, fsdp=1, model=1), ["000", "001"])):
        with pytest.raises(KeyboardInterrupt):
            calibrate("moved", sizes, EndingObserver())
        assert sorted(entry.name for entry in moved.blocks.iterdir()) == blocks
    trainer = BlockTrainer(
        config=mesh_model[0], elastic=elastic, calibration=calibration, samples=Samples.create(calibration)
    )
    for index in range(2):
        found, wanted = (load_tree(run.block(index), trainer.abstract_trained) for run in (moved, one))
        assert_close(found, wanted)
        assert_close(trainer.pack(found)["slices"], trainer.pack(wanted)["slices"])  # the same codes
    assert_close(moved.load_scales(), one.load_scales())
    (losses, bits), (wanted_losses, wanted_bits) = metrics(moved.path), metrics(one.path)
    np.testing.assert_allclose(losses, wanted_losses[: 2 * 2], rtol=1e-5)
    np.testing.assert_array_equal(bits, wanted_bits[:2])


def test_the_finer_slices_start_alike_on_eight_devices(mesh_model, elastic):
    config, params, _ = mesh_model
    calibration = CalibrationConfig(**(SECTIONS["calibration"] | dict(fine_above=4)))
    coarse = jax.tree.map(lambda leaf: 1.1 * leaf, params["layers"])
    windows = np.zeros((8, 16), np.int32)
    found = []
    for sizes in (dict(data=1, fsdp=1, model=1), SHAPE):
        fields = dict(config=config, elastic=elastic, calibration=calibration, windows=windows, generated=windows[:0])
        tuner = SliceTuner(**fields, final_width=4, reads=(6, 8), epochs=1, rate=1.0, mesh=job_mesh(**sizes))
        trainer = EndToEndTrainer(**fields, mesh=job_mesh(**sizes))
        with jax.set_mesh(tuner.mesh):
            keys = jax.random.split(jax.random.key(74), config.num_hidden_layers)
            blocks = jax.vmap(lambda dense, key: trainable(dense, config, elastic, key))(coarse, keys)
            packed = trainer.pack(tuner.placement.put(blocks))
            begun = tuner.begin(packed, tuner.placement.put(params["layers"]))
            found.append(jax.device_get((packed["slices"], tuner.slices(begun))))
    (coarse_one, one), (coarse_eight, eight) = found
    jax.tree.map(np.testing.assert_array_equal, eight, one)
    jax.tree.map(np.testing.assert_array_equal, coarse_eight, coarse_one)
    planes, before = one["mlp"]["up_proj"]["weight"].planes, coarse_one["mlp"]["up_proj"]["weight"].planes
    assert [np.any(new != old) for new, old in zip(planes, before, strict=True)] == [False, False, True, True]


def test_a_block_of_the_paper_trains_alike_on_eight_devices(mesh_model, elastic):
    """Its routers too, which the other recipe leaves alone until all blocks are done."""
    config, params, tokens = mesh_model
    changes = dict(
        recipe="paper",
        scale_width=0,
        epochs=1,
        joint_epochs=1,
        router_lr=2e-4,
        end_epochs=0,
        routed_epochs=0,
        slice_epochs=0,
        fine_above=8,
    )
    calibration = CalibrationConfig(**(SECTIONS["calibration"] | changes))
    windows = tokens[: 8 * 16].reshape(8, 16)
    found = []
    for sizes in (dict(data=1, fsdp=1, model=1), SHAPE):
        trainer = BlockTrainer(
            config=config,
            elastic=elastic,
            calibration=calibration,
            samples=Samples.create(calibration),
            mesh=job_mesh(**sizes),
        )
        with jax.set_mesh(trainer.mesh):
            dense = trainer.placement.put(jax.tree.map(lambda leaf: leaf[0], params["layers"]))
            embedder = trainer.placement.put({"embedder": params["embedder"]})
            target = trainer.dense_block(dense, trainer.embed(embedder, windows))
            trained, report = trainer.train(dense, trainer.embed(embedder, windows[trainer.samples.window]), target, 0)
            found.append(jax.device_get((trained, report.before, report.after)))
            assert report.note == "" and report.after < report.before
    for (path, wanted), got in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def arguments(mesh_model, runs):
    """``(run folder, settings) -> command line`` of calibrate.py on the same model and windows."""
    config, params, tokens = mesh_model
    save_hf(runs / "model", config, params)
    np.save(runs / "tokens.npy", tokens)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    settings = [f"model.architecture.{name}={getattr(config, name)}" for name in sizes]
    for section, fields in SECTIONS.items():
        for name, value in fields.items():
            settings.append(f"{section}.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    settings += [f"model.source={runs}/model", f"data.source=tokens:{runs}/tokens.npy"]
    settings += ["evaluation.bits=4,6", "evaluation.windows=4", "evaluation.window_length=16"]

    def make(run, *more):
        return [
            "--config=configs/stories260k.py",
            "--noconfig.model.architecture.tie_word_embeddings",
            *(f"--config.{setting}" for setting in (*settings, f"run_dir={run}", *more)),
        ]

    return make


def test_two_processes_of_four_devices(on_one, runs, arguments):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    sizes = [f"mesh.{axis}={size}" for axis, size in SHAPE.items()]
    job = [*arguments(runs / "two", *sizes), "--profile_block=2", f"--coordinator=localhost:{port}", "--processes=2"]
    both = [
        subprocess.Popen(
            [sys.executable, "experiments/calibrate.py", *job, f"--process={process}"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert_alike(runs / "two", load_checkpoint(runs / "two" / "checkpoint").variables, runs / "one", on_one)
    (first, _), (second, _) = said
    assert "block  2/2" in first and "checkpoint:" in first
    assert "block" not in second and "checkpoint" not in second  # the collectives print lines of their own
    files = [
        "checkpoint",
        "curve.json",
        "curve.png",
        "metrics.jsonl",
        "profile",
        "result.json",
        "run.json",
        "scales.npz",
        "thresholds.npy",
    ]
    assert sorted(entry.name for entry in (runs / "two").iterdir()) == files
    assert list((runs / "two" / "profile").rglob("*.xplane.pb"))
    assert json.loads((runs / "two" / "run.json").read_text())["mesh"] == SHAPE
    rows = [json.loads(line) for line in (runs / "two" / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((runs / "two" / "result.json").read_text())  # of the process with the most
    assert result["mesh"] == SHAPE and result["processes"] == 2
    assert 0.05 < rows[0]["peak_gb"] <= rows[-1]["peak_gb"] <= result["peak_gb"] < 100


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads config files by it
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mesh.data=3"], "a mesh of data x fsdp x model = (3, 1, 1) does not use all 8 devices"),
        (["mesh.model=0"], "mesh sizes data=1, fsdp=1, model=0 must be positive"),
        (["mesh.model=8"], "mesh data=1, fsdp=1, model=8 does not fit the model: heads: 32 / 16 whole units do not"),
        (["mesh.data=8"], "mesh data=8, fsdp=1, model=1 does not fit calibration.batch_size=4: no multiple of"),
        (
            ["mesh.data=4", "calibration.end_batch_size=2"],
            "mesh data=4, fsdp=1, model=1 does not fit calibration.end_batch_size=2",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mesh_that_does_not_fit_is_one_line(call_script, arguments, tmp_path, changes, message):
    result = call_script("calibrate", *arguments(tmp_path / "run", *changes))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
