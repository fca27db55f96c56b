"""The engine against transformers' `generate` and against a static batch of our own, on the same weights.

    python -m benchmarks.generation                   on a CPU, about four minutes on two cores
    python -m benchmarks.generation --rounds 9 --out generation.json
    python -m benchmarks.generation --device cuda     on a GPU: share of the memory bandwidth, by batch size

On a CPU, fp32, three cases, whose sides take turns, in each round in another order:

    equal    256 requests (16 prompts x 16) of 64 new tokens each, the 0.92 M Qwen2 shape of vs_trl.py
    spread   the same, ended by stop tokens after 8 to 128 tokens (log-uniform: half of them before 32);
             only the tokens up to the stop count. "static" is our engine without the stops: every row runs
             to 128, as the rows of a static batch do
    larger   64 requests of 32 new tokens, 25 M parameters

transformers gets its prompts as a tensor, without padding, and in "spread" a stopping criterion that ends
each row at its length; ours gets lists, and makes requests and completions. Each figure is also a share of
the rate of a 1024 x 1024 matrix product in the same round; the FLOPs counted are those of the model at the
useful tokens.

On a GPU: random weights in the shape of Qwen2.5-1.5B, bf16. Tokens/s of decoding at batch 1, 8, 64 and 512,
as a share of what the bandwidth measured in the same run allows (all weights and all keys and values once a
token), then 64 prompts x 8 samples x 512 tokens, beside transformers' `generate` and vLLM where installed.

Left out: transformers' continuous batching (experimental, and for GPUs), and torch.compile on either side.
"""
import gc
import importlib.util
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import tyro

from r1zero.model.config import ModelConfig, preset
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import Request, group_requests
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.transformer import Transformer, count_parameters, flops_per_token
from r1zero.train.machine import reuse_memory

from .common import finish, show, spread, table, time_of
from .timing import Timer, ceilings
from .vs_trl import qwen2_of, qwen2_shaped

PEERS = ("transformers", "vllm")
SHORTEST, LONGEST = 8, 128  # answers in "spread"


@dataclass(frozen=True)
class Flags:
    """The engine against transformers."""

    rounds: int = 5
    """Timed turns of each side."""
    warmup: int = 1
    """Turns before them."""
    prompts: int = 16
    group_size: int = 16
    """Samples of a prompt."""
    prompt_tokens: int = 8
    new_tokens: int = 64
    """In "equal"; in "larger" half of them, for a quarter of the requests."""
    cases: str = "equal,spread,larger"
    device: str = "cpu"
    """cpu or cuda."""
    out: str | None = None
    """File for the line of JSON."""


def larger() -> ModelConfig:
    """25 M parameters in the shape of Qwen2."""
    return ModelConfig(vocab_size=8192, n_layers=8, d_model=448, n_heads=7, n_kv_heads=7, head_dim=64,
                       d_ff=1344, rope_theta=1e6, qkv_bias=True, tie_embeddings=True, max_seq_len=512)


# ---- the sides ----

def requests_of(prompts: list[list[int]], group_size: int, new_tokens: int) -> list[Request]:
    """At temperature 1, and without an end: the end token lies outside every vocabulary."""
    seeds = sample_seeds(len(prompts) * group_size, 0)
    return group_requests(prompts, group_size, new_tokens, 1.0, seeds, stop_ids=(1 << 31,))


def with_stops(engine: Engine, requests: list[Request],
               lengths: np.ndarray) -> tuple[list[Request], np.ndarray]:
    """Each request with a stop token that ends it near its length (where the token stands for the first
    time), and the lengths that come of it."""
    stopped = []
    for r, c, length in zip(requests, engine.generate(requests), lengths, strict=True):
        tokens = c.tokens.tolist()
        end = next(n for n in range(int(length), 0, -1) if tokens[n - 1] not in tokens[: n - 1])
        stopped.append(Request(r.prompt, r.max_new_tokens, r.seed, stop_ids=(tokens[end - 1],)))
    found = np.array([len(c.tokens) for c in engine.generate(stopped)])
    return stopped, found


def of_transformers(model: Transformer, requests: list[Request], lengths: np.ndarray):
    """A function that generates as many tokens for the same prompts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtLength(StoppingCriteria):
        def __call__(self, ids, scores, **rest):
            return torch.from_numpy(lengths <= ids.shape[1] - len(requests[0].prompt)).to(ids.device)

    peer = qwen2_of(model).eval()
    prompts = torch.tensor([list(r.prompt) for r in requests])
    longest, alike = int(lengths.max()), lengths.min() == lengths.max()
    options = {"attention_mask": torch.ones_like(prompts), "do_sample": True, "temperature": 1.0, "top_k": 0,
               "top_p": 1.0, "max_new_tokens": longest, "pad_token_id": 0}
    if not alike:
        options["stopping_criteria"] = StoppingCriteriaList([AtLength()])

    @torch.inference_mode()
    def generate():
        assert peer.generate(prompts, **options).shape[1] == prompts.shape[1] + longest
    return generate


# ---- CPU ----

def case_of(name: str, f: Flags) -> tuple[Transformer, dict, int, float]:
    """(model, sides, useful tokens, FLOPs for them)."""
    config = larger() if name == "larger" else qwen2_shaped()
    model = Transformer(config).init_weights(0)
    n_prompts = max(1, f.prompts // 4) if name == "larger" else f.prompts
    n, rng = n_prompts * f.group_size, np.random.default_rng(0)
    prompts = rng.integers(config.vocab_size, size=(n_prompts, f.prompt_tokens)).tolist()
    engine = Engine(model, max_rows=max(n, 1))
    new_tokens = f.new_tokens // 2 if name == "larger" else f.new_tokens
    sides = {}
    if name == "spread":
        requests = requests_of(prompts, f.group_size, LONGEST)
        sides["static"] = lambda: engine.generate(requests)
        wanted = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), n)).round()
        ours, lengths = with_stops(engine, requests, wanted)
    else:
        ours, lengths = requests_of(prompts, f.group_size, new_tokens), np.full(n, new_tokens)

    def serve():
        assert [len(c.tokens) for c in engine.generate(ours)] == lengths.tolist()

    sides = {"ours": serve, **sides}
    if importlib.util.find_spec("transformers"):
        sides["transformers"] = of_transformers(model, ours, lengths)
    flops = sum(int(k) * flops_per_token(config, 2 * (f.prompt_tokens + k / 2), False) for k in lengths)
    return model, sides, int(lengths.sum()), flops


def on_cpu(f: Flags) -> dict:
    x, figures = torch.randn(1024, 1024), {}
    for name in f.cases.split(","):
        model, sides, tokens, flops = case_of(name, f)
        turns = {side: [] for side in (*sides, "product")}
        names = list(sides)
        for i in range(f.warmup + f.rounds):
            for side in names[i % len(names) :] + names[: i % len(names)]:
                gc.collect()  # each pays for its own
                turns[side].append(time_of(sides[side]))
            turns["product"].append(min(time_of(lambda: x @ x) for _ in range(8)))
        turns = {side: np.array(seconds[f.warmup:]) for side, seconds in turns.items()}
        rate = 2 * 1024**3 / turns["product"]
        figures[name] = {
            "parameters": count_parameters(model.config), "tokens": tokens,
            "product_gflops": spread(rate / 1e9),
            "tokens_per_s": {side: spread(tokens / turns[side]) for side in sides},
            "share_of_product": {side: spread(flops / turns[side] / rate) for side in sides},
            "ours_over": {side: spread(turns[side] / turns["ours"]) for side in sides if side != "ours"}}
        print(f"{name}: {tokens:,} useful tokens, {count_parameters(model.config):,} parameters, fp32, "
              f"{torch.get_num_threads()} threads, products at {show(figures[name]['product_gflops'])} "
              "GFLOP/s")
        table(["", "useful tokens/s", "share of the product's rate", "ours is faster by"],
              [[side, show(figures[name]["tokens_per_s"][side], digits=0),
                show(figures[name]["share_of_product"][side], " %", 100, 1),
                show(figures[name]["ours_over"][side], " x") if side != "ours" else ""] for side in sides])
    return figures


# ---- GPU ----

def decode_shares(model: Transformer, bandwidth: float) -> list[dict]:
    """Decoding after prompts of 512 tokens: tokens/s and the share of the least time."""
    def step(engine):
        engine.step()
        torch.cuda.synchronize()

    c, rows = model.config, []
    weights = 2 * (count_parameters(c) - (0 if c.tie_embeddings else c.vocab_size * c.d_model))
    for batch in (1, 8, 64, 512):
        engine = Engine(model, max_rows=batch, tokens_per_step=65536)
        engine.submit([Request(list(range(1000 + i, 1512 + i)), 96, i) for i in range(batch)])
        while engine.scheduler.waiting:
            engine.step()
        for _ in range(16):
            engine.step()  # captures the graph
        torch.cuda.synchronize()
        times = []
        for _ in range(48):
            times.append(time_of(partial(step, engine)))
        least = (weights + batch * 570 * engine.token_bytes) / bandwidth
        s = spread(times)
        rows.append({"batch": batch, "step_s": s, "tokens_per_s": batch / s["median"],
                     "share_of_bandwidth": least / s["median"]})
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def of_vllm(peer, prompts: list[list[int]], n_samples: int, new_tokens: int) -> float | str:
    """Tokens/s of vLLM on the same weights, or why not."""
    try:
        from vllm import LLM, SamplingParams
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.5)
            params = SamplingParams(n=n_samples, temperature=1.0, max_tokens=new_tokens, ignore_eos=True,
                                    detokenize=False)
            inputs = [{"prompt_token_ids": p} for p in prompts]
            llm.generate(inputs[:1], params, use_tqdm=False)
            seconds = time_of(lambda: llm.generate(inputs, params, use_tqdm=False))
        return len(prompts) * n_samples * new_tokens / seconds
    except Exception as error:  # a peer that does not run here is named, whatever the reason
        return f"missing: {type(error).__name__}: {str(error)[:150]}"


def on_gpu(f: Flags) -> dict:
    device = torch.device("cuda")
    copy = ceilings(Timer(device))["copy"]
    bandwidth = copy["bytes"] / (spread(copy["ms"])["median"] / 1000)
    config = preset("qwen2.5-1.5b", 151_936, max_seq_len=4096)
    model = Transformer(config, torch.bfloat16).init_weights(0).to(device, torch.bfloat16)
    rows = decode_shares(model, bandwidth)
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s\n")
    table(["batch", "tokens/s", "ms a step", "share of the bandwidth"],
          [[r["batch"], f"{r['tokens_per_s']:.0f}", show(r["step_s"], scale=1000),
            f"{r['share_of_bandwidth']:.0%}"] for r in rows])
    n_prompts, n_samples, new_tokens = 64, 8, 512
    prompts = np.random.default_rng(0).integers(151_000, size=(n_prompts, 64)).tolist()
    engine = Engine(model, max_rows=n_prompts * n_samples, tokens_per_step=65536)
    print(engine.plan())
    requests = requests_of(prompts, n_samples, new_tokens)
    engine.generate(requests[: n_samples])
    rates = {"ours": n_prompts * n_samples * new_tokens / time_of(partial(engine.generate, requests))}
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    if importlib.util.find_spec("transformers"):
        peer = qwen2_of(model.cpu().float()).to(device, torch.bfloat16).eval()
        ids = torch.tensor(prompts, device=device).repeat_interleave(n_samples, 0)
        few = 64  # a share of the tokens: a step of its loop takes long
        with torch.inference_mode():
            started = time.perf_counter()
            peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                          min_new_tokens=few, max_new_tokens=few)
            torch.cuda.synchronize()
            rates["transformers"] = len(ids) * few / (time.perf_counter() - started)
        rates["vllm"] = of_vllm(peer, prompts, n_samples, new_tokens)
    for name, rate in rates.items():
        print(f"{name}: {rate if isinstance(rate, str) else f'{rate:,.0f} tokens/s'}")
    return {"bandwidth": bandwidth, "decode": rows, "tokens_per_s": rates}


def main(f: Flags) -> dict:
    reuse_memory()
    if not importlib.util.find_spec("transformers"):
        print("missing: transformers; so ours alone (pip install -e '.[trl]' brings the peer)")
    figures = on_gpu(f) if f.device == "cuda" else on_cpu(f)
    return finish("generation", {"flags": vars(f), "figures": figures}, f.out, PEERS)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
