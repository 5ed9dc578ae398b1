"""Training one block with both activation streams in the host's memory: numpy arrays, whole in every process.

A stream goes through the devices a batch of windows at a time, each split over the mesh as its rows are in `block`. On
the devices are the batch in hand and the next one, which a thread copies meanwhile; nothing else comes from the host.
Numpy rather than JAX's memory kind ``pinned_host``: it is the same on every backend, and on GPUs that kind lies in a
pool of limited size, 64 GB by default.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from mobiquant_jax import distributed
from mobiquant_jax.calibration.block import BlockTrainer, mean_errors
from mobiquant_jax.calibration.config import Stage, stages
from mobiquant_jax.calibration.linears import Params
from mobiquant_jax.calibration.read_ahead import read_ahead


class HostBlockTrainer(BlockTrainer):
    """`BlockTrainer` for streams that are too large for the devices: the same steps, called one by one."""

    def embed(self, params: Params, windows: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N T D"]:
        """See `BlockTrainer`."""
        shape = (*windows.shape, self.config.hidden_size)
        rows = _in_turn(len(windows), self.placement.batch_shards)
        return self._passed(self._embed_batch, params, windows, rows, out=np.empty(shape, np.float32))

    def dense_block(self, params: Params, stream: Float[np.ndarray, "W T D"]) -> Float[np.ndarray, "W T D"]:
        """See `BlockTrainer`; overwrites the stream."""
        rows = _in_turn(len(stream), self.placement.batch_shards)
        return self._passed(self._dense_batch, params, stream, rows, out=stream)

    def packed_block(self, variables: Params, stream: Float[np.ndarray, "S T D"]) -> Float[np.ndarray, "S T D"]:
        """See `BlockTrainer`; overwrites the stream."""
        ids, bits = self.samples.steps(self.calibration.batch_size)
        return self._passed(self._packed_batch, variables, stream, ids, bits, out=stream)

    def epoch_fn(self, stage: Stage) -> Callable[..., Any]:
        """``(params, optimizer_state, dense, streams, plan)``: one epoch, of streams and plan on the host."""
        step = self._steps[stage]

        def epoch(params: Params, optimizer_state: Any, dense: Params, streams: Any, plan: Any) -> Any:
            quantized, target, window = streams
            ids, *numbers = plan

            def read(index: int) -> Any:
                rows = ids[index]
                batch = (quantized[rows], target[window[rows]])
                return self._put_batch(batch), *self.placement.put_whole([each[index] for each in numbers])

            carry = (params, optimizer_state, jax.device_put(np.array(True), self.placement.replicated))
            for batch in read_ahead(read, len(ids)):
                carry = step(carry, dense, *batch)
                jax.block_until_ready(carry)
                del batch  # before the thread copies the one after the next: two at a time are on the devices
            return carry

        return epoch

    def _evaluate(self, params: Params, streams: Any) -> tuple[float, float]:
        quantized, target, window = streams
        ids, bits = self._evaluated

        def read(index: int) -> Any:
            batch = (quantized[ids[index]], target[window[ids[index]]])
            return self._put_batch(batch), self.placement.put_whole(bits[index])

        errors = (self._error(params, *batch, at) for batch, at in read_ahead(read, len(bits)))
        found = [jax.device_get(pair) for pair in errors]
        return mean_errors(*np.transpose(found))

    def _plan(self, tree: Any) -> Any:
        return tree

    def _put_batch(self, batch: Any) -> Any:
        return jax.tree.map(self.placement.put_batch, batch)

    def _passed(
        self,
        function: Callable[..., Any],
        params: Params,
        stream: np.ndarray,
        rows: Int[np.ndarray, "steps batch"],
        *numbers: np.ndarray,
        out: np.ndarray,
    ) -> np.ndarray:
        """``out[rows[i]] = function(params, stream[rows[i]], *numbers[i])`` for every i; ``out`` may be the stream."""

        def read(index: int) -> Any:
            batch = stream[rows[index]]
            return self._put_batch(batch), *self.placement.put_whole([each[index] for each in numbers])

        for index, batch in enumerate(read_ahead(read, len(rows))):
            out[rows[index]] = distributed.fetch(function(params, *batch))
        return out

    @cached_property
    def _embed_batch(self) -> Callable[..., Any]:
        return jax.jit(self.functions.embed, out_shardings=self._batched(self.placement.batch_shards))

    @cached_property
    def _dense_batch(self) -> Callable[..., Any]:
        batch = self._batched(self.placement.batch_shards)
        dense = self.placement.shardings(self.abstract_dense)
        return jax.jit(self.functions.dense, in_shardings=(dense, batch), out_shardings=batch)

    @cached_property
    def _packed_batch(self) -> Callable[..., Any]:
        batch = self._batched(self.calibration.batch_size)
        in_shardings = (self._packed_shardings, batch, self.placement.replicated)
        return jax.jit(self.functions.packed, in_shardings=in_shardings, out_shardings=batch)

    @cached_property
    def _error(self) -> Callable[..., Any]:
        return jax.jit(self.functions.error, out_shardings=self.placement.replicated)

    @cached_property
    def _steps(self) -> dict[Stage, Callable[..., Any]]:
        return {stage: self._compile_step(stage) for stage in stages(self.calibration)}

    def _compile_step(self, stage: Stage) -> Callable[..., Any]:
        whole, batch = self.placement.replicated, self._batched(self.calibration.batch_size)
        carry = (self._param_shardings, self._state_shardings[stage], whole)
        dense = self.placement.shardings(self.abstract_dense)
        return jax.jit(
            self.functions.step(stage, self.optimizer(stage)),
            donate_argnums=0,
            in_shardings=(carry, dense, (batch, batch), whole, whole),
            out_shardings=carry,
        )


def _in_turn(count: int, size: int) -> Int[np.ndarray, "steps size"]:
    """The rows of a stream, so many at a time."""
    return np.arange(count).reshape(-1, size)
