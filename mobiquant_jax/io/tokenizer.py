"""Text to token ids and back, equal to Hugging Face's tokenizers, from a Hugging Face folder or a GGUF file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from mobiquant_jax.io.gguf import GGUFFile, open_gguf

# The pattern that LLaMA 3's tokenizer.json splits words with.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Token types of a GGUF vocabulary.
_CONTROL = 3
_USER_DEFINED = 4


class Tokenizer:
    """A tokenizer that adds no tokens of its own: ``decode(encode(text)) == text``.

    Attributes:
        bos_token_id: the id that starts a text, or None.
        eos_token_ids: every id that ends a text or a turn.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        hf_config: Mapping[str, Any] | None = None,
    ):
        # A truncation or padding length left in tokenizer.json would silently change what is encoded.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._hf_config = dict(hf_config or {})
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        for token_id in (*self.eos_token_ids, *(() if bos_token_id is None else (bos_token_id,))):
            if backend.id_to_token(token_id) is None:
                raise ValueError(f"special token id {token_id} is not in the vocabulary of {self.vocab_size}")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Encodes a text; no token is added at either end.

        Args:
            text: any text; special tokens spelled out in it become their ids.

        Returns:
            int32 ids ``[N]``.
        """
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int] | Int[np.ndarray, " N"]) -> str:
        """Decodes token ids, special tokens included.

        Args:
            ids: ids ``[N]``; a cut through a character of several bytes decodes to U+FFFD.

        Returns:
            The text.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = [int(token_id) for token_id in ids]
        for token_id in ids:
            if token_id < 0 or self._backend.id_to_token(token_id) is None:
                raise ValueError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return self._backend.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` loads.

        Args:
            folder: an existing folder.
        """
        folder = Path(folder)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.bos_token_id is not None:
            config["bos_token"] = self._backend.id_to_token(self.bos_token_id)
        if self.eos_token_ids:
            config["eos_token"] = self._backend.id_to_token(self.eos_token_ids[0])
        config |= self._hf_config
        # Files are written through Python, so that a full disk is an OSError.
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(source: str | Path | GGUFFile) -> Tokenizer:
    """Loads a tokenizer from a Hugging Face folder or a GGUF file.

    Args:
        source: a folder with ``tokenizer.json``, a ``.gguf`` file, or an open :class:`~mobiquant_jax.io.gguf.GGUFFile`.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: there is no such file, or no tokenizer in it.
        NotImplementedError: a GGUF tokenizer of a kind that is not supported; the message names the kind.
        ValueError: a file is damaged.
    """
    if isinstance(source, GGUFFile):
        return _from_gguf(source)
    if Path(source).is_dir():
        return _from_hf(Path(source))
    return _from_gguf(open_gguf(source))


def has_tokenizer(source: str | Path | GGUFFile) -> bool:
    """Whether a Hugging Face folder or a GGUF file holds a tokenizer (of any kind)."""
    if isinstance(source, GGUFFile):
        return "tokenizer.ggml.model" in source
    return (Path(source) / "tokenizer.json").is_file()


def _from_hf(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: damaged tokenizer: {error}") from error

    def optional(name: str) -> dict[str, Any]:
        path = folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error

    def special(name: str) -> list[int]:
        """Ids of one role; old configs write a token as a dict, and ids stand in two more files."""
        token = tokenizer_config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        ids = [] if content is None else [backend.token_to_id(content)]
        for config in (optional("generation_config.json"), optional("config.json")):
            listed = config.get(f"{name}_token_id")
            ids += listed if isinstance(listed, list) else [listed]
        return [token_id for token_id in ids if token_id is not None]

    tokenizer_config = optional("tokenizer_config.json")
    if "chat_template" not in tokenizer_config and (folder / "chat_template.jinja").is_file():
        tokenizer_config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos = special("bos")
    return Tokenizer(
        backend, bos_token_id=bos[0] if bos else None, eos_token_ids=special("eos"), hf_config=tokenizer_config
    )


def _from_gguf(file: GGUFFile) -> Tokenizer:
    kind = file.get("tokenizer.ggml.model")
    if kind is None:
        raise FileNotFoundError(f"{file.path}: holds no tokenizer")
    pre = file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise NotImplementedError(
            f"{file.path}: tokenizer '{kind}' with pre-tokenizer '{pre}' is not supported "
            f"(only 'gpt2' with {', '.join(repr(name) for name in _PRE_TOKENIZERS)})"
        )
    is_llama3 = _PRE_TOKENIZERS[pre] is _llama3
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file.path}: damaged tokenizer: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_added(file, tokens, _CONTROL))
    backend.add_tokens(_added(file, tokens, _USER_DEFINED))

    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: file.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    for role, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ValueError(f"{file.path}: {role} token id {token_id} is not in the vocabulary of {len(tokens)}")
    config: dict[str, Any] = {
        f"{role}_token": tokens[token_id] for role, token_id in ids.items() if token_id is not None
    }
    if (template := file.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    if (length := file.get("llama.context_length")) is not None:
        config["model_max_length"] = length
    bos = ids["bos"]
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", is_llama3):
        # What transformers adds when it encodes the exported folder; encode() here never does.
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", tokens[bos], "$B"], special_tokens=[(tokens[bos], bos)]
        )
    ends = [ids["eos"], *(file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    return Tokenizer(
        backend, bos_token_id=bos, eos_token_ids=[end for end in ends if end is not None], hf_config=config
    )


def _added(file: GGUFFile, tokens: list[str], token_type: int) -> list[AddedToken]:
    """The vocabulary's tokens of one type, to be matched in the text before it is split into words."""
    types = file.get("tokenizer.ggml.token_type", [])
    special = token_type == _CONTROL
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind == token_type
    ]


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Single digits, then GPT-2's words."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _llama3() -> pre_tokenizers.PreTokenizer:
    """LLaMA 3's words, then bytes."""
    split = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre -> builder; llama.cpp knows LLaMA 3's under three names.
_PRE_TOKENIZERS = {
    "smollm": _smollm,
    "gpt-2": _gpt2,
    "llama-bpe": _llama3,
    "llama-v3": _llama3,
    "llama3": _llama3,
}
