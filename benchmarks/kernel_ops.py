"""What benchmarks/kernels.py times: of each op its shapes, its peers, its least FLOPs and bytes.

A peer that cannot be had is its reason, a string. Peers take our inputs and give our outputs; where they want
another layout, they look at the same memory through a view, so that no side pays for a copy.

Shapes: B sequences, S their length, T = B S tokens, H query heads, G kv heads, D head_dim, M d_model, F d_ff,
V vocabulary, L share of the tokens that teach something, in percent, E experts (of attention: the width of a
value), K experts per token.
"""
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from r1zero.kernels.attention import attention
from r1zero.kernels.grpo import policy_loss
from r1zero.kernels.linear_logprob import linear_logprob
from r1zero.kernels.mlp import swiglu
from r1zero.kernels.moe import group_by_expert, moe_mlp
from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope, rope_table

SHAPE = ("B", "S", "H", "G", "D", "T", "M", "F", "V", "L", "E", "K")
MODES = ("forward", "backward", "full")
LARGEST_SCORES = 2 << 30  # bytes in 16 bit; the plain formula holds a handful of such tensors
EPS = 1e-6
Peers = dict[str, Callable | str]


@dataclass(frozen=True)
class Case:
    """An op at one shape. `shape` has the letters of SHAPE that count for the op."""

    op: str
    shape: dict[str, int]
    compiled: bool = True  # compare with what torch.compile makes, too: up to 20 seconds for one shape

    @property
    def label(self) -> str:
        return ", ".join(f"{letter} {size}" for letter, size in self.shape.items())


def library(module: str, name: str, package: str):
    """A function of an optional package, or the reason why not."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"missing: {package} ({type(error).__name__})"


def with_compiled(peers: Peers, case: Case, device: torch.device) -> Peers:
    """The same formula, compiled."""
    if device.type != "cuda":
        peers["torch.compile"] = "left out: measured on a GPU only"
    elif not case.compiled or isinstance(peers["eager"], str):
        peers["torch.compile"] = "left out: see a neighbouring shape"
    else:
        peers["torch.compile"] = torch.compile(peers["eager"], dynamic=False, fullgraph=True)
    return peers


# ---- attention ----

def attention_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    s = case.shape
    T = s["B"] * s["S"]
    return [new(T, s["H"], s["D"]), new(T, s["G"], s["D"]), new(T, s["G"], s["E"])]


def ours_attention(case: Case, device: torch.device, impl: str | None) -> Callable:
    B, S = case.shape["B"], case.shape["S"]
    cu_seqlens = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device)
    return lambda q, k, v: attention(q, k, v, cu_seqlens, S, impl=impl)


def attention_peers(case: Case, device: torch.device) -> Peers:
    B, S, H, G, D = (case.shape[letter] for letter in "BSHGD")

    def by_heads(function):  # [T, heads, D] -> [B, heads, S, D], and back
        def peer(*inputs):
            q, k, v = (x.unflatten(0, (B, S)).transpose(1, 2) for x in inputs)
            return function(q, k, v).transpose(1, 2).reshape(B * S, H, -1)
        return peer

    def formula(q, k, v):
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(later, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def sdpa(backend):
        def function(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        return by_heads(function)

    scores = 2 * B * H * S * S
    peers = {"eager": by_heads(formula) if scores <= LARGEST_SCORES else
             f"left out: the scores alone are {scores / 2**30:.0f} GiB"}
    with_compiled(peers, case, device)
    if device.type != "cuda":
        return peers | {"SDPA math": sdpa(SDPBackend.MATH)}
    peers |= {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
              "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
              "flex_attention": "left out: see a neighbouring shape"}
    if case.compiled:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device=device)
        flex = torch.compile(flex_attention, dynamic=False)
        peers["flex_attention"] = by_heads(lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=H != G))
    peers["flash-attn"] = library("flash_attn", "flash_attn_func", "flash-attn")
    if not isinstance(peers["flash-attn"], str):
        flash = peers["flash-attn"]
        peers["flash-attn"] = lambda *inputs: flash(
            *(x.unflatten(0, (B, S)) for x in inputs), causal=True).flatten(0, 1)
    return peers


def attention_cost(case: Case, mode: str) -> tuple[float, float]:
    """Forward reads q, k, v, writes o and the row sums; backward reads these and do, writes dq, dk, dv.

    Of a pair of tokens q k^T takes D multiply-adds and p v takes E; backward three times D and twice E.
    """
    B, S, H, G, D, E = (case.shape[letter] for letter in "BSHGDE")
    pairs, row_sums = B * H * S**2 / 2, 4 * B * S * H
    if mode == "forward":
        return 2 * pairs * (D + E), 2 * B * S * (H + G) * (D + E) + row_sums
    return 2 * pairs * (3 * D + 2 * E), 4 * B * S * (H + G) * (D + E) + row_sums


# ---- RMSNorm ----

def rmsnorm_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    T, M = case.shape["T"], case.shape["M"]
    return [new(T, M), new(M)] + [new(T, M)] * (case.op == "rmsnorm_residual")


def ours_rmsnorm(case: Case, device: torch.device, impl: str | None) -> Callable:
    return lambda x, w, residual=None: rmsnorm(x, w, EPS, residual, impl=impl)


def rmsnorm_peers(case: Case, device: torch.device) -> Peers:
    def with_sum(norm):
        def peer(x, w, residual=None):
            if residual is None:
                return norm(x, w)
            x = x + residual
            return norm(x, w), x
        return peer

    def formula(x, w):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * w.float()).to(x.dtype)

    peers = with_compiled({"eager": with_sum(formula)}, case, device)
    peers["F.rms_norm"] = with_sum(lambda x, w: F.rms_norm(x, w.shape, w, EPS))
    peers["Liger"] = library("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", "liger-kernel")
    if not isinstance(peers["Liger"], str):
        liger = peers["Liger"]
        peers["Liger"] = with_sum(lambda x, w: liger.apply(x, w, EPS, 0.0, "llama", False))
    return peers


def rmsnorm_cost(case: Case, mode: str) -> tuple[float, float]:
    rows = case.shape["T"] * case.shape["M"]
    if case.op == "rmsnorm_residual":  # the sum is written and read as well, and its gradient
        return 0, 8 * rows
    return 0, (4 if mode == "forward" else 6) * rows


# ---- RoPE ----

def rope_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    return [new(case.shape["T"], case.shape["H"], case.shape["D"])]


def table_of(case: Case, device: torch.device):
    return rope_table(torch.arange(case.shape["T"], device=device) % 4096, case.shape["D"], 10000.0)


def ours_rope(case: Case, device: torch.device, impl: str | None) -> Callable:
    cos, sin = table_of(case, device)
    return lambda x: rope(x, cos, sin, impl=impl)


def rope_peers(case: Case, device: torch.device) -> Peers:
    cos, sin = (x[:, None] for x in table_of(case, device))

    def formula(x):
        first, second = x.float().chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return with_compiled({"eager": formula}, case, device)


def rope_cost(case: Case, mode: str) -> tuple[float, float]:
    T, H, D = (case.shape[letter] for letter in "THD")
    return 0, 4 * T * H * D + 4 * T * D  # and the two tables, in fp32


# ---- SwiGLU ----

def swiglu_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    return [new(case.shape["T"], 2 * case.shape["F"])]


def ours_swiglu(case: Case, device: torch.device, impl: str | None) -> Callable:
    return lambda gate_up: swiglu(gate_up, impl=impl)


def swiglu_peers(case: Case, device: torch.device) -> Peers:
    def formula(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    peers = with_compiled({"eager": formula}, case, device)
    peers["Liger"] = library("liger_kernel.ops.swiglu", "LigerSiLUMulFunction", "liger-kernel")
    if not isinstance(peers["Liger"], str):
        liger = peers["Liger"]
        peers["Liger"] = lambda gate_up: liger.apply(*gate_up.chunk(2, -1))
    return peers


def swiglu_cost(case: Case, mode: str) -> tuple[float, float]:
    return 0, (6 if mode == "forward" else 10) * case.shape["T"] * case.shape["F"]


# ---- log-prob of next tokens: the sum over the live ones ----

def logprob_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    T, M, V = (case.shape[letter] for letter in "TMV")
    return [new(T, M), new(V, M)]


def live_targets(case: Case, device: torch.device):
    """(rows that predict something, their targets); rows is None if all do."""
    T, V, n = case.shape["T"], case.shape["V"], case.shape["T"] * case.shape["L"] // 100
    rng = torch.Generator().manual_seed(0)
    rows = None if n == T else torch.randperm(T, generator=rng)[:n].sort().values.to(device)
    return rows, torch.randint(V, (n,), generator=rng).to(device)


def ours_logprob(case: Case, device: torch.device, impl: str | None) -> Callable:
    rows, targets = live_targets(case, device)
    scale = case.shape["M"] ** 0.5  # logits of order 1
    return lambda h, w: linear_logprob(h, w, targets, scale, rows, impl=impl)[0].sum(0, keepdim=True)


def logprob_peers(case: Case, device: torch.device) -> Peers:
    rows, targets = live_targets(case, device)
    scale, n = case.shape["M"] ** 0.5, len(targets)

    def live(h):
        return h / scale if rows is None else h[rows] / scale

    def loss(h, w, y):
        return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")

    def materialised(h, w):
        return -loss(live(h), w, targets)[None]

    def chunked(h, w, size=1024):
        parts = zip(live(h).split(size), targets.split(size), strict=True)
        return -sum(checkpoint(loss, x, w, y, use_reentrant=False) for x, y in parts)[None]

    logits = 6 * n * case.shape["V"]  # in 16 bit and in fp32
    peers = {"eager": materialised if logits <= 4 * LARGEST_SCORES * 4 else
             f"left out: the logits alone are {logits / 2**30:.0f} GiB"}
    with_compiled(peers, case, device)
    peers["chunks"] = chunked
    peers["Liger"] = library("liger_kernel.ops.fused_linear_cross_entropy",
                             "LigerFusedLinearCrossEntropyFunction", "liger-kernel")
    if not isinstance(peers["Liger"], str):
        liger = peers["Liger"]
        peers["Liger"] = lambda h, w: -liger.apply(live(h), w, targets, None, None, -100, 0.0, 0.0,
                                                   "sum")[0].reshape(1)
    peers["Liger GRPO"] = library("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", "liger-kernel")
    if not isinstance(peers["Liger GRPO"], str):
        # on-policy with advantages of 1 the value of CISPO is minus the mean log-prob
        grpo = peers["Liger GRPO"](beta=0.0, loss_type="cispo", epsilon_high=5.0, use_ref_model=False,
                                   compiled=device.type == "cuda")
        B = math.gcd(n, 64)  # it takes one sequence at a time
        ones = torch.ones(B, n // B, device=device)
        peers["Liger GRPO"] = lambda h, w: -n * grpo(
            live(h).view(B, n // B, -1), w, targets.view(B, -1), ones, ones[:, 0])[0].reshape(1)
    return peers


def logprob_cost(case: Case, mode: str) -> tuple[float, float]:
    M, V, n = case.shape["M"], case.shape["V"], case.shape["T"] * case.shape["L"] // 100
    return (2 if mode == "forward" else 6) * n * M * V, 2 * (n * M + V * M) * (1 if mode == "forward" else 2)


# ---- a mixture of experts ----

def moe_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    T, E, K, M, F = (case.shape[letter] for letter in "TEKMF")

    def scaled(x, factor):
        return (x.detach() * factor).requires_grad_()

    gates = scaled(new(T, K).detach().float(), 1 / K)
    return [new(T, M), gates, scaled(new(E, 2 * F, M), M**-0.5), scaled(new(E, M, F), F**-0.5)]


def routes(case: Case, device: torch.device) -> torch.Tensor:
    """[T, K]: every K experts are as likely as any others, so the load differs by chance alone."""
    T, E, K = (case.shape[letter] for letter in "TEK")
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    return scores.topk(K).indices.to(device)


def ours_moe(case: Case, device: torch.device, impl: str | None) -> Callable:
    experts = routes(case, device)
    if impl == "reference":  # that one goes token by token
        impl = "loop"
    return lambda x, gates, gate_up, down: moe_mlp(x, gates, experts, gate_up, down, impl=impl)


def moe_peers(case: Case, device: torch.device) -> Peers:
    experts, K = routes(case, device), case.shape["K"]

    def formula(x, gates, gate_up, down):  # with atomics in the last step
        order, _, ends = group_by_expert(experts, len(gate_up))
        tokens = order // K
        gate, up = F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        weighted = gates.flatten()[order, None] * rows
        return torch.zeros_like(x, dtype=weighted.dtype).index_add(0, tokens, weighted).to(x.dtype)

    peers = with_compiled({"eager": formula}, case, device)
    peers |= {name: ours_moe(case, device, name) for name in ("grouped", "loop")}
    peers["Liger"] = library("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction", "liger-kernel")
    if not isinstance(peers["Liger"], str):
        liger = peers["Liger"]
        peers["Liger"] = lambda x, gates, *weights: liger.apply(x, *weights, experts.int(), gates)
    peers["ScatterMoE"] = library("scattermoe.parallel_experts", "parallel_linear", "scattermoe")
    if not isinstance(peers["ScatterMoE"], str):
        peers["ScatterMoE"] = scattered(experts, peers["ScatterMoE"])
    return peers


def scattered(experts: torch.Tensor, linear: Callable) -> Callable:
    """ScatterMoE's own GLUMLP, as a function of its weights."""
    def peer(x, gates, gate_up, down):
        by_expert, order = experts.flatten().sort()
        groups = by_expert, order, torch.bincount(by_expert, minlength=len(down)).cumsum(-1)
        first, second = gate_up.transpose(1, 2), down.transpose(1, 2)
        gate, up = linear(x, first, experts.shape[1], *groups, grouped_out=True).chunk(2, -1)
        return linear(F.silu(gate) * up, second, 1, *groups, gates=gates.to(x.dtype), grouped_in=True)

    return peer


def moe_cost(case: Case, mode: str) -> tuple[float, float]:
    """Forward reads x, the gates and the weights, writes y; backward reads these and dy, writes gradients."""
    T, E, K, M, F = (case.shape[letter] for letter in "TEKMF")
    flops = 6 * T * K * M * F
    weights, tokens, gates = 2 * 3 * min(E, T * K) * M * F, 2 * T * M, 4 * T * K
    if mode == "forward":
        return flops, weights + 2 * tokens + gates
    return 2 * flops, 2 * weights + 3 * tokens + 2 * gates


# ---- the GRPO loss from log-probs ----

def grpo_inputs(case: Case, new: Callable) -> list[torch.Tensor]:
    return [new(case.shape["T"]).detach().float().requires_grad_()]


def grpo_batch(case: Case, device: torch.device):
    """Sequences of S tokens: (old log-probs, advantages, weights, all of each token; offsets)."""
    T, S = case.shape["T"], case.shape["S"]
    rng = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(T, generator=rng), torch.randn(T // S, generator=rng).repeat_interleave(S)
    rest = old, advantages, torch.full((T,), 1 / T), torch.arange(0, T + 1, S, dtype=torch.int32)
    return [x.to(device) for x in rest]


def ours_grpo(case: Case, device: torch.device, impl: str | None) -> Callable:
    old, advantages, weights, offsets = grpo_batch(case, device)
    return lambda logp: policy_loss(logp, old, None, advantages, weights, offsets, impl=impl)[0][None]


def grpo_peers(case: Case, device: torch.device) -> Peers:
    old, advantages, weights, _ = grpo_batch(case, device)

    def formula(logp):
        ratio = (logp - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -(gain * weights).sum(0, keepdim=True)

    peers = with_compiled({"eager": formula}, case, device)
    return peers | {"Liger": "left out: its GRPO loss starts from hidden states, see linear_logprob"}


def grpo_cost(case: Case, mode: str) -> tuple[float, float]:
    """Forward reads logp, old, advantages and weights and writes the gradient; backward scales that."""
    return 0, (20 if mode == "forward" else 8) * case.shape["T"]


# ---- all of them ----

@dataclass(frozen=True)
class Op:
    inputs: Callable  # (case, new) -> tensors, all of them with a gradient
    ours: Callable  # (case, device, impl) -> function of the inputs
    peers: Callable
    cost: Callable  # (case, "forward" or "backward") -> (FLOPs, bytes)
    x: str  # the axis of its picture
    full_size: tuple[Case, ...]
    smoke: tuple[Case, ...]


def attention_case(B: int, S: int, H: int, G: int, D: int, compiled: bool = False, E: int = 0) -> Case:
    return Case("attention", {"B": B, "S": S, "H": H, "G": G, "D": D, "E": E or D}, compiled)


def logprob_case(T: int, M: int, L: int = 100, V: int = 151_936, compiled: bool = False) -> Case:
    return Case("linear_logprob", {"T": T, "M": M, "V": V, "L": L}, compiled)


def moe_case(T: int, E: int, K: int, M: int, F: int, compiled: bool = False) -> Case:
    return Case("moe", {"T": T, "E": E, "K": K, "M": M, "F": F}, compiled)


TOKENS = 16384
ATTENTION = (
    attention_case(4, 4096, 16, 16, 128, True), attention_case(4, 4096, 32, 32, 64, True),
    attention_case(4, 4096, 16, 4, 128, True), attention_case(4, 4096, 8, 8, 256),
    attention_case(4, 4096, 16, 16, 192, True, E=128),
    attention_case(1, TOKENS, 16, 16, 128, True),
    *(attention_case(TOKENS // S, S, H, H, D) for H, D in ((16, 128), (32, 64)) for S in (1024, 2048, 8192)),
    attention_case(1, TOKENS, 32, 32, 64))


def widths(op: str, letter: str, sizes: tuple[int, ...], tokens: int = TOKENS, **rest: int):
    return tuple(Case(op, {"T": tokens, **rest, letter: size}) for size in sizes)


OPS = {
    "attention": Op(attention_inputs, ours_attention, attention_peers, attention_cost, "S", ATTENTION,
                    (attention_case(2, 16, 4, 2, 8), attention_case(1, 32, 4, 2, 8),
                     attention_case(2, 16, 2, 2, 12, E=8))),
    "linear_logprob": Op(logprob_inputs, ours_logprob, logprob_peers, logprob_cost, "T",
                         (logprob_case(8192, 4096, compiled=True), logprob_case(8192, 4096, 50),
                          logprob_case(8192, 4096, 10), logprob_case(8192, 2048), logprob_case(8192, 1024),
                          logprob_case(4096, 2048), logprob_case(16384, 2048), logprob_case(32768, 2048)),
                         (logprob_case(12, 16, V=50), logprob_case(12, 16, 50, V=50))),
    "moe": Op(moe_inputs, ours_moe, moe_peers, moe_cost, "T",
              (moe_case(32768, 128, 8, 2048, 768, True), moe_case(4096, 128, 8, 2048, 768)),
              (moe_case(8, 4, 2, 16, 8), moe_case(16, 4, 2, 16, 8))),
    "grpo": Op(grpo_inputs, ours_grpo, grpo_peers, grpo_cost, "T",
               tuple(Case("grpo", {"T": T, "S": 512}) for T in (4096, 16384, 65536)),
               (Case("grpo", {"T": 8, "S": 4}), Case("grpo", {"T": 16, "S": 4}))),
    "rmsnorm": Op(rmsnorm_inputs, ours_rmsnorm, rmsnorm_peers, rmsnorm_cost, "M",
                  widths("rmsnorm", "M", (1024, 2048, 4096, 8192))
                  + widths("rmsnorm_residual", "M", (1024, 2048, 4096, 8192)),
                  widths("rmsnorm", "M", (16, 32), 8) + widths("rmsnorm_residual", "M", (16,), 8)),
    "rope": Op(rope_inputs, ours_rope, rope_peers, rope_cost, "H", widths("rope", "H", (8, 18, 40), D=128),
               widths("rope", "H", (2, 3), 8, D=8)),
    "swiglu": Op(swiglu_inputs, ours_swiglu, swiglu_peers, swiglu_cost, "F",
                 widths("swiglu", "F", (2048, 4864, 8192, 14336)), widths("swiglu", "F", (16, 24), 8)),
}
