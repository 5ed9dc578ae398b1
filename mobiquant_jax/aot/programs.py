"""The programs of calibration and serving with the shapes of their arguments: no array of the model's size is made."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mobiquant_jax.calibration import BlockTrainer, CalibrationConfig
from mobiquant_jax.calibration.config import stages
from mobiquant_jax.calibration.distillation import Distiller
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.routed_tuning import RoutedTrainer
from mobiquant_jax.calibration.routers import RouterTrainer
from mobiquant_jax.calibration.samples import Samples
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import KVCache, LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.sharding import Placement


@dataclass(frozen=True, kw_only=True)
class Program:
    """Something to compile.

    Attributes:
        name: for the report.
        function: jitted.
        arguments: shapes with shardings.
        batch: sequences a step.
        tokens: of each sequence.
    """

    name: str
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    batch: int
    tokens: int


def training_programs(
    config: LlamaConfig, elastic: ElasticConfig, calibration: CalibrationConfig, mesh: Mesh
) -> list[Program]:
    """An epoch of each part of a recipe, of fitting a step, in bfloat16 with float32 parameters.

    Returns:
        ``calibration``, the last stage of one block's training; ``tuning`` of all blocks, ``routed`` of blocks and
        routers, ``slices`` of a slice alone and ``fitting`` of all routers, where the recipe has epochs of them.
    """
    makers: list[Callable[..., Program]] = [_calibration]
    if calibration.end_epochs:
        makers.append(partial(_distillation, "tuning", EndToEndTrainer, 0))
    if calibration.routed_epochs:
        budget = float(elastic.slice_bits[0])
        kind = partial(RoutedTrainer, pairs=np.array([[budget, 0.0]]))
        makers.append(partial(_distillation, "routed", kind, calibration.threshold_windows))
    if calibration.slice_epochs or calibration.fine_epochs:
        final, read = elastic.slice_bits[0], sum(elastic.slice_bits[:2])
        alone = partial(SliceTuner, final_width=final, reads=(read,), epochs=1, rate=0.01)
        makers.append(partial(_distillation, "slices", alone, 0))
    fits = calibration.tuned_scores(elastic.slice_bits) < len(elastic.slice_bits) - 1
    if calibration.recipe == "elastic" and calibration.fit_epochs and fits:
        makers.append(_fitting)
    return [make(config, elastic, calibration, mesh) for make in makers]


def _calibration(config: LlamaConfig, elastic: ElasticConfig, calibration: CalibrationConfig, mesh: Mesh) -> Program:
    samples = Samples.create(calibration)
    trainer = BlockTrainer(
        config=config, elastic=elastic, calibration=calibration, samples=samples, dtype=jnp.bfloat16, mesh=mesh
    )
    params, placement = trainer.abstract_trained, trainer.placement
    stage = stages(calibration)[-1]
    state = jax.eval_shape(trainer.optimizer(stage).init, params)

    def stream(count: int) -> jax.ShapeDtypeStruct:
        shape = (count, calibration.window_length, config.hidden_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placement.batched(shape))

    def whole(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement.replicated)

    ids, bits = samples.steps(calibration.batch_size)
    streams = (stream(len(samples.window)), stream(calibration.windows), whole(samples.window.astype(np.int32)))
    plan = (whole(ids.astype(np.int32)), whole(bits), whole(bits))
    return Program(
        name="calibration",
        function=trainer.epochs[stage],
        arguments=(params, placement.abstract(state), trainer.abstract_dense, streams, plan),
        batch=calibration.batch_size,
        tokens=calibration.window_length,
    )


def _distillation(
    name: str,
    kind: Callable[..., Distiller],
    held: int,
    config: LlamaConfig,
    elastic: ElasticConfig,
    calibration: CalibrationConfig,
    mesh: Mesh,
) -> Program:
    """An epoch over all windows but ``held`` of them."""
    windows = np.zeros((calibration.windows - held, calibration.window_length), np.int32)
    trainer = kind(
        config=config,
        elastic=elastic,
        calibration=calibration,
        windows=windows,
        generated=windows[:0],
        dtype=jnp.bfloat16,
        mesh=mesh,
    )
    function, arguments = trainer.abstract_epoch
    return Program(
        name=name,
        function=function,
        arguments=arguments,
        batch=calibration.end_batch_size,
        tokens=calibration.window_length,
    )


def _fitting(config: LlamaConfig, elastic: ElasticConfig, calibration: CalibrationConfig, mesh: Mesh) -> Program:
    windows = np.zeros((calibration.windows - calibration.threshold_windows, calibration.window_length), np.int32)
    kept = calibration.tuned_scores(elastic.slice_bits)
    trainer = RouterTrainer(model=_elastic(config, elastic, mesh), calibration=calibration, windows=windows, kept=kept)
    function, arguments = trainer.abstract_step
    return Program(
        name="fitting",
        function=function,
        arguments=arguments,
        batch=calibration.fit_batch_size,
        tokens=calibration.window_length,
    )


def serving_programs(
    config: LlamaConfig, elastic: ElasticConfig, mesh: Mesh, *, batch: int, context: int
) -> list[Program]:
    """Prefill of ``batch`` prompts of ``context`` tokens, and one decoding step after as many, in bfloat16."""
    model = _elastic(config, elastic, mesh)
    placement = model.placement
    assert placement is not None, "it was made with one"
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, context + 1, jnp.bfloat16))
    cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        cache,
        placement.cache(cache),
    )
    bits = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=placement.batched((batch,)))

    def last_logits(variables: Any, tokens: Any, cache: KVCache, bits: Any) -> Any:
        logits, token_bits, cache = model.decode(variables, tokens, cache, bits)
        return logits[:, -1], token_bits, cache

    def program(name: str, length: int) -> Program:
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=placement.batched((batch, length)))
        return Program(
            name=name,
            function=jax.jit(last_logits, donate_argnums=2),
            arguments=(model.variables, tokens, cache, bits),
            batch=batch,
            tokens=context,
        )

    return [program("prefill", context), program("decode", 1)]


def _elastic(config: LlamaConfig, elastic: ElasticConfig, mesh: Mesh) -> ElasticModel:
    """A model whose variables are shapes with shardings."""
    placement = Placement.create(mesh, config, elastic)
    variables = placement.abstract(abstract_variables(config, elastic))
    return ElasticModel(config=config, elastic=elastic, variables=variables, dtype=jnp.bfloat16, placement=placement)
