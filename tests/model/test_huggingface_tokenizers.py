"""A tokenizer that we write beside a model has the same ids in transformers, whatever the family."""
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from r1zero.model.huggingface import read_config, read_model, write_model  # noqa: E402
from r1zero.model.tokenizer import Tokenizer  # noqa: E402
from r1zero.model.tokens.byte_level_bpe import ByteLevelBPE  # noqa: E402
from r1zero.model.tokens.imported import Settings  # noqa: E402
from r1zero.model.transformer import Transformer  # noqa: E402

from .huggingface_cases import (  # noqa: E402
    CPU,
    TOLERANCE,
    VOCAB,
    each_family,
    logits_of,
    read,
    saved,
    sequences,
    transformers,
)
from .tokens.cases import CL100K, CORPUS, like_qwen2, splits, trained  # noqa: E402

TEXTS = ["the cat's hat: 12 + 34 = 46", "e\u0301 don't  stop\n\n 1234", "<think> naïve café 日本", ""]


def with_bos() -> ByteLevelBPE:
    """A BPE with another split, none of Qwen's tokens, and bos in front of a prompt."""
    source = trained(splits(CL100K), size=270)
    return ByteLevelBPE(source, Settings(VOCAB, (271,), 270, True, pad_id=272, unk_id=271))


def ends_with_a_newline() -> Tokenizer:
    """Bytes, one of which ends a text."""
    return Tokenizer(
        "bytes", r"[\s\S]", [bytes([b]) for b in range(256)], special_tokens={}, eos_ids=[10]
    )


TOKENIZERS = {
    "bytes": Tokenizer.bytes,
    "words": lambda: Tokenizer.from_words(["12", " + ", "<think>"]),
    "ours": lambda: Tokenizer.train(CORPUS, 280),
    "with bos": with_bos,
    "an ordinary token as the end": ends_with_a_newline,
    "as Qwen's": lambda: like_qwen2(VOCAB, 280),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@each_family
def test_transformers_gives_the_ids_of_every_tokenizer_beside_every_family(name, kind, tmp_path):
    model, tokenizer = read(saved(name)), TOKENIZERS[kind]()
    write_model(tmp_path / "out", model, tokenizer)
    theirs = transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    named = [tokenizer.eos_id if tokenizer.special_tokens else None, tokenizer.pad_id, tokenizer.unk_id]
    assert [theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id] == named
    assert len(theirs) == tokenizer.n_ids
    for text in [*TEXTS, *tokenizer.special_tokens, " ".join(tokenizer.special_tokens)]:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_template(text)
    first = [tokenizer.bos_id] if tokenizer.adds_bos else []
    assert theirs("a").input_ids == [*first, *tokenizer.encode("a")]
    if tokenizer.pad_id is not None:
        assert theirs(["a", ""], padding=True).input_ids[1][-1] == tokenizer.pad_id
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "out" / file).read_text())
        assert content["pad_token_id"] == tokenizer.pad_id and content["eos_token_id"] == tokenizer.eos_id


@pytest.mark.parametrize("windows, kind", [((), "llama"), ((1, 2), "smollm3")])
def test_a_qwen2_with_another_tokenizer_is_written_as_another_family(windows, kind, tmp_path):
    window = 8 if windows else None
    config = replace(read_config(saved("qwen2")), window=window, window_layers=windows)
    model = Transformer(config)
    model.load_state_dict(read(saved("qwen2")).state_dict())
    expected = logits_of(model)
    for tokenizer, expected_kind in ((like_qwen2(VOCAB), "qwen2"), (Tokenizer.bytes(), kind)):
        folder = tmp_path / expected_kind
        write_model(folder, model, tokenizer)
        assert json.loads((folder / "config.json").read_text())["model_type"] == expected_kind
        with torch.no_grad():
            theirs = transformers().AutoModelForCausalLM.from_pretrained(folder).eval()
            found = torch.cat([theirs(tokens[None]).logits[0] for tokens in sequences()])
        assert (found - expected).abs().max() < TOLERANCE
        again, _ = read_model(folder, CPU)
        assert (logits_of(again) - expected[:, : again.config.vocab_in_use]).abs().max() < TOLERANCE
