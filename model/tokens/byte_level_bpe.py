"""Byte-level BPE of open models as tiktoken: Qwen, Llama 3, DeepSeek, OLMo, SmolLM2, GPT-NeoX.

tiktoken knows ranks and one pattern, a tokenizer.json merges and stages of splitting. Where the two
differ, `Inexpressible` is raised and names the reason. An id is no rank: ids need not follow the
merges, and a byte may have none. tiktoken panics at a byte without a rank, so all bytes have one.
"""

from collections.abc import Iterable

import regex
import tiktoken

from ..tokenizer import SINGLE_BYTES, safe_parts
from .byte_letters import BYTE_OF_LETTER, LETTER_OF_BYTE, from_letters
from .imported import LOST, ImportedTokenizer, Settings
from .nfc import to_nfc
from .split_pattern import Inexpressible, split_pattern


def merge_pairs(model: dict) -> list[tuple[str, str]]:
    """The merges of a BPE; files write them as "a b" or as ["a", "b"]."""
    return [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]


def _merged(token: str, rank_of_pair: dict) -> list[str]:
    """BPE of one token: merge the neighbouring pair of the lowest rank until none is left."""
    parts = list(token)
    while len(parts) > 1:
        pairs = zip(parts[:-1], parts[1:], strict=True)
        ranks = [rank_of_pair.get(pair, len(rank_of_pair)) for pair in pairs]
        lowest = min(ranks)
        if lowest == len(rank_of_pair):
            break
        i = ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def check_merges(model: dict) -> None:
    """Raise `Inexpressible` unless tiktoken merges as the pairs of the file say.

    tiktoken merges any two neighbours whose joint text is a token, the lowest token first. That is
    the same if each token can be reached in one way only, or if all ways to cut it are merges.
    """
    vocab, pairs = model["vocab"], merge_pairs(model)
    rank_of_pair = {pair: rank for rank, pair in enumerate(pairs)}
    for token in dict.fromkeys(left + right for left, right in pairs):
        if _merged(token, rank_of_pair) == [token]:
            continue
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        possible = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        if not model.get("ignore_merges") or not all(cut in rank_of_pair for cut in possible):
            raise Inexpressible(f"its merges do not lead to their token {token!r}")


def ordered_tokens(model: dict, added: Iterable[str]) -> list[str]:
    """The tokens that merging makes, in the order in which it makes them.

    added: contents of the added tokens, which may stand in the vocabulary too.
    Raises `Inexpressible` if a token has no one place in that order.
    """
    # A token that is made by several merges must be made by neighbours in the list.
    ordered = []
    for left, right in merge_pairs(model):
        if not ordered or ordered[-1] != left + right:
            ordered.append(left + right)
    if len(set(ordered)) < len(ordered):
        raise Inexpressible("its merges make one token at two places of their order")

    # With ignore_merges a whole piece is a token even where no merge makes it.
    if model.get("ignore_merges"):
        others = model["vocab"].keys() - set(ordered) - BYTE_OF_LETTER.keys() - set(added)
        if others and ordered:
            raise Inexpressible(f"no merge makes its token {min(others)!r}")
        ordered += sorted(others, key=model["vocab"].__getitem__)
    return ordered


def refuse_other_models(source: dict) -> None:
    """Raise `Inexpressible` for anything but a plain byte-level BPE."""
    model = source["model"]
    given = {
        "byte_fallback (SentencePiece)": model.get("byte_fallback"),
        "a continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "an end_of_word_suffix": model.get("end_of_word_suffix"),
        "dropout": model.get("dropout"),
        "an unknown token": model.get("unk_token"),
        "an added token for single words": any(
            token["single_word"] for token in source.get("added_tokens", [])
        ),
    }
    for name, value in given.items():
        if value:
            raise Inexpressible(f"it has {name}")


def normalisers(normalizer: dict | None) -> list[str]:
    """The types of the normalisers, sequences opened."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer["type"]]
    return [kind for part in normalizer["normalizers"] for kind in normalisers(part)]


class ByteLevelBPE(ImportedTokenizer):
    """Byte-level BPE as one tiktoken `Encoding`.

    Raises `Inexpressible`, which names what tiktoken cannot do.
    """

    def __init__(self, source: dict, settings: Settings):
        # 1. What is done to the text before it is split.
        kinds = set(normalisers(source.get("normalizer")))
        if kinds - {"NFC"}:
            raise Inexpressible(f"its normalizer is {', '.join(sorted(kinds))}")
        self._is_nfc = bool(kinds)
        refuse_other_models(source)
        super().__init__(source, settings)

        # 2. The ranks: all bytes, those without a token too, since tiktoken would panic at them;
        #    then the tokens as merging makes them. An id is no rank.
        vocab = source["model"]["vocab"]
        added = [token.content for token in self.added.tokens]
        ordered = ordered_tokens(source["model"], added)
        self.ranks = SINGLE_BYTES + [from_letters(token) for token in ordered]
        self._id_of_rank = [vocab.get(LETTER_OF_BYTE[b], LOST) for b in range(256)]
        self._id_of_rank += [vocab[token] for token in ordered]

        # 3. The split, and no special tokens: they are looked for before.
        self.pattern = split_pattern(source.get("pre_tokenizer"))
        self.encoding = tiktoken.Encoding(
            "r1zero-imported",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens={},
        )

    def _token_bytes(self, text: str) -> bytes:
        try:
            return from_letters(text)
        except ValueError:
            return text.encode()  # the library decodes it so

    def normalise(self, text: str) -> str:
        return to_nfc(text) if self._is_nfc else text

    def _encode_ordinary(self, text: str) -> list[int]:
        id_of_rank = self._id_of_rank
        ids = []
        for part in safe_parts(text):
            ranks = self.encoding.encode_ordinary(part)
            new = [id_of_rank[rank] for rank in ranks]
            ids += self._encode_around_gaps(part) if LOST in new else new
        return ids

    def _encode_around_gaps(self, text: str) -> list[int]:
        """Ids of a text with bytes that have no token; LOST for each of them.

        Hugging Face's library drops such a byte behind the split and before the merges, so that its
        neighbours in a piece meet. tiktoken splits and merges in one go: here it only merges.
        """
        ids = []
        for piece in regex.findall(self.pattern, text, flags=regex.V1):
            kept = bytes(b for b in piece.encode() if self._id_of_rank[b] != LOST)
            ids += [LOST] * (len(piece.encode()) - len(kept))
            ranks = self.encoding._encode_single_piece(kept) if kept else []
            ids += [self._id_of_rank[rank] for rank in ranks]
        return ids
