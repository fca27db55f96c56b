"""The engine against transformers' `generate` and against a static batch of our own, on the same weights.

    python -m benchmarks.generation                   on a CPU, about two minutes on two cores
    python -m benchmarks.generation --rounds 9 --out generation.json
    python -m benchmarks.generation --device cuda     on a GPU: share of the memory bandwidth, by batch size

On a CPU, in fp32, there are three cases. In each round their sides take turns, in rotating order:

    equal    256 requests (16 prompts x 16) of 64 new tokens each, the 0.92 M Qwen2 shape of qwen2.py
    spread   the same, ended by stop tokens after 8 to 128 tokens (log-uniform: half of them before 32);
             only the tokens up to the stop count. "static" is our engine without the stops: every row runs
             to 128, as the rows of a static batch do
    larger   64 requests of 32 new tokens, 25 M parameters

With `--cases smollm2` there is a fourth, in the shape of a real model; `--onednn` is as in training:

    smollm2  32 requests of 32 new tokens after prompts of 64 tokens, 134.5 M parameters

transformers gets its prompts as a tensor, without padding, and in "spread" a stopping criterion that ends
each row at its length. Ours gets lists, and makes requests and completions. Each rate is also given as a
share of the rate of a 1024 x 1024 matrix product in the same round. The FLOPs counted are those of the model
at the useful tokens.

On a GPU: random weights in the shape of Qwen2.5-1.5B, in bf16. First, tokens/s of decoding at batch 1, 8, 64
and 512, as a share of what the bandwidth measured in the same run allows (all weights and all keys and values
are read once per token). Then 64 prompts x 8 samples x 512 tokens, beside transformers' `generate` and vLLM
where they are installed.

Left out: transformers' continuous batching (experimental, and for GPUs), and torch.compile on either side.
"""
import argparse
import gc
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from r1zero.model.config import ModelConfig, preset
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import Request, group_requests
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.transformer import Transformer, count_parameters, flops_per_token
from r1zero.train.machine import reuse_memory, use_onednn

from .common import finish, show, spread, table, time_of
from .qwen2 import qwen2_of, qwen2_shaped
from .timing import Timer, ceilings

PEERS = ("transformers", "vllm")
SHORTEST, LONGEST = 8, 128  # tokens of an answer in "spread"


@dataclass(frozen=True)
class Flags:
    """What to measure; `parsed` says what each one means."""

    rounds: int = 5
    warmup: int = 1
    prompts: int = 16
    group_size: int = 16
    prompt_tokens: int = 8
    new_tokens: int = 64
    cases: str = "equal,spread,larger"
    device: str = "cpu"
    onednn: bool = False
    out: str | None = None


def parsed(argv: list[str] | None = None) -> Flags:
    """The flags of a command line. Python's own parser: the machine with the GPU may have no other."""
    parser = argparse.ArgumentParser(prog="benchmarks.generation", description="Measure the engine against "
                                     "transformers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def flag(name: str, meaning: str, **options) -> None:
        default = getattr(Flags, name)
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=meaning,
                            **{"type": type(default), **options})

    flag("rounds", "Number of timed turns per side (CPU).")
    flag("warmup", "Number of turns per side before the timed ones (CPU).")
    flag("prompts", "Number of prompts (CPU). The case \"larger\" takes a quarter of them.")
    flag("group_size", "Number of samples per prompt (CPU).")
    flag("prompt_tokens", "Number of tokens per prompt (CPU).")
    flag("new_tokens", "Number of new tokens per sample in \"equal\" (CPU). The case \"larger\" generates "
                       "half of it.")
    flag("cases", "Names of the cases to measure, with commas (CPU): equal, spread, larger, smollm2.")
    flag("device", "Device to measure.", choices=("cpu", "cuda"))
    flag("out", "File for the line of JSON.", type=str)
    parser.add_argument("--onednn", action="store_true", help="Compute both sides' products by oneDNN (CPU).")
    return Flags(**vars(parser.parse_args(argv)))


def larger() -> ModelConfig:
    """25 M parameters in the shape of Qwen2."""
    return ModelConfig(vocab_size=8192, n_layers=8, d_model=448, n_heads=7, n_kv_heads=7, head_dim=64,
                       d_ff=1344, rope_theta=1e6, qkv_bias=True, tie_embeddings=True, max_seq_len=512)


# ---- the cases ----

@dataclass(frozen=True)
class Case:
    """A model, and how much of it is asked for."""

    config: ModelConfig
    n_prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int


def case_named(name: str, flags: Flags) -> Case:
    """The case of a name. Raises ValueError for one that does not exist."""
    group_size, prompt_tokens = flags.group_size, flags.prompt_tokens
    if name in ("equal", "spread"):
        return Case(qwen2_shaped(), flags.prompts, group_size, prompt_tokens, flags.new_tokens)
    few_prompts = max(1, flags.prompts // 4)
    if name == "larger":
        return Case(larger(), few_prompts, group_size, prompt_tokens, flags.new_tokens // 2)
    if name == "smollm2":
        return Case(smollm2_shaped(), few_prompts, group_size // 2, 8 * prompt_tokens, flags.new_tokens // 2)
    raise ValueError(f"--cases has {name!r}, expected equal, spread, larger or smollm2, with commas")


def smollm2_shaped() -> ModelConfig:
    """134.5 M parameters in the shape of SmolLM2-135M, with Qwen2's biases, so that it has the same peer."""
    return preset("smollm2-135m", 49_152, qkv_bias=True, max_seq_len=512)


# ---- the sides ----

def requests_of(prompts: list[list[int]], group_size: int, new_tokens: int) -> list[Request]:
    """Requests at temperature 1 that never end early: the end token lies outside every vocabulary."""
    seeds = sample_seeds(len(prompts) * group_size, 0)
    return group_requests(prompts, group_size, new_tokens, 1.0, seeds, stop_ids=(1 << 31,))


def with_stops(engine: Engine, requests: list[Request],
               lengths: np.ndarray) -> tuple[list[Request], np.ndarray]:
    """The requests with a stop token each, and the lengths that come of it.

    The stop token is the last one within the wanted length that does not occur earlier in the answer.
    """
    stopped = []
    for request, completion, length in zip(requests, engine.generate(requests), lengths, strict=True):
        tokens = completion.tokens.tolist()
        end = next(n for n in range(int(length), 0, -1) if tokens[n - 1] not in tokens[: n - 1])
        stopped.append(Request(request.prompt, request.max_new_tokens, request.seed,
                               stop_ids=(tokens[end - 1],)))
    found = np.array([len(completion.tokens) for completion in engine.generate(stopped)])
    return stopped, found


def transformers_side(model: Transformer, requests: list[Request], lengths: np.ndarray):
    """A function that generates as many tokens for the same prompts by transformers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtLength(StoppingCriteria):
        def __call__(self, ids, scores, **rest):
            return torch.from_numpy(lengths <= ids.shape[1] - len(requests[0].prompt)).to(ids.device)

    peer = qwen2_of(model).eval()
    prompts = torch.tensor([list(request.prompt) for request in requests])
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

def case_of(name: str, flags: Flags) -> tuple[Transformer, dict, int, float]:
    """(model, sides, useful tokens, FLOPs for them)."""
    case = case_named(name, flags)
    config, n_requests = case.config, case.n_prompts * case.group_size
    model = Transformer(config).init_weights(0)
    engine = Engine(model, max_rows=max(n_requests, 1))
    rng = np.random.default_rng(0)
    prompts = rng.integers(config.vocab_size, size=(case.n_prompts, case.prompt_tokens)).tolist()

    sides = {}
    if name == "spread":
        requests = requests_of(prompts, case.group_size, LONGEST)
        sides["static"] = lambda: engine.generate(requests)
        wanted = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), n_requests)).round()
        ours, lengths = with_stops(engine, requests, wanted)
    else:
        ours = requests_of(prompts, case.group_size, case.new_tokens)
        lengths = np.full(n_requests, case.new_tokens)

    def serve():
        assert [len(completion.tokens) for completion in engine.generate(ours)] == lengths.tolist()

    sides = {"ours": serve, **sides}
    if importlib.util.find_spec("transformers"):
        sides["transformers"] = transformers_side(model, ours, lengths)
    # A token sees all that stand before it: on average the prompt and half of the answer.
    flops = sum(int(n) * flops_per_token(config, 2 * (case.prompt_tokens + n / 2), False) for n in lengths)
    return model, sides, int(lengths.sum()), flops


def take_turns(sides: dict, rounds: int, warmup: int) -> dict[str, np.ndarray]:
    """Seconds of each side in each timed round, and of a 1024 x 1024 matrix product ("product")."""
    x = torch.randn(1024, 1024)
    seconds = {side: [] for side in (*sides, "product")}
    names = list(sides)
    for i in range(warmup + rounds):
        first = i % len(names)
        for side in names[first:] + names[:first]:
            gc.collect()  # each side pays for its own garbage
            seconds[side].append(time_of(sides[side]))
        seconds["product"].append(min(time_of(lambda: x @ x) for _ in range(8)))
    return {side: np.array(values[warmup:]) for side, values in seconds.items()}


def on_cpu(flags: Flags) -> dict:
    """Measure and print each case; returns the results by case."""
    results = {}
    for name in flags.cases.split(","):
        model, sides, tokens, flops = case_of(name, flags)
        seconds = take_turns(sides, flags.rounds, flags.warmup)
        rate = 2 * 1024**3 / seconds["product"]
        found = results[name] = {
            "parameters": count_parameters(model.config), "tokens": tokens,
            "product_gflops": spread(rate / 1e9),
            "tokens_per_s": {side: spread(tokens / seconds[side]) for side in sides},
            "share_of_product": {side: spread(flops / seconds[side] / rate) for side in sides},
            "ours_over": {side: spread(seconds[side] / seconds["ours"]) for side in sides if side != "ours"}}
        print(f"{name}: {tokens:,} useful tokens, {count_parameters(model.config):,} parameters, fp32, "
              f"{torch.get_num_threads()} threads, products at {show(found['product_gflops'])} GFLOP/s")
        table(["", "useful tokens/s", "share of the product's rate", "ours is faster by"],
              [[side, show(found["tokens_per_s"][side], digits=0),
                show(found["share_of_product"][side], " %", 100, 1),
                show(found["ours_over"][side], " x") if side != "ours" else ""] for side in sides])
    return results


# ---- GPU ----

def decode_shares(model: Transformer, bandwidth: float) -> list[dict]:
    """Decoding after prompts of 512 tokens, by batch size: tokens/s, and the least time over the time.

    bandwidth: bytes per second. The least time is that for reading all weights and the cache once.
    """
    def step(engine):
        engine.step()
        torch.cuda.synchronize()

    config = model.config
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.d_model  # it is only looked up
    weight_bytes = 2 * (count_parameters(config) - embedding)
    rows = []

    def decoding(batch: int) -> dict:
        engine = Engine(model, max_rows=batch, tokens_per_step=65536)
        engine.submit([Request(list(range(1000 + i, 1512 + i)), 96, i) for i in range(batch)])
        while engine.scheduler.waiting:
            engine.step()
        for _ in range(16):
            engine.step()  # captures the graph
        torch.cuda.synchronize()
        seconds = spread([time_of(partial(step, engine)) for _ in range(48)])
        cache_bytes = batch * 570 * engine.token_bytes
        least = (weight_bytes + cache_bytes) / bandwidth
        return {"batch": batch, "step_s": seconds, "tokens_per_s": batch / seconds["median"],
                "share_of_bandwidth": least / seconds["median"]}

    for batch in (1, 8, 64, 512):
        row = unless_out_of_memory(partial(decoding, batch))
        if isinstance(row, str):
            print(f"batch {batch}: {row}")
        else:
            rows.append(row)
    return rows


def unless_out_of_memory(measure: Callable):
    """What it returns, or in words that the memory did not suffice; either way the memory is free again."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0][:150]}"
    finally:
        free_memory()


def free_memory() -> None:
    """Give the GPU's memory back, so that the next side finds all of it."""
    gc.collect()
    torch.cuda.empty_cache()


def rate_of_transformers(peer, prompts: list[list[int]], n_samples: int, device: torch.device) -> float:
    """Tokens/s of transformers' `generate`, from 64 tokens per sample: its loop is too slow for more."""
    ids = torch.tensor(prompts, device=device).repeat_interleave(n_samples, 0)
    new_tokens = 64
    with torch.inference_mode():
        started = time.perf_counter()
        peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                      min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        torch.cuda.synchronize()
        return len(ids) * new_tokens / (time.perf_counter() - started)


def rate_of_vllm(peer, prompts: list[list[int]], n_samples: int, new_tokens: int) -> float | str:
    """Tokens/s of vLLM on the same weights, or why there is none."""
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


def on_gpu() -> dict:
    """Measure and print decoding by batch size, then generation beside the peers; returns the results."""
    device = torch.device("cuda")
    copy = ceilings(Timer(device))["copy"]
    bandwidth = copy["bytes"] / (spread(copy["ms"])["median"] / 1000)
    config = preset("qwen2.5-1.5b", 151_936, max_seq_len=4096)
    model = Transformer(config, torch.bfloat16).init_weights(0).to(device, torch.bfloat16)
    rows = decode_shares(model, bandwidth)
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s\n")
    table(["batch", "tokens/s", "ms per step", "share of the bandwidth"],
          [[row["batch"], f"{row['tokens_per_s']:.0f}", show(row["step_s"], scale=1000),
            f"{row['share_of_bandwidth']:.0%}"] for row in rows])

    n_prompts, n_samples, new_tokens = 64, 8, 512
    prompts = np.random.default_rng(0).integers(151_000, size=(n_prompts, 64)).tolist()

    def ours() -> float:
        engine = Engine(model, max_rows=n_prompts * n_samples, tokens_per_step=65536)
        print(engine.plan())
        requests = requests_of(prompts, n_samples, new_tokens)
        engine.generate(requests[:n_samples])
        return n_prompts * n_samples * new_tokens / time_of(partial(engine.generate, requests))

    rates = {"ours": unless_out_of_memory(ours)}
    if importlib.util.find_spec("transformers"):
        peer = qwen2_of(model.cpu().float()).to(device, torch.bfloat16).eval()
        rates["transformers"] = unless_out_of_memory(
            partial(rate_of_transformers, peer, prompts, n_samples, device))
        rates["vllm"] = rate_of_vllm(peer, prompts, n_samples, new_tokens)
    for name, rate in rates.items():
        print(f"{name}: {rate if isinstance(rate, str) else f'{rate:,.0f} tokens/s'}")
    return {"bandwidth": bandwidth, "decode": rows, "tokens_per_s": rates}


def main(flags: Flags) -> dict:
    reuse_memory()
    use_onednn(flags.onednn)
    if not importlib.util.find_spec("transformers"):
        print("missing: transformers; so ours alone (pip install -e '.[trl]' brings the peer)")
    results = on_gpu() if flags.device == "cuda" else on_cpu(flags)
    return finish("generation", {"flags": vars(flags), "figures": results}, flags.out, PEERS)


if __name__ == "__main__":
    main(parsed())
