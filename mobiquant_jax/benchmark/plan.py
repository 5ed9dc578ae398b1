"""What there is to measure, in the order in which it is."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mobiquant_jax.benchmark.decode import decode_rows
from mobiquant_jax.benchmark.kernels import kernel_keys, kernel_rows
from mobiquant_jax.benchmark.memory import describe_weights
from mobiquant_jax.benchmark.prefill import prefill_rows
from mobiquant_jax.benchmark.routers import router_rows
from mobiquant_jax.benchmark.settings import DENSE_BITS, BenchmarkSettings
from mobiquant_jax.benchmark.switching import switch_rows
from mobiquant_jax.benchmark.table import Row
from mobiquant_jax.benchmark.torch_rows import torch_keys, torch_rows
from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig

PARTS = ("kernels", "decode", "prefill", "switch", "routers", "torch")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that are measured together.

    Attributes:
        part: one of `PARTS`.
        section: where the rows go.
        keys: of each row, the fields that tell it apart; ``({},)`` for a section of one row.
        weights: the model to make, ``"packed"`` or ``"dense"``, or None.
        rows: ``(model, missing keys) -> rows``.
    """

    part: str
    section: str
    keys: tuple[Row, ...]
    weights: str | None
    rows: Callable[[Any, list[Row]], Iterator[Row]]


def plan(config: LlamaConfig, elastic: ElasticConfig, settings: BenchmarkSettings, parts: Sequence[str]) -> list[Group]:
    """The groups of the parts asked for: those of packed weights first, so that their peak of memory is their own."""
    pairs = itertools.product(settings.batches, settings.bits)
    groups = [
        Group(
            part="kernels",
            section="weights",
            keys=({},),
            weights="packed",
            rows=lambda model, _: iter([describe_weights(model)]),
        ),
        Group(
            part="kernels",
            section="kernels",
            keys=kernel_keys(),
            weights="packed",
            rows=lambda model, keys: kernel_rows(model, keys, settings),
        ),
        Group(
            part="decode",
            section="decode",
            keys=tuple({"batch": batch, "bits": bits} for batch, bits in pairs),
            weights="packed",
            rows=lambda model, keys: decode_rows(model, keys, settings),
        ),
        Group(
            part="routers",
            section="router_share",
            keys=({},),
            weights="packed",
            rows=lambda model, _: router_rows(model, settings),
        ),
        Group(
            part="switch",
            section="switch",
            keys=({},),
            weights="packed",
            rows=lambda model, _: switch_rows(model),
        ),
        Group(
            part="prefill",
            section="prefill",
            keys=tuple({"tokens": tokens} for tokens in settings.prefill),
            weights=None,
            rows=lambda _, keys: prefill_rows(config, elastic, keys, settings),
        ),
        Group(
            part="decode",
            section="decode",
            keys=tuple({"batch": batch, "bits": DENSE_BITS} for batch in settings.batches),
            weights="dense",
            rows=lambda model, keys: decode_rows(model, keys, settings),
        ),
        Group(
            part="torch",
            section="torch",
            keys=torch_keys() if "torch" in parts else (),
            weights=None,
            rows=lambda _, keys: torch_rows(config, elastic.group_size, keys),
        ),
    ]
    return [group for group in groups if group.part in parts]


def identity(config: LlamaConfig, elastic: ElasticConfig, settings: BenchmarkSettings) -> Row:
    """What must not differ between rows of one table."""
    device = jax.devices()[0]
    counts = {name: getattr(settings, name) for name in ("context", "steps", "loops")}
    return {
        "architecture": dataclasses.asdict(config),
        "elastic": dataclasses.asdict(elastic),
        "settings": counts,
        "device": device.device_kind,
        "jax": jax.__version__,
    }
