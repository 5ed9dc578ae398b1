"""A model of two small blocks, the recipes for it, streams to train a block on, and runs whose training is replaced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockReport, BlockTrainer, CalibrationConfig, Calibrator, RunDir, model_stages
from mobiquant_jax.calibration.linears import trainable
from mobiquant_jax.calibration.routers import RouterState, RouterTrainer, routers_of
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.routing import Router


@pytest.fixture(scope="session")
def config(small_config):
    return small_config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


@pytest.fixture(scope="session")
def elastic():
    """Two slices of four bits: half the work of the usual four, and every kind of it."""
    return ElasticConfig(group_size=8, slice_bits=(4, 4), router_hidden_size=4, budget_grid=(4.0, 5.0, 6.0, 8.0))


@pytest.fixture(scope="session")
def recipe():
    """A function that makes a recipe of seconds: four windows at two budgets."""

    def make(**changes):
        fields = dict(
            windows=4,
            window_length=16,
            budgets=(5.0, 6.0),
            epochs=4,
            joint_epochs=2,
            weight_lr=3e-3,
            threshold_windows=2,
            end_weight_lr=1e-3,
        )
        return CalibrationConfig(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def params(config):
    """A dense model whose norms are not all one."""
    rng = np.random.default_rng(31)
    params = jax.jit(Llama(config).init)(jax.random.key(30), jnp.zeros((1, 2), jnp.int32))["params"]

    def shaken(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path)
        return leaf * jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype) if norm else leaf

    return jax.tree_util.tree_map_with_path(shaken, params)


@pytest.fixture(scope="session")
def dense(params):
    """The first dense block."""
    return jax.tree.map(lambda leaf: leaf[0], params["layers"])


@pytest.fixture(scope="session")
def make_trainer(config, elastic):
    def make(calibration, elastic=elastic, cls=BlockTrainer, config=config):
        return cls(config=config, elastic=elastic, calibration=calibration, samples=Samples.create(calibration))

    return make


@pytest.fixture(scope="session")
def streams():
    """``(trainer, dense block) -> (quantized stream, target)``: a noisy copy of random activations, and the target."""

    def make(trainer, dense, seed=32):
        rng = np.random.default_rng(seed)
        windows, length = trainer.calibration.windows, trainer.calibration.window_length
        full = rng.normal(size=(windows, length, trainer.config.hidden_size)).astype(np.float32)
        quantized = full[trainer.samples.window] + 0.01 * rng.normal(
            size=(len(trainer.samples.window), *full.shape[1:])
        )
        return jnp.asarray(quantized, jnp.float32), trainer.dense_block(dense, jnp.asarray(full))

    return make


class Recorder:
    """Notes what it is told; raises after a block if asked to."""

    def __init__(self, stop_after=None):
        self.stop_after, self.events = stop_after, []

    def on_start(self, blocks, resumed):
        self.events.append(("start", blocks, resumed))

    def on_epoch(self, block, stage, epoch, epochs, error):
        self.events.append(("epoch", block, stage))

    def on_block(self, block, report, seconds):
        self.events.append(("block", block, report.after))
        if block == self.stop_after:
            raise KeyboardInterrupt

    def on_damaged(self, reason):
        self.events.append(("damaged", reason))

    def on_generated(self, done, total):
        self.events.append(("generated", done, total))

    def on_tuned(self, *args):
        self.events.append(("tuned", *args))

    def on_fitted(self, epoch, epochs, healthy, seconds):
        self.events.append(("fitted", epoch, epochs, healthy))

    def on_budget(self, bits, left):
        self.events.append(("budget", bits))


@pytest.fixture(scope="session")
def recorder():
    """The class of observers that note what they are told."""
    return Recorder


@pytest.fixture
def trained(monkeypatch):
    """What each call of ``BlockTrainer.train`` was given, by block."""
    calls = {}

    def train(self, dense, quantized, target, index, on_epoch):
        calls[index] = jax.tree.map(np.array, (dense, quantized, target))
        on_epoch("nested", 1, 1, 0.5)
        params = trainable(dense, self.config, self.elastic, jax.random.key(index))
        shift = 1 + 0.01 * jnp.tanh(jnp.mean(quantized) + jnp.mean(target))
        params = jax.tree.map(lambda leaf: leaf * shift, params)
        return params, BlockReport(before=1.0, after=0.5 + index, bits=5.0, note="as told")

    monkeypatch.setattr(BlockTrainer, "train", train)
    monkeypatch.setattr(RouterTrainer, "start", start_routers)
    monkeypatch.setattr(RouterTrainer, "epoch", fit_routers)
    return calls


@pytest.fixture
def recorded(monkeypatch):
    """The windows of each call of ``record_thresholds``, which does nothing else."""
    calls = []

    def record(model, windows, *more):
        calls.append(windows)
        return model.variables

    monkeypatch.setattr(model_stages, "record_thresholds", record)
    return calls


def start_routers(trainer, variables):
    """A state with the routers as they are, in place of a program that takes seconds to compile."""
    routers = routers_of(variables)
    return RouterState(routers=routers, optimizer=trainer._optimizer.init(routers))


def fit_routers(trainer, state, variables, index):
    """Adds what tells the epoch and the windows from others, to all scores alike: a batch's own budget ignores it."""
    shift = (index + 1) * float(np.mean(trainer.windows))

    def shifted(router):
        return dataclasses.replace(router, output_bias=router.output_bias + shift)

    routers = jax.tree.map(shifted, state.routers, is_leaf=lambda node: isinstance(node, Router))
    return dataclasses.replace(state, routers=routers), True


@pytest.fixture(scope="session")
def windows():
    """Calibration text of the model above."""
    return np.random.default_rng(60).integers(0, 61, (4, 16)).astype(np.int32)


@pytest.fixture
def calibrator(config, elastic, recipe, tmp_path):
    """``(name, observer, **changes of the recipe) -> Calibrator`` of the run of that name."""

    def make(name, observer, **changes):
        run = RunDir(path=tmp_path / name)
        run.path.mkdir(exist_ok=True)
        return Calibrator(config=config, elastic=elastic, calibration=recipe(**changes), run=run, observer=observer)

    return make
