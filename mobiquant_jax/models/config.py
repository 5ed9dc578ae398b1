"""The architecture of one LLaMA-family model, and its translation from and to Hugging Face's ``config.json``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_ROPE_SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# What a LLaMA config.json may leave out, with the value transformers gives it.
_HF_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HF_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Fields which, at any other value, describe a model this package does not compute.
_HF_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary scaling of type ``llama3``: slow frequencies are divided by ``factor``, fast ones kept.

    Attributes:
        factor: Divisor of the slow frequencies, at least 1.
        low_freq_factor: Turns over the original context below which a frequency is slow.
        high_freq_factor: Turns over the original context above which a frequency is fast; between the two the
            frequencies are blended.
        original_max_position_embeddings: Context length, in tokens, before scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        _require_positive_int("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a LLaMA model.

    A mapping given as ``rope_scaling`` becomes a `RopeScaling` and a list given as ``eos_token_ids`` a tuple, so that
    a plain dict from a configuration file can be expanded into the arguments.

    Attributes:
        vocab_size: Number of token ids V.
        hidden_size: Width D of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_hidden_layers: Number of blocks L.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; divides ``num_attention_heads``.
        head_dim: Width of one head, even; need not be ``hidden_size / num_attention_heads``.
        max_position_embeddings: Longest sequence, in tokens.
        rms_norm_eps: Added to the mean square inside RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: llama3 scaling of the rotary frequencies, or None.
        tie_word_embeddings: The head reuses the embedding.
        bos_token_id: Token put before a text, or None.
        eos_token_ids: Tokens that end a text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        for name in (*_HF_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _require_positive_int(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, token in (("bos_token_id", self.bos_token_id), *(("eos_token_ids", t) for t in self.eos_token_ids)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}: token {token} is outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Read the contents of a Hugging Face ``config.json``, of either generation.

        The older generation has ``rope_theta`` and ``rope_scaling`` (its type under ``rope_type`` or ``type``), the
        newer one a single ``rope_parameters``. Optional fields that are absent take transformers' own defaults.

        Args:
            hf: The parsed ``config.json`` of a ``LlamaForCausalLM``.

        Returns:
            The architecture.

        Raises:
            ValueError: A size is missing, or a field asks for something that is not supported; names field and value.
        """
        for name, supported in _HF_SUPPORTED.items():
            if name in hf and hf[name] not in supported:
                raise ValueError(f"config.json: {name}={hf[name]!r} is not supported, only {supported[0]!r}")
        for name in _HF_SIZES:
            if hf.get(name) is None:
                raise ValueError(f"config.json: {name} is missing")
        fields = {name: hf[name] for name in _HF_SIZES}
        fields |= {name: hf.get(name, default) for name, default in _HF_DEFAULTS.items()}
        eos = fields.pop("eos_token_id")
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        if hf.get("head_dim") is None and hidden % heads:
            raise ValueError(f"config.json: num_attention_heads={heads} does not divide hidden_size={hidden}")
        rope_theta, rope_scaling = _rope_from_hf(hf, fields["max_position_embeddings"])
        return cls(
            **fields,
            num_key_value_heads=_given(hf, "num_key_value_heads", heads),
            head_dim=_given(hf, "head_dim", hidden // heads),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        )

    def to_hf(self) -> dict[str, Any]:
        """Write the contents of a ``config.json`` that transformers 4 and 5 both load as a ``LlamaForCausalLM``.

        Returns:
            A JSON-ready dict holding the rotary fields of both generations.
        """
        scaling = None if self.rope_scaling is None else {"rope_type": "llama3", **asdict(self.rope_scaling)}
        eos = self.eos_token_ids
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of one block's seven linear kernels.

        Returns:
            ``{path below the block: (in, out)}`` in execution order q, k, v, o, gate, up, down.
        """
        hidden, ffn = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "attention/q_proj": (hidden, queries),
            "attention/k_proj": (hidden, keys),
            "attention/v_proj": (hidden, keys),
            "attention/o_proj": (queries, hidden),
            "mlp/gate_proj": (hidden, ffn),
            "mlp/up_proj": (hidden, ffn),
            "mlp/down_proj": (ffn, hidden),
        }


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _given(hf: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of config.json, where null means the same as absent."""
    return default if hf.get(name) is None else hf[name]


def _rope_from_hf(hf: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """The rotary base and scaling from either generation of config.json."""
    source = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(source) or {}
    theta = float(_given(rope, "rope_theta", _given(hf, "rope_theta", 1e4)))
    rope_type = _given(rope, "rope_type", _given(rope, "type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"config.json: {source}.rope_type={rope_type!r} is not supported, only 'default' and 'llama3'")
    for place, name in ((rope, f"{source}.partial_rotary_factor"), (hf, "partial_rotary_factor")):
        if _given(place, "partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"config.json: {name}={place['partial_rotary_factor']!r} is not supported, only 1.0")
    if rope_type == "default":
        return theta, None
    values = {"original_max_position_embeddings": max_position_embeddings} | {
        name: rope[name] for name in _ROPE_SCALING_FIELDS if rope.get(name) is not None
    }
    for name in _ROPE_SCALING_FIELDS:
        if name not in values:
            raise ValueError(f"config.json: {source}.{name} is missing")
    return theta, RopeScaling(**values)
