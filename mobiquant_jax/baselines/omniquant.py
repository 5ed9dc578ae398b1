"""OmniQuant (Shao et al., arXiv 2308.13137), clipping only: each group's range is learned, weights stay frozen.

    hi = sigmoid(gamma) max(W_g)        lo = sigmoid(beta) min(W_g)

Its learned equivalent transform is left out: for weight-only quantization of LLaMA it does not support grouped queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import optax

from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import Kernels, Params, get_kernels, with_kernels
from mobiquant_jax.baselines.settings import check_number, static
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.baselines.training import Parametrization, Trained, build_fit, check_training, epoch_order
from mobiquant_jax.quant import Clipping, limits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class OmniQuantConfig:
    """Settings of OmniQuant.

    Attributes:
        clipping_lr: constant learning rate of the clipping logits, AdamW without decay.
        epochs: passes over the windows.
        batch_size: windows a step.
        loss: block error.
        propagated_weight: weight of a second target, the full-precision block on the quantized stream.
    """

    clipping_lr: float = 1e-2
    epochs: int = static(20)
    batch_size: int = static(1)
    loss: str = static("mse")
    propagated_weight: float = static(0.0)

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_training("omniquant", self, clipping_lr=self.clipping_lr)
        check_number("omniquant.epochs", self.epochs, least=1)

    @classmethod
    def recipe(cls, bits: int) -> "OmniQuantConfig":
        """The published settings: at 2 bits twice the epochs and a second target."""
        return cls(epochs=40, propagated_weight=1.0) if bits == 2 else cls()


def clip(kernels: Kernels, clipping: Trained, bits: int) -> Kernels:
    """Each kernel on the n-bit grid between its clipped limits."""
    return {path: fake_quantize(kernel, *limits(kernel, clipping[path]), bits) for path, kernel in kernels.items()}


def parametrization(spec: QuantSpec) -> Parametrization:
    """What OmniQuant trains: the clipping logits of each kernel."""

    def create(_: Params, settings: OmniQuantConfig) -> Trained:
        shapes = spec.config.linear_shapes().items()
        return {path: Clipping.create(rows, columns, spec.group_size) for path, (rows, columns) in shapes}

    def materialize(block: Params, clipping: Trained) -> Params:
        return with_kernels(block, clip(get_kernels(block, spec.config), clipping, spec.bits))

    def optimizer(settings: OmniQuantConfig, steps: int) -> optax.GradientTransformation:
        return optax.adamw(settings.clipping_lr, weight_decay=0.0)

    return Parametrization(create=create, materialize=materialize, optimizer=optimizer)


def build(spec: QuantSpec) -> Callable[[BlockTask], BlockOutcome]:
    """OmniQuant for the blocks of a model; the outcome keeps the clipping logits."""
    fit = build_fit(spec, parametrization(spec))

    def quantize_block(task: BlockTask) -> BlockOutcome:
        windows, settings = len(task.target), task.settings
        orders = [epoch_order(windows, settings.batch_size, settings.epochs, rng) for rng in task.rngs]
        params, clipping = fit(task, np.stack(orders))
        return BlockOutcome(params=params, kept=clipping)

    return quantize_block


def run_at(spec: QuantSpec, layers: Params, clipping: Trained) -> Params:
    """All blocks at the width of ``spec`` with clipping logits that may have been calibrated at another.

    Args:
        spec: the width to run at.
        layers: the dense blocks' parameters, each leaf with a leading layer axis.
        clipping: what a calibration kept, each leaf with a leading layer axis.
    """
    kernels = _clip_layers(spec.bits, get_kernels(layers, spec.config), clipping)
    return with_kernels(layers, kernels)


@partial(jax.jit, static_argnums=0)
def _clip_layers(bits: int, kernels: Kernels, clipping: Trained) -> Kernels:
    return jax.lax.map(lambda layer: clip(layer[0], layer[1], bits), (kernels, clipping))
