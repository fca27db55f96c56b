"""How much memory GRPO takes, part by part, before any of it is taken.

    predicted = predict(Setup(config, rows=256, longest=1280), budget=24e9)
    predicted.peak, predicted.parts

Two phases alternate. While it samples, a run holds weights, moments, the reference, the engine's
copy of the weights and its cache; while it updates, it holds all of these, gradients, and what a
micro-batch keeps for its backward pass. The peak is that of the larger phase.

All is counted on a model without memory (the meta device), whose layers know what they keep. So no
formula here knows an architecture. What a GPU's kernels and a CPU's keep differs little in fp32:
python -m benchmarks.memory_predicted holds either against its tensors. In 16 bit it is the GPU's: a
CPU has no compiled loops there, and keeps fp32 copies, which take more.

Left out: the driver's own memory and gaps between tensors (`usable` allows for both), and the
logits of `generate` with filters, which sort.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..kernels.linear_logprob import SLICE
from .config import ModelConfig
from .engine.cache import (
    CPU_CACHE,
    TOKENS_PER_STEP,
    gpu_cache_bytes,
    step_bytes,
    tokens_within,
)
from .lora import LoRAConfig, add_adapters, cast_frozen, merged_bytes
from .routes import route_bytes
from .transformer import Transformer

DRIVER = 700e6  # bytes that CUDA and its libraries take of a GPU before the first tensor
GAPS = 0.04  # share of a GPU that lies idle between tensors
PLENTY = 1e15  # bytes


@dataclass(frozen=True)
class Setup:
    """What decides how much memory GRPO takes."""

    model: ModelConfig
    rows: int = 256
    """Answers that are sampled at one time."""
    longest: int = 1024
    """Tokens of the longest prompt and its answer together."""
    micro_tokens: int = 4096
    """Tokens per forward and backward pass."""
    dtype: torch.dtype = torch.bfloat16
    fp32_head: bool = False
    on_gpu: bool = True
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    recompute: bool = False
    moments: str = "fp32"
    reference: str = "device"
    """Where the reference is between its uses: device, cpu, or none."""
    teacher: ModelConfig | None = None
    """The shape of the reference, where it is a teacher of another one."""
    critic: bool = False
    critic_moments: str = "fp32"
    judges: tuple[ModelConfig, ...] = ()
    """The shapes of the models that judge answers: a reward model, a process reward."""

    @property
    def reference_is_adapters(self) -> bool:
        """Whether the reference shares the policy's weights, and has no more than adapters."""
        return self.teacher is None and self.lora.rank > 0


@dataclass(frozen=True)
class Prediction:
    """Bytes by part. What lies behind `cache` is there in one of the two phases alone."""

    weights: int
    moments: int
    reference: int
    critic: int
    """Its weights and moments; PPO alone has one."""
    judges: int
    """The weights of the models that judge answers."""
    engine_copy: int
    cache: int
    sampling: int
    """What a step of the engine makes: activations of a prefill, logits."""
    gradients: int
    activations: int
    """What a micro-batch keeps for its backward pass, and works with there."""
    logprobs: int
    """How much larger the workspace of the log-probs is than that of a layer."""
    visiting: int
    """An offloaded reference while it is in use, before there are gradients."""
    cache_tokens: int
    """Number of tokens that the cache has room for."""
    reserve: int
    """What is not there yet when the engine makes its cache, and will be."""

    @property
    def held(self) -> int:
        """What both phases hold."""
        ours = self.weights + self.moments + self.reference + self.critic + self.judges
        return ours + self.engine_copy + self.cache

    @property
    def update(self) -> int:
        """What an update takes beside that."""
        return self.gradients + self.activations + self.logprobs

    @property
    def peak(self) -> int:
        return self.held + max(self.sampling, self.update, self.visiting)

    @property
    def parts(self) -> dict[str, int]:
        """{name for people: bytes}, in the order of the fields."""
        names = {
            "weights": "weights",
            "moments": "AdamW's moments",
            "reference": "reference",
            "critic": "critic",
            "judges": "models that judge",
            "engine_copy": "engine's copy",
            "cache": "key/value cache",
            "sampling": "a sampling step",
            "gradients": "gradients",
            "activations": "activations",
            "logprobs": "log-probs",
            "visiting": "offloaded reference, in use",
        }
        return {words: getattr(self, name) for name, words in names.items()}


def usable(total: float) -> float:
    """Bytes of a GPU of `total` bytes that tensors can have."""
    return total * (1 - GAPS) - DRIVER


def model_without_memory(setup: Setup) -> Transformer:
    """The policy on the meta device: all shapes and dtypes, no numbers. It is not to be changed:
    plans of one shape share it."""
    return _built(setup.model, setup.dtype, setup.fp32_head, setup.lora, setup.recompute)


@lru_cache(maxsize=8)
def _built(config, dtype, fp32_head, lora, recompute) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, dtype, fp32_head)
    if lora.rank:
        cast_frozen(add_adapters(model, lora, seed=0))
    model.recomputes = recompute
    return model


def moment_bytes(dtype: str) -> int:
    """Bytes per parameter of AdamW's two moments."""
    return 8 if dtype == "fp32" else 4


def bytes_of(model: Transformer) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def engine_copy_bytes(model: Transformer, on_gpu: bool) -> int:
    """Bytes of the weights that the engine decodes from and that are not the trainer's own."""
    merged = merged_bytes(model)
    fp32 = {id(p) for p in model.read_in_fp32()}
    if not on_gpu or model.embed.dtype == model.compute_dtype:
        return merged
    # A copy in 16 bit; what is in 16 bit already is shared.
    itemsize = model.compute_dtype.itemsize
    copied = [p for p in model.parameters() if p.dtype != model.compute_dtype]
    return merged + sum(p.nbytes if id(p) in fp32 else p.numel() * itemsize for p in copied)


def reference_bytes(setup: Setup, model: Transformer) -> int:
    """Bytes of the reference on the device, while it is in use."""
    if setup.reference == "none":
        return 0
    if setup.reference_is_adapters:  # as they were
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return _frozen_bytes(setup.teacher or setup.model, setup.dtype, setup.fp32_head)


@lru_cache(maxsize=8)
def _frozen_bytes(config, dtype, fp32_head) -> int:
    """Bytes of a model that nobody trains."""
    with torch.device("meta"):
        model = Transformer(config, dtype, fp32_head).requires_grad_(False)
    cast_frozen(model)
    return bytes_of(model)


def predict(setup: Setup, budget: float | None = None) -> Prediction:
    """The parts of a run. budget: bytes that tensors can have; None: as much as it wants.

    With a budget the cache is what a run gives it there: room for `rows` sequences of `longest`
    tokens, or less where that does not fit, but at least two.
    """
    model = model_without_memory(setup)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gradients = 4 * trained
    moments = moment_bytes(setup.moments) * trained
    weights, reference = bytes_of(model), reference_bytes(setup, model)
    critic = critic_moments = 0
    if setup.critic:
        # its gradients are not there when the policy's are
        critic = 4 * trained if setup.lora.rank else weights
        critic_moments = moment_bytes(setup.critic_moments) * trained
    judges = sum(_frozen_bytes(each, setup.dtype, setup.fp32_head) for each in setup.judges)
    copied = engine_copy_bytes(model, setup.on_gpu)

    # What an update takes: all that is kept, and the larger of two workspaces.
    n_tokens = max(setup.micro_tokens, setup.longest)
    layer, head = model.workspaces(n_tokens)
    if model.head.requires_grad:
        head += 4 * model.head.numel()  # of this micro-batch, before it is added to the others'
    if not setup.on_gpu:
        # a slice of logits beside its gradient, and neither wider than the vocabulary
        extra = 2 * min(SLICE, setup.model.head_rows) - SLICE
        head += n_tokens * extra * setup.dtype.itemsize
    activations, logprobs = model.saved_bytes(n_tokens) + layer, max(0, head - layer)
    is_away = setup.reference == "cpu" and not setup.reference_is_adapters
    at_home, visiting = (0, reference) if is_away else (reference, 0)

    # What sampling takes; the cache has what is left.
    prefilled = max(TOKENS_PER_STEP, setup.longest)
    sampling = step_bytes(setup.model, setup.dtype, prefilled, setup.rows)
    reserve = moments + critic_moments + max(gradients + activations + logprobs, visiting)
    room = float(CPU_CACHE)
    if setup.on_gpu:
        free = PLENTY
        if budget is not None:
            free = budget - (weights + at_home + critic + judges + copied)
        room = gpu_cache_bytes(int(free), reserve, sampling)
    token_bytes = model.cache_bytes_per_token
    if setup.model.moe is not None:
        token_bytes += route_bytes(setup.model)
    limit = setup.model.max_seq_len
    cache_tokens = tokens_within(room, token_bytes, setup.rows, setup.longest, limit)
    return Prediction(
        weights=weights,
        moments=moments,
        reference=at_home,
        critic=critic + critic_moments,
        judges=judges,
        engine_copy=copied,
        cache=cache_tokens * token_bytes,
        sampling=sampling,
        gradients=gradients,
        activations=activations,
        logprobs=logprobs,
        visiting=visiting,
        cache_tokens=cache_tokens,
        reserve=reserve,
    )


def smallest_card(setup: Setup) -> float:
    """Bytes of the smallest card on which a run fits, with a cache for two sequences."""
    least = predict(setup, budget=1.0).peak
    return (least + DRIVER) / (1 - GAPS)
