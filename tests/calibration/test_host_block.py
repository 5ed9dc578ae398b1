"""Streams in the host's memory: the same block comes out, to the last bit, with two batches on the devices at most."""

import jax
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockTrainer
from mobiquant_jax.calibration.host_block import HostBlockTrainer
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.sharding import job_mesh


@pytest.fixture(scope="module", params=["elastic", "paper"])
def trainers(request, config, elastic, recipe):
    """``(streams on the devices, on the host)``: trainers of one recipe on two devices."""
    stage = dict(
        recipe=request.param, epochs=2, weight_lr=1e-3, clipping_lr=1e-3, penalty=0.1
    )  # of the paper's the second alone
    calibration = recipe(windows=8, window_length=12, batch_size=2, **stage)
    fields = dict(config=config, elastic=elastic, calibration=calibration, samples=Samples.create(calibration))
    return [cls(**fields, mesh=job_mesh(data=2, fsdp=1, model=1)) for cls in (BlockTrainer, HostBlockTrainer)]


def test_a_block_and_its_streams_are_those_of_the_devices(trainers, params, dense, monkeypatch):
    put_batch, alive = HostBlockTrainer._put_batch, []

    def count(self, batch):
        shape = (self.calibration.batch_size, self.calibration.window_length, self.config.hidden_size)
        alive.append(sum(array.shape == shape for array in jax.live_arrays()))
        return put_batch(self, batch)

    windows = np.random.default_rng(91).integers(0, 61, (8, 12)).astype(np.int32)
    found = []
    for trainer in trainers:
        with jax.set_mesh(trainer.mesh):
            placed = trainer.placement.put(dense)
            embedder = trainer.placement.put({"embedder": params["embedder"]})
            target = trainer.dense_block(placed, trainer.embed(embedder, windows))
            quantized = trainer.embed(embedder, windows[trainer.samples.window])
            noise = 0.01 * np.random.default_rng(92).normal(size=quantized.shape).astype(np.float32)
            noisy = quantized + (noise if isinstance(quantized, np.ndarray) else trainer.placement.put_batch(noise))
            with monkeypatch.context() as patch:
                patch.setattr(HostBlockTrainer, "_put_batch", count)
                trained, report = trainer.train(placed, noisy, target, 0)
            after = trainer.packed_block(trainer.pack(trained), noisy)
            found.append(jax.device_get((trained, target, after)))
            assert report.after < report.before and report.note == ""
            found[-1] = (*found[-1], report)
    assert isinstance(after, np.ndarray) and found[0][3] == found[1][3]
    for (path, wanted), got in zip(
        jax.tree_util.tree_leaves_with_path(found[0][:3]), jax.tree.leaves(found[1][:3]), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7, err_msg=jax.tree_util.keystr(path))
    assert len(alive) == 3 * 2 + 2 * 4 and max(alive) <= 2  # an activation and its target, beside those to come
