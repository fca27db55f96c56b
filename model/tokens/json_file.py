"""Tokenizers of Hugging Face folders, read and written.

    tokenizer = read_tokenizer("Qwen3-0.6B", vocab_size=151936)
    write_tokenizer("out", tokenizer)

What is read is tried on probe texts before it is used (see probes.py). tokenizer.json is
what counts: transformers may replace parts of it by what it knows of a model's class.

Left out: tokenizer.model of SentencePiece (transformers converts it), WordPiece and Unigram; of
tokenizer_config.json what is no token, such as model_max_length. What tiktoken cannot imitate is
done by the library (see library.py).
"""

import base64
import json
import zlib
from dataclasses import asdict
from pathlib import Path

from ..files import atomic_write_json, atomic_write_text
from ..tokenizer import Tokenizer
from .byte_letters import to_letters
from .byte_level_bpe import ByteLevelBPE, check_merges, normalisers
from .folder import Folder, template_bos
from .imported import ImportedTokenizer, Settings
from .library import LibraryTokenizer
from .probes import verify
from .split_pattern import GPT2_PATTERN, Inexpressible, split_pattern

# ---- from a folder, or a checkpoint ----


def make_tokenizer(source: dict, settings: Settings) -> ImportedTokenizer:
    """The tokenizer of a tokenizer.json's content: by tiktoken if that can do the same.

    Raises ValueError, which names what cannot be expressed.
    """
    kind = source["model"].get("type", "BPE")
    if kind != "BPE":
        raise ValueError(f"a {kind} tokenizer; only BPE is read (byte-level, or SentencePiece's)")
    try:
        tokenizer = ByteLevelBPE(source, settings)
        check_merges(source["model"])
    except Inexpressible as reason:
        try:
            return LibraryTokenizer(source, settings)
        except ValueError as error:
            raise ValueError(f"tiktoken cannot do it, since {reason}; {error}") from None
    return tokenizer


def read_tokenizer(folder: str | Path, vocab_size: int | None = None) -> ImportedTokenizer:
    """The tokenizer of a Hugging Face folder, checked on probe texts.

    vocab_size: rows of the model's embedding, of which the tokenizer may leave some without a
    meaning. None: as many as it has ids.
    Raises ValueError for files that are missing, damaged or of different models, for a tokenizer
    that has more ids than the model has rows, and for one that cannot be expressed, saying why.
    """
    try:
        return _checked(Folder(folder), vocab_size)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{folder}: tokenizer.json, or a file beside it, is damaged ({error!r}); download it "
            "again"
        ) from None


def _checked(read: Folder, vocab_size: int | None) -> ImportedTokenizer:
    """The tokenizer that a folder describes, checked on probe texts."""
    try:
        tokenizer = make_tokenizer(read.source, read.settings(vocab_size))
        verify(tokenizer)
    except ValueError as error:
        raise ValueError(f"{read.path}/tokenizer.json: {error}") from None
    return tokenizer


ENGINES = {kind.engine: kind for kind in (ByteLevelBPE, LibraryTokenizer)}


def tokenizer_from_dict(data: dict) -> ImportedTokenizer:
    """The tokenizer that `ImportedTokenizer.to_dict` wrote. Raises ValueError if it is damaged."""
    try:
        source = json.loads(zlib.decompress(base64.b64decode(data["tokenizer_json"])))
        settings = data["settings"]
        settings = Settings(**settings | {"eos_ids": tuple(settings["eos_ids"])})
        make = ENGINES[data["engine"]]
    except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"tokenizer data is damaged ({error!r}); use another checkpoint") from None
    return make(source, settings)


# ---- into a folder ----

# What Qwen2Tokenizer of transformers 5.24 (tokenization_qwen2.py) has of its own.
QWEN2_END = "<|endoftext|>"
QWEN2_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}


def _bos_processor(name: str, bos_id: int) -> dict:
    """The post-processor that puts bos in front of a text."""
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    text, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {name: {"id": name, "ids": [bos_id], "tokens": [name]}},
    }


def _every_cut(ranks: list[bytes]) -> list[str]:
    """All ways to cut each token into two others, by rank: what tiktoken merges."""
    known = set(ranks)
    return [
        f"{to_letters(token[:i])} {to_letters(token[i:])}"
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]


def source_of(tokenizer: Tokenizer) -> dict:
    """The content of a tokenizer.json that gives the ids of `encode_template`.

    A whole piece is a token if it is one (ignore_merges), as in tiktoken.
    """
    if isinstance(tokenizer, ImportedTokenizer):
        return tokenizer.source
    # 1. The split. The library knows GPT-2's by itself, and writes bytes as letters after it.
    is_gpt2 = tokenizer.pattern == GPT2_PATTERN
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    stages = [letters | {"use_regex": is_gpt2}]
    if tokenizer.kind == "words" or (tokenizer.kind == "bpe" and not is_gpt2):
        stages.insert(0, split)

    # 2. The vocabulary, with the added tokens: the library numbers those that are not in it anew.
    #    A word is always a piece of its own, so nothing is merged into it.
    vocab = {token.content: token.id for token in tokenizer.added.tokens}
    vocab |= {to_letters(token): i for i, token in enumerate(tokenizer.ranks)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [asdict(token) | flags for token in tokenizer.added.tokens]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocab,
        "merges": [] if tokenizer.kind == "words" else _every_cut(tokenizer.ranks),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
        "post_processor": None,
        "decoder": letters | {"use_regex": True},
        "model": model,
    }


def is_like_qwen2(tokenizer: Tokenizer) -> bool:
    """Would transformers' Qwen2Tokenizer, which knows a split of its own, give the same ids?

    It takes vocabulary, merges and added tokens from the file, and nothing else. It always adds
    <|endoftext|>.
    """
    source = source_of(tokenizer)
    return (
        isinstance(tokenizer, ByteLevelBPE)
        and tokenizer.pattern == split_pattern(QWEN2_SPLIT)
        and normalisers(source.get("normalizer")) == ["NFC"]
        and not source["model"].get("ignore_merges")
        and QWEN2_END in tokenizer.special_tokens
        and not tokenizer.adds_bos
    )


def write_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as `tokenizers` and transformers load it, with equal ids.

    The end tokens but the first belong into generation_config.json, which is the model's. So does
    an end that is an ordinary token: transformers would add its name as a new token.
    """
    folder = Path(folder)
    names = {t.id: t.content for t in tokenizer.added.tokens}
    source = source_of(tokenizer)

    # 1. A text begins with bos if a prompt of the model does.
    first = tokenizer.bos_id if tokenizer.adds_bos else None
    if template_bos(source.get("post_processor")) != first:
        processor = _bos_processor(names[first], first) if tokenizer.adds_bos else None
        source = source | {"post_processor": processor}
    atomic_write_text(folder / "tokenizer.json", json.dumps(source, ensure_ascii=False))

    # 2. The names. This class takes the file as it is; others would replace parts of it. Beside a
    #    model of the family qwen2 transformers ignores it (see `is_like_qwen2`).
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": names.get(tokenizer.eos_id),
        "pad_token": names.get(tokenizer.pad_id),
        "unk_token": names.get(tokenizer.unk_id),
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_json(folder / "tokenizer_config.json", config)
    if tokenizer.chat_template is not None:
        atomic_write_text(folder / "chat_template.jinja", tokenizer.chat_template)
