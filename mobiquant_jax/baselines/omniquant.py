"""OmniQuant (Shao et al., arXiv 2308.13137), clipping only: each group's range is learned, weights stay frozen.

    hi = sigmoid(gamma) max(W_g)        lo = sigmoid(beta) min(W_g)

Its learned equivalent transform is left out: for weight-only quantization of LLaMA it does not support grouped queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import optax

from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import Kernels, Params, get_kernels, with_kernels
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec, block_forward
from mobiquant_jax.baselines.training import (
    FitData,
    Parametrization,
    Trained,
    check_training,
    compile_fit,
    epoch_order,
)
from mobiquant_jax.quant import Clipping, limits


@dataclass(frozen=True, kw_only=True)
class OmniQuantConfig:
    """Settings of OmniQuant.

    Attributes:
        epochs: passes over the windows.
        batch_size: windows a step.
        clipping_lr: constant learning rate of the clipping logits, AdamW without decay.
        propagated_weight: weight of a second target, the full-precision block on the quantized stream.
        loss: block error.
    """

    epochs: int = 20
    batch_size: int = 1
    clipping_lr: float = 1e-2
    propagated_weight: float = 0.0
    loss: str = "mse"

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_training(
            "omniquant",
            steps=self.epochs,
            batch_size=self.batch_size,
            loss=self.loss,
            clipping_lr=self.clipping_lr,
            propagated_weight=self.propagated_weight,
        )

    @classmethod
    def recipe(cls, bits: int) -> "OmniQuantConfig":
        """The published settings: at 2 bits twice the epochs and a second target."""
        return cls(epochs=40, propagated_weight=1.0) if bits == 2 else cls()


def clip(kernels: Kernels, clipping: Trained, bits: int) -> Kernels:
    """Each kernel on the n-bit grid between its clipped limits."""
    return {path: fake_quantize(kernel, *limits(kernel, clipping[path]), bits) for path, kernel in kernels.items()}


def build(spec: QuantSpec, config: OmniQuantConfig) -> Callable[[BlockTask], BlockOutcome]:
    """OmniQuant for the blocks of a model; the outcome keeps the clipping logits."""

    def create(kernels: Kernels) -> Trained:
        return {
            path: Clipping.create(kernel.shape[0], kernel.shape[1], spec.group_size) for path, kernel in kernels.items()
        }

    fit = compile_fit(
        spec,
        Parametrization(create=create, materialize=partial(clip, bits=spec.bits)),
        lambda steps: optax.adamw(config.clipping_lr, weight_decay=0.0),
        loss=config.loss,
    )

    def quantize_block(task: BlockTask) -> BlockOutcome:
        targets, weights = [task.target], [1.0]
        if config.propagated_weight:
            targets.append(block_forward(spec.config, task.dense, task.quantized))
            weights.append(config.propagated_weight)
        order = epoch_order(len(task.quantized), config.batch_size, config.epochs, task.rng)
        data = FitData(inputs=task.quantized, targets=tuple(targets), weights=tuple(weights))
        params, clipping = fit(task.dense, data, order)
        return BlockOutcome(params=params, kept=clipping)

    return quantize_block


def run_at(spec: QuantSpec, layers: Params, clipping: Trained) -> Params:
    """All blocks at the width of ``spec`` with clipping logits that may have been calibrated at another.

    Args:
        spec: the width to run at.
        layers: the dense blocks' parameters, each leaf with a leading layer axis.
        clipping: what a calibration kept, each leaf with a leading layer axis.
    """

    @jax.jit
    def every_layer(kernels: Kernels, clipping: Trained) -> Kernels:
        return jax.lax.map(lambda layer: clip(layer[0], layer[1], spec.bits), (kernels, clipping))

    return with_kernels(layers, every_layer(get_kernels(layers, spec.config), clipping))
