"""The whole analysis of a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mobiquant_jax.analysis.comparison import ROUTER, Rivals
from mobiquant_jax.analysis.linears import elastic_config, linear_shares
from mobiquant_jax.analysis.retention import retention_scores
from mobiquant_jax.analysis.rows import Case, Row, Tally
from mobiquant_jax.analysis.sensitivity import Sensitivity
from mobiquant_jax.analysis.static import Allocation, allocate, base_depths
from mobiquant_jax.analysis.steps import Steps
from mobiquant_jax.analysis.token_errors import TokenErrors, squared_errors, summarize
from mobiquant_jax.evaluation import check_bits
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.quant import CODE_BITS
from mobiquant_jax.routing import TableBudget

LEAST_TOKENS = 20  # of a window, so that its worst tenth is more than one token


@dataclass(frozen=True, kw_only=True)
class RouterUse:
    """Where the router spends its bits.

    Attributes:
        linear_bits: average bits of each linear, over all windows.
        token_bits: average bits of each of the first window's tokens.
    """

    linear_bits: Float[np.ndarray, "L N"]
    token_bits: Float[np.ndarray, " T"]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an analysis found; arrays are on the host, and dicts go by the average bits asked for.

    Attributes:
        full: the model at full depth.
        errors: statistics of the tokens' errors, averaged over windows.
        example: squared errors of the first window's tokens, at every depth.
        retention: rows of the retention experiment.
        policies: rows of the router and its rivals.
        router: where the router spends its bits.
        static: the static allocations.
    """

    full: Row
    errors: TokenErrors
    example: Float[np.ndarray, "L N T E"]
    retention: list[Row]
    policies: list[Row]
    router: dict[float, RouterUse]
    static: dict[float, Allocation]


@dataclass(frozen=True, kw_only=True)
class Study:
    """An analysis of one model.

    Attributes:
        model: an elastic model.
        windows: tokens that everything is measured on.
        search_windows: other tokens, on which static allocations are found.
        choice_windows: tokens, others again, on which the best of them are chosen.
        bits: average bits at which the router is compared.
        seed: of random choices.
        progress: called with a line for each finished step.
    """

    model: ElasticModel
    windows: Int[np.ndarray, "n T"]
    search_windows: Int[np.ndarray, "s S"]
    choice_windows: Int[np.ndarray, "c T"]
    bits: Sequence[float]
    seed: int = 0
    progress: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        """Checks the bits and the windows."""
        first = elastic_config(self.model).slice_bits[0]
        if not self.bits:
            raise ValueError("give the average bits at which the router is compared, such as 2.5,3,4,5")
        for bits in self.bits:
            if check_bits(bits) < first:
                raise ValueError(f"{bits:g} average bits are below the {first} bits of the first slice")
        if self.windows.shape[1] < LEAST_TOKENS:
            raise ValueError(f"windows of {self.windows.shape[1]} tokens are too short: {LEAST_TOKENS} are the least")

    def run(self) -> Findings:
        """Measures everything."""
        steps = Steps(model=self.model)
        router, rows = self._use_router(steps)
        budgets = {row.asked: round(row.bits, 2) for row in rows}  # 3.9999 bits must not cost the rivals a linear
        static = self._search(budgets)
        return self._measure(steps, Rivals(steps, budgets, static), router, rows, static)

    def _use_router(self, steps: Steps) -> tuple[dict[float, RouterUse], list[Row]]:
        """The model as it runs, at each average."""
        tally, use = self._tally(), {}
        shares = linear_shares(self.model.config)
        for bits in self.bits:
            policy = TableBudget(bits=jnp.full(1, bits, jnp.float32))
            linear_bits = []
            for index, window in enumerate(self.windows):
                tokens = jnp.asarray(window)[None]
                score, used = steps.routed(self.model.variables, tokens, policy, jax.random.key(0))
                linear_bits.append(jnp.mean(used, axis=(2, 3)))
                if index == 0:
                    token_bits = np.einsum("lnt,n->t", used[:, :, 0], shares) / len(used)
                tally.add({Case(ROUTER, bits): score})
            use[bits] = RouterUse(linear_bits=np.mean(jax.device_get(linear_bits), axis=0), token_bits=token_bits)
            self.progress(f"router at {bits:g} bits")
        return use, list(tally.rows())

    def _search(self, budgets: dict[float, float]) -> dict[float, Allocation]:
        """Static allocations within the bits that the router used."""
        sensitivity = Sensitivity(model=self.model, tokens=jnp.asarray(self.search_windows))
        layers, measured = self.model.config.num_hidden_layers, []
        for base in base_depths(len(elastic_config(self.model).slice_bits)):

            def show(layer: int, base: int = base) -> None:
                self.progress(f"static depths: layer {layer + 1}/{layers} around depth {base}")

            measured.append(sensitivity.around(base, show))
        found = allocate(self.model, measured, self.choice_windows, list(budgets.values()))
        self.progress("static depths: chosen")
        return dict(zip(budgets, found, strict=True))

    def _measure(
        self,
        steps: Steps,
        rivals: Rivals,
        router: dict[float, RouterUse],
        rows: list[Row],
        static: dict[float, Allocation],
    ) -> Findings:
        """Errors, retention and rivals, which share a window's probe."""
        full, retention, compared, errors = self._tally(), self._tally(), self._tally(), []
        summary, key = jax.jit(summarize), jax.random.key(self.seed)
        for index, window in enumerate(self.windows):
            tokens, draw = jnp.asarray(window)[None], jax.random.fold_in(key, index)
            score, measured = steps.probed(self.model.variables, tokens)
            if index == 0:
                example = np.asarray(squared_errors(measured)[:, :, 0])
            full.add({Case("full depth", float(CODE_BITS)): score})
            retention.add(retention_scores(steps, tokens, measured, draw))
            compared.add(rivals(tokens, measured, draw))
            errors.append(jax.device_get(summary(measured)))
            self.progress(f"errors, retention and rivals: window {index + 1}/{len(self.windows)}")
        return Findings(
            full=next(full.rows()),
            errors=jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *errors),
            example=example,
            retention=list(retention.rows()),
            policies=[*rows, *compared.rows()],
            router=router,
            static=static,
        )

    def _tally(self) -> Tally:
        return Tally(self.windows.shape[1] - 1)
