"""What the loops are for: pretraining learns a text, SFT teaches to answer and stop, GRPO raises a reward."""
import json
import math
import re

import numpy as np
import pytest
import torch

from r1zero.model.checkpoint import load_checkpoint, load_model
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import Request
from r1zero.model.optimizer import OptimConfig, learning_rate, make_optimizer, optimizer_step
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.data import DocumentBatches, TokenStream
from r1zero.train.grpo import grpo
from r1zero.train.pretrain import bits_per_byte, first_share, pretrain, split_batch, text_batches, train_step
from r1zero.train.run import read_metrics
from r1zero.train.sft import SFTConfig, sft

from ..rl.cases import Bandit, Capture, assert_same_gradient, naive_logp, tiny
from .loop_cases import SENTENCE, grpo_config, pretrain_config, save_base, text_file

QUESTIONS = ["What is the capital of France?", "What is the capital of Italy?", "Who wrote Hamlet?",
             "What is the colour of snow?", "Who painted the Mona Lisa?"]
ANSWERS = [" Paris.", " Rome.", " Shakespeare.", " White.", " Leonardo."]


# ---- pretraining ----

def test_pretraining_learns_a_text_and_beats_the_unigram_baseline(tmp_path, capsys):
    data = text_file(tmp_path, SENTENCE * 60)
    c = pretrain_config(tmp_path / "run", data, steps=80, seq_len=32, batch_tokens=256, micro_tokens=256)
    pretrain(c)
    rows = read_metrics(c.run)
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert rows[0]["loss"] > 5 > 1.0 > rows[-1]["loss"]  # at first about log 258 = 5.6 nats, or more
    found = re.search(r"([\d.]+) bits per byte; a unigram model reaches ([\d.]+)", capsys.readouterr().out)
    model_bits, unigram_bits = map(float, found.groups())
    assert 3.0 < unigram_bits < 4.5 and model_bits < 0.5 * unigram_bits
    counts = np.bincount(np.frombuffer(SENTENCE.encode(), np.uint8))
    p = counts[counts > 0] / counts.sum()
    assert unigram_bits == pytest.approx(-(p * np.log2(p)).sum(), abs=0.2)  # the entropy of the letters


def documents(n_prompt: int = 0) -> DocumentBatches:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n) for n in (9, 4, 17, 6, 12)]
    return DocumentBatches(texts, 200, 64, 0, [n_prompt] * 5 if n_prompt else None)


@pytest.mark.parametrize("n_prompt", [0, 3])
def test_gradient_does_not_depend_on_micro_tokens_and_equals_the_oracle(n_prompt):
    model = tiny(dtype=torch.float64)
    batch = documents(n_prompt).batch(0)
    ends = batch.inputs.cu_seqlens.tolist()
    total, count = 0.0, 0
    for start, end in zip(ends[:-1], ends[1:], strict=True):  # each document alone, through all logits
        tokens = np.append(batch.inputs.tokens[start:end].numpy(), batch.targets[end - 1])
        logp, _ = naive_logp(model, tokens, max(n_prompt, 1), 1.0)
        total, count = total - logp.sum(), count + len(logp)
    expected = dict(zip([name for name, _ in model.named_parameters()],
                        torch.autograd.grad(total / count, list(model.parameters())), strict=True))
    for micro_tokens in [1, 20, 10**6]:
        optimizer = Capture(model)
        loss, _ = train_step(model, optimizer, batch, 1.0, OptimConfig(clip_grad=1e9), micro_tokens)
        assert loss == pytest.approx(float(total.detach()) / count, rel=1e-6)
        assert_same_gradient(optimizer.grads[0], expected, 1e-6)


@pytest.mark.parametrize("micro_tokens", [1, 7, 20, 30, 1000])
def test_split_batches_hold_everything_once(micro_tokens):
    batch = documents(2).batch(0)
    parts = list(split_batch(batch, micro_tokens))
    for name in ("tokens", "positions"):
        found = torch.cat([getattr(part.inputs, name) for part in parts])
        assert torch.equal(found, getattr(batch.inputs, name))
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.weight for part in parts]), batch.weight)
    assert torch.equal(torch.cat([p.inputs.cu_seqlens.diff() for p in parts]), batch.inputs.cu_seqlens.diff())
    for part in parts:
        lengths = part.inputs.cu_seqlens.diff()
        assert part.inputs.max_seqlen == lengths.max() and part.inputs.cu_seqlens.dtype == torch.int32
        assert part.inputs.cu_seqlens[0] == 0 and part.inputs.cu_seqlens[-1] == len(part.inputs.tokens)
        assert len(part.targets) <= micro_tokens or len(lengths) == 1


def test_the_tokenizer_is_trained_on_the_first_share_of_the_text(tmp_path):
    texts = ["abcd", "", "efgh", "ijkl"]
    assert "".join(first_share(texts, 0.5)) == "abcdef" and "".join(first_share(texts, 1.0)) == "abcdefghijkl"
    pytest.importorskip("tokenizers")
    data = text_file(tmp_path, "abcabd " * 90 + "xyzxyz " * 10)  # the tail has words of its own
    tokenizer, _, _ = text_batches(pretrain_config(tmp_path / "run", data, tokenizer="bpe", vocab_size=270))
    assert len(tokenizer.encode("abcabd")) < 6 == len(tokenizer.encode("xyzxyz"))


def test_bits_per_byte_of_a_tail_are_those_of_its_tokens_one_by_one():
    model, tail = tiny(), np.frombuffer(SENTENCE.encode(), np.uint8)[:23]
    nats = 0.0
    for start in range(0, 22, 8):  # windows of 8 targets, each seen from its own beginning
        nats -= float(naive_logp(model, tail[start : start + 9].astype(np.int64), 1, 1.0)[0].sum().detach())
    assert bits_per_byte(model, tail, 22, 8) == pytest.approx(nats / np.log(2) / 22, rel=1e-5)


def test_every_step_trains_on_its_own_batch(tmp_path, monkeypatch):
    asked, batch = [], TokenStream.batch
    monkeypatch.setattr(TokenStream, "batch", lambda self, index: asked.append(index) or batch(self, index))
    pretrain(pretrain_config(tmp_path / "run", text_file(tmp_path), steps=5))
    assert asked == [0, 1, 2, 3, 4]


# ---- the optimizer ----

def test_learning_rate_warms_up_and_ends_where_it_should():
    c = OptimConfig(lr=2.0, warmup=4, final_lr=0.1)
    rates = [learning_rate(step, 20, c) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(4 + 7, 19, c) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way
    constant = OptimConfig(lr=2.0, warmup=2, schedule="constant")
    assert [learning_rate(step, 5, constant) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert learning_rate(0, 1, OptimConfig(lr=2.0, warmup=0)) == 2.0
    assert learning_rate(30, 20, c) == pytest.approx(0.2)  # beyond the end it stays


def test_an_optimizer_step_clips_decays_matrices_only_and_refuses_what_is_not_finite():
    model, c = tiny(), OptimConfig(clip_grad=1.0, weight_decay=0.5)
    optimizer = make_optimizer(model, c)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == \
        {name: 0.5 if p.ndim == 2 else 0.0 for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    n = sum(p.numel() for p in model.parameters())
    capture = Capture(model)
    assert optimizer_step(model, capture, 0.1, c) == pytest.approx(3 * math.sqrt(n), rel=1e-4)
    clipped = torch.cat([g.flatten() for g in capture.grads[0].values()])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-4) and capture.param_groups[0]["lr"] == 0.1
    before = model.embed.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.norm.grad[3] = float("nan")
    assert math.isnan(optimizer_step(model, optimizer, 0.1, c)) and torch.equal(model.embed, before)
    assert not optimizer.state  # nor did the moments move


# ---- SFT ----

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


# ---- GRPO ----

def test_grpo_raises_the_reward_and_its_control_does_not(tmp_path):
    base, accuracy = save_base(tmp_path / "base"), {}
    for control in [False, True]:
        c = grpo_config(tmp_path / f"run-{control}", base, control=control, steps=30, prompts_per_step=8,
                        group_size=8, seed=1, save_every=1000, max_new_tokens=2, micro_tokens=2048)
        grpo(c)
        rows = read_metrics(c.run)
        assert len(rows) == 30 and all(math.isfinite(v) for row in rows for v in row.values())
        accuracy[control] = [row["accuracy"] for row in rows]
        assert all(row["logp_gap"] < 1e-3 and row["format"] == 0 for row in rows)
        assert rows[0]["kl_to_reference"] == pytest.approx(0, abs=1e-5)
        assert rows[0]["reward"] == pytest.approx(rows[0]["accuracy"])  # the real ones, in the control too
        assert rows[-1]["kl_to_reference"] > 0.01
    assert accuracy[False][0] == accuracy[True][0] and 0.3 < accuracy[False][0] < 0.7
    assert np.mean(accuracy[False][-5:]) > 0.85 > 0.7 > np.mean(accuracy[True][-5:])


def test_a_grpo_run_leaves_a_model_that_can_be_trained_on(tmp_path):
    base = save_base(tmp_path / "base")
    first = grpo_config(tmp_path / "first", base, steps=2)
    grpo(first)
    grpo(grpo_config(tmp_path / "second", first.run, steps=1))
    found = load_checkpoint(tmp_path / "second")
    assert found.step == 1 and found.state["tokenizer"] == Tokenizer.bytes().to_dict()


class Hopeless(Bandit):
    def grade(self, problem, response):
        return super().grade(problem, "é")  # no answer is ever right


def test_all_groups_dead_changes_nothing_and_says_so(tmp_path):
    base = save_base(tmp_path / "base")
    c = grpo_config(tmp_path / "run", base, task=Hopeless(), steps=1)
    grpo(c)
    [row] = read_metrics(c.run)
    assert row["dead_groups"] == 1 and row["trained_samples"] == row["gradient_norm"] == row["loss"] == 0
    before, after = (load_checkpoint(folder).tensors["model"] for folder in (base, c.run))
    assert all(torch.equal(before[name], after[name]) for name in before)
