"""What a calibration run can be told, and the named recipes."""

from dataclasses import dataclass
from typing import Literal

from mobiquant_jax.quant import CODE_BITS, widths

RECIPES = ("elastic", "paper")
STREAMS = ("device", "host")
LOSSES = ("mse", "relative", "log_relative")

Routing = Literal["first_slice", "uniform", "penalty"]


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Settings of block-wise calibration.

    Attributes:
        recipe: ``"elastic"`` trains weights and clipping, all tokens of a step at one width, and fits the routers once
            they are final; ``"paper"`` trains clipping and routers only, weights frozen, under a budget penalty
            (arXiv 2602.20191).
        windows: calibration windows; a multiple of the number of budgets.
        window_length: tokens a window.
        batch_size: windows a step; all at one budget.
        budgets: average bits that the windows are streamed at, and that blocks, end-to-end tuning and the fitting of
            routers train at.
        budgets_per_window: at how many of the budgets each window is streamed.
        scale_width: bits at which channel scales are to be right (`channel_scales`); 0 for none.
        epochs: epochs of a block's training.
        joint_epochs: how many of them, the last ones, train slices and routers together (recipe "paper").
        weight_lr: peak learning rate of the weights (recipe "elastic").
        clipping_lr: peak learning rate of the clipping logits.
        router_lr: peak learning rate of the routers in the blocks' training (recipe "paper").
        loss: block error: ``"mse"``; ``"relative"``, each token's error over its energy, so that an attention sink
            counts as one token; ``"log_relative"``, its logarithm, which gives every budget the same pull.
        propagated_weight: weight of a second target, the full-precision block on the quantized stream.
        end_epochs: epochs of end-to-end tuning of weights and clipping on the model's own logits, after the blocks.
            Needs memory for the whole model, its gradients and its optimizer.
        end_batch_size: windows a step of it.
        end_weight_lr: peak learning rate of the weights in it; 0 freezes them.
        end_clipping_lr: of the clipping logits.
        end_generated_windows: windows that the unquantized model writes itself to learn from; 0 for none.
        end_generated_share: share of them in each epoch's windows.
        routed_epochs: epochs of tuning weights, clipping and routers together after it, tokens at the depths that the
            routers choose; see `routed_tuning`, and `tiers` for how they choose. Budgets are those of
            ``router.budget_grid`` up to ``fine_above``, and
            windows those that thresholds are not recorded on; batches and saves are as in end-to-end tuning.
        routed_weight_lr: peak learning rate of the weights in it; 0 freezes them.
        routed_clipping_lr: of the clipping logits.
        routed_router_lr: of the routers.
        routed_penalty: lambda of its budget penalty, ``lambda (B - B*)^2``.
        fine_above: bits of a code that these two stages train, at budgets of up to so many only; then the slices
            beyond start from the unquantized weights. With 8 all slices are trained together.
        fine_tuned_attention: whether those of the attention start from its tuned weights instead; see `slice_tuning`.
        slice_epochs: epochs of tuning each slice alone after them, from the second on, the coarser ones final, for all
            reads of up to ``fine_above`` bits that it is part of; see `slice_tuning`. Batches, windows and saves, here
            and for the finer slices, are as in end-to-end tuning; the weights before it stay in memory until the last
            slice starts.
        slice_lr: peak learning rate in it, in steps of the code that the slice completes.
        fine_epochs: epochs of tuning the slices beyond ``fine_above`` alone, all of them together.
        fine_lr: peak learning rate of those, in steps of the 8-bit code.
        end_save_seconds: the state of end-to-end tuning, like that of every stage after it, is saved after the first
            epoch that ends so long after the last save, since saving may take longer than an epoch: a kill costs this
            and an epoch of each.
        fit_epochs: epochs of fitting all routers together to what their slices gain, once the weights are final; with
            0 they know their input's magnitude and their linear's mean gain. After routed tuning only the scores of
            finer slices are fitted; those know the mean gain alone with 0. The recipe "paper" keeps the blocks' own.
            Needs memory for the whole packed model, and for the logits and activations of ``fit_batch_size`` windows.
        fit_batch_size: windows a step of it.
        fit_lr: peak learning rate of the routers in it.
        temperature: of the gates' surrogate gradient (recipe "paper" and routed tuning).
        dtype: type of the matmuls in training, ``"float32"`` or ``"bfloat16"``; parameters and errors are float32.
        streams: where the activations of all windows are kept: ``"device"``, split over the devices' memory, or
            ``"host"``, whole in each process's, from where a batch at a time goes to the devices. The steps are the
            same; compiled one by one, they may round differently.
        penalty: lambda of the recipe "paper", ``lambda (B - B*(t))^2``.
        threshold_windows: calibration windows on which thresholds are recorded; routers are fitted to the others, so
            that the bits they use hold for text they were not fitted to.
        threshold_scope: ``"global"``, one threshold for all linears, so that bits go where they gain most;
            ``"linear"``, every linear meets the budget by itself.
        seed: of routers and shuffling.
    """

    recipe: str = "elastic"
    windows: int = 128
    window_length: int = 2048
    batch_size: int = 1
    budgets: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
    budgets_per_window: int = 1
    scale_width: int = 0
    epochs: int = 20
    joint_epochs: int = 10
    weight_lr: float = 1e-4
    clipping_lr: float = 1e-2
    router_lr: float = 1e-3
    loss: str = "log_relative"
    propagated_weight: float = 0.0
    end_epochs: int = 0
    end_batch_size: int = 1
    end_weight_lr: float = 5e-5
    end_clipping_lr: float = 1e-3
    end_generated_windows: int = 0
    end_generated_share: float = 0.67
    routed_epochs: int = 0
    routed_weight_lr: float = 5e-5
    routed_clipping_lr: float = 5e-4
    routed_router_lr: float = 2e-3
    routed_penalty: float = 20.0
    fine_above: int = CODE_BITS
    fine_tuned_attention: bool = False
    slice_epochs: int = 0
    slice_lr: float = 0.002
    fine_epochs: int = 0
    fine_lr: float = 0.01
    end_save_seconds: float = 120.0
    fit_epochs: int = 2
    fit_batch_size: int = 1
    fit_lr: float = 3e-3
    temperature: float = 1.0
    dtype: str = "float32"
    streams: str = "device"
    penalty: float = 1.0
    threshold_windows: int = 16
    threshold_scope: str = "global"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field that can be checked without a model."""
        object.__setattr__(self, "budgets", tuple(self.budgets))  # settings are keys of what is compiled
        _one_of("calibration.recipe", self.recipe, RECIPES)
        _one_of("calibration.loss", self.loss, LOSSES)
        _one_of("calibration.streams", self.streams, STREAMS)
        _one_of("calibration.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("calibration.threshold_scope", self.threshold_scope, ("linear", "global"))
        levels = len(self.budgets)
        if not self.budgets or not all(2 <= bits <= 8 for bits in self.budgets):
            raise ValueError(f"calibration.budgets must lie in [2, 8], got {self.budgets}")
        if not 1 <= self.budgets_per_window <= levels:
            raise ValueError(f"calibration.budgets_per_window={self.budgets_per_window} is outside 1..{levels}")
        if self.windows < 1 or self.windows % levels:
            raise ValueError(f"calibration.windows={self.windows} is no multiple of the {levels} budgets")
        if self.batch_size < 1 or self.samples_per_budget % self.batch_size:
            raise ValueError(
                f"calibration.batch_size={self.batch_size} does not divide {self.samples_per_budget} windows a budget"
            )
        if self.window_length < 2:
            raise ValueError(f"calibration.window_length={self.window_length} must be at least 2")
        if self.epochs < 1:
            raise ValueError(f"calibration.epochs={self.epochs} must be at least 1")
        if self.recipe == "paper" and self.joint_epochs > self.epochs:
            raise ValueError(f"calibration.joint_epochs={self.joint_epochs} exceeds epochs={self.epochs}")
        if not 1 <= self.end_batch_size <= self.windows:
            raise ValueError(f"calibration.end_batch_size={self.end_batch_size} is outside 1..{self.windows}")
        for name in ("end_epochs", "routed_epochs", "slice_epochs"):
            if self.recipe == "paper" and getattr(self, name):
                raise ValueError(f"calibration.{name}={getattr(self, name)}: the recipe 'paper' ends with the blocks")
        if self.slice_epochs > 0 and not self.distils_coarse:
            raise ValueError(f"calibration.slice_epochs={self.slice_epochs} needs end_epochs or routed_epochs")
        if self.routed_epochs and self.end_batch_size > self.windows - self.threshold_windows:
            raise ValueError(
                f"calibration.end_batch_size={self.end_batch_size}: routed_epochs trains on"
                f" {self.windows - self.threshold_windows} windows only"
            )
        if self.routed_epochs and self.threshold_scope != "global":
            raise ValueError(
                f"calibration.threshold_scope={self.threshold_scope!r}: routers that routed_epochs train share one"
                " threshold, 'global'"
            )
        if self.recipe == "paper" and self.has_finer_slices:
            raise ValueError(f"calibration.fine_above={self.fine_above}: the recipe 'paper' trains all slices together")
        if self.recipe == "paper" and self.scale_width:
            raise ValueError(f"calibration.scale_width={self.scale_width}: the recipe 'paper' scales no channels")
        if self.scale_width not in (0, *range(2, CODE_BITS + 1)):
            raise ValueError(
                f"calibration.scale_width={self.scale_width} is neither 0 nor a width from 2 to {CODE_BITS}"
            )
        if self.fine_above > CODE_BITS:
            raise ValueError(f"calibration.fine_above={self.fine_above} exceeds the {CODE_BITS} bits of a code")
        if self.fine_epochs > 0 and not self.has_finer_slices:
            raise ValueError(f"calibration.fine_epochs={self.fine_epochs} needs fine_above below {CODE_BITS}")
        if self.fine_tuned_attention and not (self.has_finer_slices and self.distils_coarse):
            raise ValueError(
                "calibration.fine_tuned_attention=True needs end_epochs or routed_epochs, and fine_above below"
                f" {CODE_BITS}"
            )
        if not 0 <= self.end_generated_share <= 1:
            raise ValueError(f"calibration.end_generated_share={self.end_generated_share} is outside 0..1")
        if not self.temperature > 0:
            raise ValueError(f"calibration.temperature={self.temperature} must be positive")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"calibration.{name}={getattr(self, name)} must be finite and not negative")
        if self.fit_batch_size < 1:
            raise ValueError(f"calibration.fit_batch_size={self.fit_batch_size} must be at least 1")
        fitted = self.fit_batch_size if self.recipe == "elastic" else 0  # windows that fitting the routers needs
        if not 1 <= self.threshold_windows <= self.windows - fitted:
            beside = f", beside fit_batch_size={fitted} of windows={self.windows}" if fitted else ""
            raise ValueError(
                f"calibration.threshold_windows={self.threshold_windows} is outside 1..{self.windows - fitted}{beside}"
            )

    def check_slices(self, slice_bits: tuple[int, ...], budget_grid: tuple[float, ...]) -> None:
        """Raises ValueError unless the stages can train what they are to.

        No budget lies below the first slice's bits, ``fine_above`` is a width that slices refine, and routed tuning has
        depths to choose from, a budget at which to choose and a threshold at every width.
        """
        if min(self.budgets) < slice_bits[0]:
            raise ValueError(f"calibration.budgets {self.budgets} start below the first slice's {slice_bits[0]} bits")
        for name in ("routed_epochs", "slice_epochs"):
            if getattr(self, name) and self.coarse_depth(slice_bits) < 2:
                raise ValueError(f"calibration.fine_above={self.fine_above}: {name} needs two slices up to it")
        if self.routed_epochs and not any(slice_bits[0] < bits < self.fine_above for bits in budget_grid):
            raise ValueError(
                f"router.budget_grid {budget_grid} has nothing between {slice_bits[0]} and fine_above="
                f"{self.fine_above} bits for routed_epochs to train at"
            )
        missing = [width for width in widths(slice_bits) if width not in budget_grid]
        if self.routed_epochs and missing:
            raise ValueError(f"router.budget_grid {budget_grid} lacks {missing[0]}: routed_epochs needs all widths")
        if not self.has_finer_slices:
            return
        final = widths(slice_bits)[:-1]
        if self.fine_above not in final:
            raise ValueError(
                f"calibration.fine_above={self.fine_above} is none of the widths {final} that slices refine"
            )
        if self.end_epochs and not self.tuned_budgets:
            raise ValueError(f"calibration.budgets {self.budgets} are all above fine_above={self.fine_above}")

    @property
    def has_finer_slices(self) -> bool:
        """Whether some slices are made once the coarser ones are final."""
        return self.fine_above < CODE_BITS

    def coarse_depth(self, slice_bits: tuple[int, ...]) -> int:
        """How many slices end-to-end tuning trains."""
        return sum(width <= self.fine_above for width in widths(slice_bits))

    def tuned_scores(self, slice_bits: tuple[int, ...]) -> int:
        """Of how many slices, from the second on, routed tuning trains the scores, for good."""
        return self.coarse_depth(slice_bits) - 1 if self.routed_epochs else 0

    @property
    def distils_coarse(self) -> bool:
        """Whether the blocks are tuned together, on the model's logits, before any finer slices are."""
        return self.end_epochs > 0 or self.routed_epochs > 0

    @property
    def distils(self) -> bool:
        """Whether any stage learns from the unquantized model's logits."""
        return self.distils_coarse or self.fine_epochs > 0

    @property
    def tuned_budgets(self) -> tuple[float, ...]:
        """The budgets that end-to-end tuning trains at."""
        return tuple(bits for bits in self.budgets if bits <= self.fine_above)

    @property
    def batches(self) -> dict[str, int]:
        """Numbers of windows that go through the model together, by field."""
        fits = ("fit_batch_size",) if self.recipe == "elastic" else ()
        fields = ("windows", "batch_size", *fits, *(("end_batch_size",) if self.distils else ()))
        return {f"calibration.{name}": getattr(self, name) for name in fields}

    @property
    def samples_per_budget(self) -> int:
        """Windows streamed at each budget."""
        return self.windows * self.budgets_per_window // len(self.budgets)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a block's training.

    Attributes:
        name: for messages.
        epochs: passes over the samples.
        routing: which depths the tokens train at: ``"first_slice"`` all at depth 1; ``"uniform"`` all at one depth,
            drawn to meet the sample's budget on average; ``"penalty"`` by router against threshold 0, with the budget
            a penalty.
        clipping_lr: of the clipping logits.
        weight_lr: of the kernels; 0 freezes them.
        router_lr: of the routers; 0 freezes them.
    """

    name: str
    epochs: int
    routing: Routing
    clipping_lr: float
    weight_lr: float = 0.0
    router_lr: float = 0.0


def stages(config: CalibrationConfig) -> tuple[Stage, ...]:
    """The stages of the config's recipe; those without epochs are left out."""
    clipping_lr = config.clipping_lr
    if config.recipe == "elastic":
        nested = Stage(
            name="nested",
            epochs=config.epochs,
            routing="uniform",
            clipping_lr=clipping_lr,
            weight_lr=config.weight_lr,
        )
        return (nested,)
    both = (
        Stage(
            name="first slice",
            epochs=config.epochs - config.joint_epochs,
            routing="first_slice",
            clipping_lr=clipping_lr,
        ),
        Stage(
            name="joint",
            epochs=config.joint_epochs,
            routing="penalty",
            clipping_lr=clipping_lr,
            router_lr=config.router_lr,
        ),
    )
    return tuple(stage for stage in both if stage.epochs)


_NOT_NEGATIVE = (
    "joint_epochs",
    "end_save_seconds",
    "weight_lr",
    "clipping_lr",
    "router_lr",
    "propagated_weight",
    "end_epochs",
    "routed_epochs",
    "routed_weight_lr",
    "routed_clipping_lr",
    "routed_router_lr",
    "routed_penalty",
    "end_generated_windows",
    "end_weight_lr",
    "end_clipping_lr",
    "slice_epochs",
    "slice_lr",
    "fine_epochs",
    "fine_lr",
    "fit_epochs",
    "fit_lr",
    "penalty",
    "seed",
)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
