"""CLIP's own byte-pair vocabulary, cut to the words of a data set."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer


def find_clip_vocabulary(package: str) -> Path:
    """The file of merges that an installed package carries.

    Raises:
        ValueError: there is none.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("CLIP's vocabulary is missing: pip install --no-deps open-clip-torch")
    return Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"


def cut_clip_vocabulary(
    vocabulary: Path, captions: Iterable[str], extra_words: Iterable[str], max_length: int, folder: Path
) -> CLIPTokenizer:
    """CLIP's own tokenizer with only the merges that the captions' words use; every other text becomes byte pieces.

    Byte-pair encoding applies the lowest-ranked merge first, so a word whose merges are all kept splits exactly as
    with the full vocabulary.
    """
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    ranked = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    rank = {pair: index for index, pair in enumerate(ranked)}
    words = {word for text in captions for word in text.replace("-", " - ").split()} | set(extra_words)
    used: set[tuple[str, ...]] = set()
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = [
                (rank.get(pair, len(rank)), index) for index, pair in enumerate(zip(pieces, pieces[1:], strict=False))
            ]
            best, index = min(pairs)
            if best == len(rank):
                break
            used.add(ranked[best])
            pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    merges = sorted(used, key=rank.__getitem__)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(code) for code in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    return tokenizer
