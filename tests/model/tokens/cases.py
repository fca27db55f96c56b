"""Small tokenizer.json files of our own making, each with one thing that open models' tokenizers have."""

import json
import os
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from r1zero.model.tokens.byte_level_bpe import ByteLevelBPE
from r1zero.model.tokens.imported import ImportedTokenizer, Settings
from r1zero.model.tokens.json_file import read_tokenizer
from r1zero.model.tokens.split_pattern import GPT2_PATTERN

DATA = Path(os.environ.get("R1ZERO_DATA", Path(__file__).parents[3] / "shared" / "data"))
LICENSED = sorted(DATA.glob("tokenizers/*/tokenizer.json"))  # those of real models, where they are here

CORPUS = [
    "The cat sat on the mat, the cat's hat: 1234 times.\n\n  Then it   sat\ton\r\nthe naïve café 日本中文!",
    "x  12   345 =  6    中文  字 \u0378\u0378 \x00\x00 y  12   345 =  6    中文  字 \u0378\u0378 \x00\x00 z",
    "def f(x):\n    return x**2  # 12, 345 and 6789; it's the end. I'M the one, the other, the cat",
] * 4
HOSTILE = [
    "",
    " ",
    "  12",
    "    中文",
    "a     b",
    "a\x04b",
    "\x00\x00a",
    "e\u0301 \u1e9b\u0323",
    "\U0001f600\u200d\u0378a",
    "x  \n\n  y ",
    "日本12カタ3",
    "1234567",
    "!!\n\n",
    "it'S 'ſ",
    "\ud800a",
    "a\u2028\u3000 b",
    "½٣²",
    "<|im_end|>",
    "<|im_end|>\u0338",
    "a <think>b</think>",
    "<|im_end|><|im_",
    "the<|im_start|> cat  ",
]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]

# The post-processor that puts <|im_start|>, the first token that `trained` adds, before a text.
BOS = {
    "type": "TemplateProcessing",
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [340], "tokens": ["<|im_start|>"]}},
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
}


def splits(*patterns: str, behavior: str = "isolated", invert: bool = False):
    """The stages of a pre-tokenizer that splits by each pattern in turn."""
    stages = [pre_tokenizers.Split(Regex(pattern), behavior, invert) for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def trained(pre_tokenizer=None, normalizer=None, size: int = 340, **flags) -> dict:
    """The content of a tokenizer.json: a byte-level BPE of the corpus, with three added tokens."""
    library = Tokenizer(models.BPE(**flags))
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(CORPUS, trainer)
    source = json.loads(library.to_str())
    for content, special in (("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)):
        add_token(source, content, special=special)
    return source


def add_token(source: dict, content: str, special: bool = True, **flags) -> int:
    """Add a token with the next id to a tokenizer.json."""
    ids = [*source["model"]["vocab"].values(), *(token["id"] for token in source["added_tokens"])]
    entry = {
        "id": max(ids) + 1,
        "content": content,
        "special": special,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    } | flags
    source["added_tokens"].append(entry)
    return entry["id"]


def like_qwen2(vocab_size: int, size: int = 256) -> ByteLevelBPE:
    """A tokenizer as Qwen's; with size tokens, then bos, then the end."""
    source = trained(splits(QWEN2), normalizers.NFC(), size=size)
    add_token(source, "<|endoftext|>")
    return ByteLevelBPE(source, Settings(vocab_size, (size + 1,), size))


def handmade(*merges: str) -> dict:
    """The content of a tokenizer.json with these merges, as "a b", on top of the 256 bytes."""
    source = trained(size=256)
    vocab = source["model"]["vocab"]
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    source["model"]["merges"] = [merge.split(" ") for merge in merges]
    source["added_tokens"] = []
    add_token(source, "<|im_end|>")
    return source


def write_folder(folder: Path, source: dict, **files) -> Path:
    """A folder with tokenizer.json and others: generation_config={...}. The end token is <|im_end|>."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
    for name, value in ({"tokenizer_config": {"eos_token": "<|im_end|>"}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def imported(folder: Path, source: dict, **files) -> ImportedTokenizer:
    return read_tokenizer(write_folder(folder, source, **files))


def library_of(source: dict) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(source))


def random_texts(n: int, more: list[str] = (), seed: int = 0) -> list[str]:
    """Texts of characters of all kinds, and of pieces on which tokenizers differ."""
    chance = random.Random(seed)
    pieces = [
        *HOSTILE[1:],
        *more,
        "the ",
        "cat",
        "12",
        "3",
        "\n",
        "  ",
        "\t",
        "é",
        "\u0301",
        "日",
        ">",
        "'s",
        "\u0378",
    ]
    pieces.remove("\ud800a")

    def text() -> str:
        kind, length = chance.random(), chance.randint(1, 20)
        if kind < 0.3:
            return "".join(chr(chance.randint(32, 126)) for _ in range(length))
        if kind < 0.8:
            return "".join(chance.choice(pieces) for _ in range(length))
        last = 0x3400 if kind < 0.9 else 0x20000
        return "".join(
            chr(chance.choice([chance.randint(0, 0xD7FF), chance.randint(0xE000, 0xFFFF)]) % last)
            for _ in range(length)
        )

    return [text() for _ in range(n)]


def differing(tokenizer: ImportedTokenizer, library: Tokenizer, texts: list[str]) -> list[str]:
    """Those texts that have other ids than the library gives."""
    found = library.encode_batch(texts, add_special_tokens=False)
    return [
        text
        for text, encoding in zip(texts, found, strict=True)
        if tokenizer.encode_template(text) != encoding.ids
    ]


def sentencepiece(prefix_by_normalizer: bool = True) -> dict:
    """A BPE of characters with byte fallback, as Llama 2 and Mistral have."""
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix_by_normalizer:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=[*names, *(f"<0x{b:02X}>" for b in range(256))]
    )
    library.train_from_iterator(CORPUS, trainer)
    source = json.loads(library.to_str())
    source["added_tokens"] = [token for token in source["added_tokens"] if token["content"] in names]
    return source


SHAPES = {
    "GPT-2": trained,
    "cl100k": lambda: trained(splits(CL100K)),
    "cl100k, NFC": lambda: trained(splits(CL100K), normalizers.NFC()),
    "removed": lambda: trained(splits(CL100K, behavior="removed", invert=True)),
    "digits": lambda: trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "three splits": lambda: trained(splits(*DEEPSEEK)),
    "one piece": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "a split with gaps": lambda: trained(splits(r"\p{L}+")),
    "gpt2 by a split": lambda: trained(splits(GPT2_PATTERN)),
}
