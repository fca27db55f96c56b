"""Split off model/generation.py."""

import numpy as np
import torch

from ..packed import pack
from ..transformer import Transformer
from .requests import Completion, Request, check_requests
from .sampling import counter_uniform, sample_tokens, signed


@torch.inference_mode()
def generate_naive(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_id: int,
    **options,
) -> Completion:
    """The oracle: one sequence, the whole forward pass again for every token. Same seed, same tokens.

    options: top_k, top_p and min_p, as in Request. Stop texts and top_logprobs are left to the engine:
    ValueError.
    """
    r = Request(prompt, max_new_tokens, seed, temperature, stop_ids=(eos_id,), **options)
    check_requests(model, [r])
    if r.top_logprobs:
        raise ValueError(
            f"generate_naive: top_logprobs is {r.top_logprobs}; only the engine reports them"
        )
    tokens, logps = list(prompt), []
    filters = (
        tuple(torch.tensor([x], device=model.embed.device) for x in (r.top_k, r.top_p, r.min_p))
        if r.filtered
        else None
    )
    while len(tokens) < len(prompt) + max_new_tokens:
        logits = model.logits(model.hidden_states(pack([tokens], model.device))[-1:])
        uniform = counter_uniform(torch.tensor([signed(seed)]), torch.tensor([len(tokens)])).to(
            logits.device
        )
        token, logp = sample_tokens(logits, temperature, uniform, filters)
        tokens.append(int(token))
        logps.append(float(logp))
        if tokens[-1] == eos_id:
            break
    reason = "stop" if tokens[-1] == eos_id else "length"
    return Completion(np.array(tokens[len(prompt) :]), np.array(logps, np.float32), reason)
