"""Named sources of text behind one function: ``pydoc``, ``file:PATH``, ``wikitext2`` and ``c4``.

Every source has two parts without overlap: ``calibration``, which training may see, and ``heldout``, which it may not.
"""

import itertools
import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics as pydoc_topics

SPLITS = ("calibration", "heldout", "all")
HELDOUT_EVERY = 4  # one topic in four of pydoc, and the last quarter of a single file, are held out
SHARED_PHRASE = 60  # characters; paragraphs up to this long ("For example:") may occur in both parts
PROBE_SECONDS = 4.0
C4_DOCUMENTS = 5000  # about 2.5 million tokens, more than any calibration here uses

# name -> dataset, arguments of load_dataset for each part
HUB_SOURCES: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    "wikitext2": (
        "Salesforce/wikitext",
        {
            "calibration": {"name": "wikitext-2-raw-v1", "split": "train"},
            "heldout": {"name": "wikitext-2-raw-v1", "split": "test"},
        },
    ),
    "c4": (
        "allenai/c4",
        {
            "calibration": {"data_files": "en/c4-train.00000-of-01024.json.gz", "split": f"train[:{C4_DOCUMENTS}]"},
            "heldout": {"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": f"train[:{C4_DOCUMENTS}]"},
        },
    ),
}


def load_text(source: str, split: str) -> str:
    """Loads one part of a named text source.

    Args:
      source: ``pydoc`` (the language reference inside every Python install), ``file:PATH`` (UTF-8; its last quarter is
        held out), ``file:CALIBRATION,HELDOUT``, or ``wikitext2`` or ``c4`` (through Hugging Face ``datasets``).
      split: ``calibration``, ``heldout``, or ``all`` for both.

    Returns:
      The text, paragraphs and documents separated by blank lines.

    Raises:
      ValueError: unknown source or split, or the text is empty.
      FileNotFoundError: a file of ``file:`` does not exist.
      ConnectionError: a hub source is neither cached nor reachable.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    parts = ("calibration", "heldout") if split == "all" else (split,)
    if source == "pydoc":
        text = "\n\n".join(_pydoc_text(part) for part in parts)
    elif source.startswith("file:"):
        text = _file_text(source.removeprefix("file:"), split)
    elif source in HUB_SOURCES:
        text = "\n\n".join(_hub_text(source, part) for part in parts)
    else:
        raise ValueError(f"unknown text source '{source}': one of pydoc, file:PATH, {', '.join(HUB_SOURCES)}")
    if not text.strip():
        raise ValueError(f"the {split} text of '{source}' is empty")
    return text


def heldout_start(length: int) -> int:
    """Where the held-out part begins in a source that is split by position."""
    return length - length // HELDOUT_EVERY


def _pydoc_text(part: str) -> str:
    """One part of the language reference; whole topics, less the paragraphs that the other part repeats.

    Some topics quote others at length, so that a split by topic alone would let calibration read held-out text.
    """
    names = sorted(pydoc_topics)
    heldout = [pydoc_topics[name] for name in names[::HELDOUT_EVERY]]
    if part == "heldout":
        return "\n\n".join(_unseen_paragraphs(heldout, set()))
    calibration = [pydoc_topics[name] for i, name in enumerate(names) if i % HELDOUT_EVERY]
    return "\n\n".join(_unseen_paragraphs(calibration, {_words(p) for p in _paragraphs(heldout)}))


def _paragraphs(texts: Iterable[str]) -> Iterable[str]:
    """The paragraphs of several texts, in order; indentation is kept."""
    return itertools.chain.from_iterable((p.strip("\n") for p in text.split("\n\n") if p.strip()) for text in texts)


def _words(paragraph: str) -> str:
    """A paragraph without its line breaks and indentation, by which copies are recognized."""
    return " ".join(paragraph.split())


def _unseen_paragraphs(texts: Iterable[str], seen: set[str]) -> Iterable[str]:
    """Drops the paragraphs among ``seen``, and every later copy of a paragraph."""
    for paragraph in _paragraphs(texts):
        words = _words(paragraph)
        if len(words) > SHARED_PHRASE:
            if words in seen:
                continue
            seen.add(words)
        yield paragraph


def _file_text(argument: str, split: str) -> str:
    """Text of ``PATH`` split by position, or of one of ``CALIBRATION,HELDOUT``."""
    calibration_path, comma, heldout_path = argument.rpartition(",")
    if comma and not Path(argument).is_file():
        paths = {"calibration": [calibration_path], "heldout": [heldout_path], "all": [calibration_path, heldout_path]}
        return "\n\n".join(_read(path) for path in paths[split])
    text = _read(argument)
    if split == "all":
        return text
    target = heldout_start(len(text))
    cut = text.rfind("\n", 0, target) + 1 or target  # between lines, where there are any
    return text[:cut] if split == "calibration" else text[cut:]


def _read(path: str) -> str:
    """A UTF-8 file, with errors that name it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no text file '{path}'")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file '{path}' is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None


def _hub_text(source: str, part: str) -> str:
    """Rows of a Hugging Face dataset, from the local cache or the hub, joined by blank lines."""
    if not _hub_answers():
        # Without these the library retries for minutes; with them it reads its cache or fails at once.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets

    name, arguments = HUB_SOURCES[source]
    try:
        rows = datasets.load_dataset(name, **arguments[part])
    except Exception as error:
        raise ConnectionError(
            f"cannot load '{source}' ({name}) from the Hugging Face hub ({type(error).__name__}): "
            "offline, use file:PATH or pydoc as the text source"
        ) from error
    return "\n\n".join(rows["text"])


def _hub_answers() -> bool:
    """Whether the hub can be reached, found out in seconds; proxies are honoured."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False
