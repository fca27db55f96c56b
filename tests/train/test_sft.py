"""Fine-tuning teaches to answer and to stop, and never trains on a prompt."""
import json
import re

import numpy as np
import pytest
import torch

from r1zero.model.checkpoint import load_model
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import Request
from r1zero.model.optimizer import OptimConfig
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.sft import SFTConfig, sft

from ..rl.cases import naive_logp
from .loop_cases import pretrain_config, save_base, text_file

QUESTIONS = ["What is the capital of France?", "What is the capital of Italy?", "Who wrote Hamlet?",
             "What is the colour of snow?", "Who painted the Mona Lisa?"]
ANSWERS = [" Paris.", " Rome.", " Shakespeare.", " White.", " Leonardo."]


def greedy(folder, prompt: str, n: int = 24) -> tuple[str, str]:
    model, tokenizer, _ = load_model(str(folder), torch.device("cpu"))
    request = Request(tokenizer.encode(prompt), n, temperature=0.0, stop_ids=(tokenizer.eos_id,))
    [found] = Engine(model).generate([request])
    return tokenizer.decode(found.tokens.tolist()), found.finish_reason


def test_a_base_continues_a_question_and_after_sft_it_answers_and_stops(tmp_path):
    rng = np.random.default_rng(0)
    text = " ".join(QUESTIONS[i] for i in rng.integers(0, len(QUESTIONS), 200))
    optim = OptimConfig(lr=1e-2, warmup=10)
    base = pretrain_config(tmp_path / "base", text_file(tmp_path, text), steps=150, seq_len=64,
                           batch_tokens=512, micro_tokens=512, save_every=1000, optim=optim)
    pretrain(base)
    more, reason = greedy(base.run, QUESTIONS[0])
    assert reason == "length" and re.fullmatch(r" (What|Who) [\w ?]+", more), more  # it asks on and on

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": q, "response": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = SFTConfig(run=str(tmp_path / "sft"), base=base.run, data=str(pairs), steps=60, save_every=1000,
                  batch_tokens=256, optim=OptimConfig(lr=1e-2, warmup=5, weight_decay=0.0), device="cpu")
    sft(c)
    assert greedy(c.run, QUESTIONS[0]) == (" Paris.", "stop")
    assert [greedy(c.run, question) for question in QUESTIONS] == [(answer, "stop") for answer in ANSWERS]
    losses = [row["loss"] for row in read_metrics(c.run)]
    assert losses[-1] < 0.1 < losses[0]


def test_sft_with_a_chat_template_needs_a_model_that_has_one_and_counts_answers_that_were_cut_off(
        tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "response": "b", "finish_reason": "length"},
            {"prompt": "a", "response": "b", "finish_reason": "stop"},
            {"prompt": "a", "response": '"finish_reason": "length"'}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = str(save_base(tmp_path / "base"))
    with pytest.raises(ValueError, match="this model has no chat template: .*; leave out --chat"):
        sft(SFTConfig(run=str(tmp_path / "run"), base=base, data=str(pairs), chat=True, device="cpu"))
    assert "pairs.jsonl: 1 of 3 answers were cut off" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sft_never_trains_on_the_prompt(tmp_path):
    """The prompt's words may change under the loss of another response, but their targets have no weight."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "abcdefgh", "response": "xy"}) + "\n")
    base = save_base(tmp_path / "base")
    model, tokenizer, _ = load_model(str(base), torch.device("cpu"))
    sequence = np.array(tokenizer.encode("abcdefghxy") + [tokenizer.eos_id])
    expected = -float(naive_logp(model, sequence, 8, 1.0)[0].mean().detach())  # x, y and the end token
    c = SFTConfig(run=str(tmp_path / "sft"), base=str(base), data=str(pairs), steps=1, device="cpu")
    sft(c)
    assert read_metrics(c.run)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_pair_and_the_same_as_messages_give_the_same_loss_and_each_turn_of_a_conversation_counts(tmp_path):
    base = save_base(tmp_path / "base")
    model, tokenizer, _ = load_model(str(base), torch.device("cpu"))

    def first_loss(name: str, line: dict) -> float:
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps(line) + "\n")
        c = SFTConfig(run=str(tmp_path / name), base=str(base), data=str(data), steps=1, device="cpu")
        sft(c)
        return read_metrics(c.run)[0]["loss"]

    def said(role: str, content: str) -> dict:
        return {"role": role, "content": content}

    talk = [said("user", "abc"), said("assistant", "xy")]
    pair = first_loss("pair", {"prompt": "abc", "response": "xy"})
    assert pair == first_loss("talk", {"messages": talk})

    more = [said("system", "S"), *talk, said("user", "d"), said("assistant", "z")]
    sequence = np.array(tokenizer.encode("S\nabcxy") + [tokenizer.eos_id] + tokenizer.encode("dz")
                        + [tokenizer.eos_id])
    logp_R = naive_logp(model, sequence, 5, 1.0)[0].detach()  # x, y, end, d, z, end
    learned = [0, 1, 2, 4, 5]  # all but d, which the user said
    expected = -float(logp_R[learned].mean())
    assert first_loss("more", {"messages": more}) == pytest.approx(expected, rel=1e-5)


def test_bad_messages_are_refused_before_anything_is_written(tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    c = SFTConfig(run=str(tmp_path / "sft"), base=str(save_base(tmp_path / "base")), data=str(data), steps=1,
                  device="cpu")
    with pytest.raises(ValueError, match="bad.jsonl, line 1: no message is the assistant's"):
        sft(c)
    assert not (tmp_path / "sft").exists()
