"""Tokenizers of Hugging Face folders, read and written.

    tokenizer = read_tokenizer("Qwen3-0.6B", vocab_size=151936)
    write_tokenizer("out", tokenizer)

A folder says in several files what a tokenizer is: tokenizer.json has the vocabulary, the merges,
the split and the added tokens; tokenizer_config.json names bos and eos and may hold the chat
template, as chat_template.jinja does; generation_config.json, or else config.json, has the ids that
end an answer, often several.

What is read is tried on a set of probe texts before it is used: they must come back, and where the
library `tokenizers` is installed, each must have the ids that it gives. tokenizer.json is what
counts: transformers may replace parts of it by what it knows of a model's class.

Left out: tokenizer.model of SentencePiece (transformers converts it), WordPiece and Unigram.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .imported_tokenizer import (
    LOST,
    ByteLevelBPE,
    ImportedTokenizer,
    Settings,
    check_merges,
)
from .split_pattern import Inexpressible

PROBES = (
    "",
    "Hello world's 123!? It'll  cost $1,234.56\n\n\tThe  END   ",
    "def f(x):\n    if x >= 10:\r\n        return x**2  # naïve\n\n\n",
    "1 + 2 = 3; 12345678901 3/4 x^{10} \\boxed{42} ½ ² 一二三 ٣٤",
    "I'M WE'RE it'S don't 'sure ' s \u2019s \u017f",
    "日本語のテキスト 中文字符123 한국어 ภาษาไทย हिन्दी עברית العربية Ελληνικά Русский",
    "é e\u0301 ü u\u0308 \u1e9b\u0323 Å A\u030a >\u0338 \uac00\u11a8",
    "😀🏽👩\u200d👩\u200d👧 \U0001f1e9\U0001f1ea \ufe0f \u200b \ufeff \u00ad",
    "\x00 \x04\x06 a\x04b \x1b[0m \x7f \x85 \u2028 \u3000 \u00a0",
    "a     b  c   d\t\te \n\n \n x",
    "<think>\n1 < 2\n</think> <answer>3</answer> <|im_start|>user <|eot_id|>",
    "<s> </s> [INST] <0x0A> <｜User｜> <|endoftext|>",
    "https://example.org/a_b-c?d=e&f=%20 foo@bar.com #tag @name C++ C# .NET",
)
MAX_PROBED_TOKENS = 300  # of the added tokens, and of the vocabulary


# ---- the files of a folder ----


def _read_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; download it again")
    return value


def read_source(folder: Path, tokenizer_config: dict) -> dict:
    """The content of tokenizer.json, and added tokens that only tokenizer_config.json names.

    Raises ValueError if there is none, if it is damaged, or if the two contradict each other.
    """
    path = folder / "tokenizer.json"
    source = _read_json(path)
    if not source:
        old = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()]
        has = f"it has {old[0]}, which transformers converts" if old else "it belongs to the model"
        raise ValueError(f"{folder} has no tokenizer.json; {has}: AutoTokenizer...save_pretrained")
    model = source.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError(f"{path} is no tokenizer: it has no model with a vocab; download it again")

    content_of_id = {token["id"]: token["content"] for token in source.get("added_tokens", [])}
    for key, token in tokenizer_config.get("added_tokens_decoder", {}).items():
        known = content_of_id.setdefault(int(key), token["content"])
        if known != token["content"]:
            raise ValueError(
                f"{folder}: id {key} is {known!r} in tokenizer.json, but {token['content']!r} in "
                "tokenizer_config.json; take both files from one model"
            )
    missing = content_of_id.keys() - {token["id"] for token in source.get("added_tokens", [])}
    if missing:
        declared = tokenizer_config["added_tokens_decoder"]
        more = [declared[str(i)] | {"id": i} for i in sorted(missing)]
        source = source | {"added_tokens": source.get("added_tokens", []) + more}
    return source


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


class Folder:
    """What the files beside tokenizer.json say. Raises ValueError for files that are damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        names = _read_json(self.path / "special_tokens_map.json")
        self.tokenizer_config = names | _read_json(self.path / "tokenizer_config.json")
        self.generation = _read_json(self.path / "generation_config.json")
        self.config = _read_json(self.path / "config.json")
        self.source = read_source(self.path, self.tokenizer_config)
        added = {t["content"]: t["id"] for t in self.source.get("added_tokens", [])}
        self._id_of = dict(self.source["model"]["vocab"]) | added

    def _named_id(self, name: str) -> int | None:
        """The id of bos_token or eos_token; None if the folder names none."""
        content = _content(self.tokenizer_config.get(name))
        if content is not None and content not in self._id_of:
            raise ValueError(
                f"{self.path}/tokenizer_config.json: {name} is {content!r}, which tokenizer.json "
                "does not have; take both files from one model"
            )
        return None if content is None else self._id_of[content]

    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the tokenizer's own first, then those of generation.

        config.json counts only where neither says anything: its value may be a class's default.
        """
        ids = _as_list(self._named_id("eos_token"))
        ids += _as_list(self.generation.get("eos_token_id"))
        ids = ids or _as_list(self.config.get("eos_token_id"))
        if not ids:
            raise ValueError(
                f"{self.path} names no end token, so no answer would end; give eos_token_id in "
                "generation_config.json"
            )
        return tuple(dict.fromkeys(ids))

    def bos(self) -> tuple[int | None, bool]:
        """(the id of bos, whether a prompt begins with it)."""
        # 1. A template that is applied to each text. It may end with tokens too; a prompt does not.
        in_template = template_bos(self.source.get("post_processor"))
        stated = self.tokenizer_config.get("add_bos_token")
        adds_bos = in_template is not None if stated is None else stated

        # 2. Its id: from there, by name, or from the model's config.
        if adds_bos and in_template is not None:
            return in_template, True
        if "bos_token" in self.tokenizer_config:
            return self._named_id("bos_token"), adds_bos
        bos_id = self.generation.get("bos_token_id", self.config.get("bos_token_id"))
        return (bos_id if bos_id in self._id_of.values() else None), adds_bos

    def chat_template(self) -> str | None:
        """From its own file, or from tokenizer_config.json; of several, the one named default."""
        path = self.path / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            by_name = {entry["name"]: entry["template"] for entry in template}
            template = by_name.get("default")
        return template

    def settings(self, vocab_size: int | None) -> Settings:
        """All of it. vocab_size: rows of the model; None is as many as the tokenizer has ids."""
        bos_id, adds_bos = self.bos()
        n_ids = 1 + max(self._id_of.values())
        size = n_ids if vocab_size is None else vocab_size
        return Settings(size, self.eos_ids(), bos_id, adds_bos, self.chat_template())


def template_bos(post_processor: dict | None) -> int | None:
    """The id that a post-processor puts in front of a text; None if it puts none."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        found = [template_bos(part) for part in post_processor["processors"]]
        return next((i for i in found if i is not None), None)
    if post_processor["type"] != "TemplateProcessing":
        return None
    first = post_processor["single"][0].get("SpecialToken")
    return post_processor["special_tokens"][first["id"]]["ids"][0] if first else None


# ---- from a folder, or a checkpoint ----


def make_tokenizer(source: dict, settings: Settings) -> ImportedTokenizer:
    """The tokenizer of a tokenizer.json's content, of the kind that can express it.

    Raises ValueError, which names what cannot be expressed.
    """
    kind = source["model"].get("type", "BPE")
    if kind != "BPE":
        raise ValueError(f"a {kind} tokenizer; only BPE is read (byte-level, or SentencePiece's)")
    return ByteLevelBPE(source, settings)


def read_tokenizer(folder: str | Path, vocab_size: int | None = None) -> ImportedTokenizer:
    """The tokenizer of a Hugging Face folder, checked on probe texts.

    vocab_size: rows of the model's embedding, of which the tokenizer may leave some without a
    meaning. None: as many as it has ids.
    Raises ValueError for files that are missing, damaged or of different models, for a tokenizer
    that has more ids than the model has rows, and for one that cannot be expressed, saying why.
    """
    read = Folder(folder)
    try:
        tokenizer = make_tokenizer(read.source, read.settings(vocab_size))
        if isinstance(tokenizer, ByteLevelBPE):
            check_merges(read.source["model"])
    except Inexpressible as error:
        raise ValueError(f"{folder}/tokenizer.json cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}/tokenizer.json is damaged ({error!r}); download it again"
        ) from None
    verify(tokenizer, str(folder))
    return tokenizer


def tokenizer_from_dict(data: dict) -> ImportedTokenizer:
    """The tokenizer that `ImportedTokenizer.to_dict` wrote. Raises ValueError if it is damaged."""
    try:
        source = json.loads(zlib.decompress(base64.b64decode(data["tokenizer_json"])))
        settings = data["settings"]
        settings = Settings(**settings | {"eos_ids": tuple(settings["eos_ids"])})
        return make_tokenizer(source, settings)
    except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"tokenizer data is damaged ({error!r}); use another checkpoint") from None


# ---- the check ----


def _spread(items: Iterable, most: int) -> list:
    """At most so many of some items, evenly spread."""
    items = list(items)
    return items[:: -(-len(items) // most) or 1]


def probe_texts(tokenizer: ImportedTokenizer) -> Iterator[str]:
    """Texts on which a wrong tokenizer shows: all kinds of characters, tokens and added tokens."""
    yield from PROBES
    for first in range(0x20, 0x30000, 0x100):
        letters = [chr(first + i) for i in (0, 7, 33, 64, 65, 150) if not 0xD7 < first >> 8 < 0xE0]
        yield " ".join(letters) + "".join(letters)
    for token in _spread(tokenizer.added.tokens, MAX_PROBED_TOKENS):
        yield f"a {token.content}b  {token.content} {token.content}\n"
    ordinary = _spread(sorted(tokenizer.known_ids), MAX_PROBED_TOKENS)
    for left, right in zip(ordinary, reversed(ordinary), strict=True):
        tokens = tokenizer.bytes_of_id[left] + tokenizer.bytes_of_id[right]
        yield tokens.decode("utf-8", errors="replace")


def verify(tokenizer: ImportedTokenizer, name: str) -> None:
    """Raise ValueError for the first probe text that does not come back or has other ids.

    The ids are compared with those of the library `tokenizers`, where it is installed.
    """
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        library = None
    else:
        library = Library.from_str(json.dumps(tokenizer.source))
        library.no_truncation()
        library.no_padding()

    for text in probe_texts(tokenizer):
        ids = tokenizer.ids_with_gaps(tokenizer.blank, text)
        expected = tokenizer.normalise(text)
        if LOST not in ids and tokenizer.decode(ids, keep_special=True) != expected:
            raise ValueError(
                f"{name}: the text {text[:60]!r} does not come back from its tokens; this "
                "tokenizer loses text"
            )
        if library is None:
            continue
        ids = [i for i in tokenizer.ids_with_gaps(tokenizer.added, text) if i != LOST]
        if ids != library.encode(text, add_special_tokens=False).ids:
            raise ValueError(
                f"{name}: the text {text[:60]!r} has the ids {ids[:12]}, but the library "
                "`tokenizers` gives others; this tokenizer cannot be expressed"
            )
