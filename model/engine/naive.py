"""Generation, the whole idea: predict, sample, append, repeat.

The model reads the whole sequence again for every token. That is slow, and easy to see through: no
cache, no batch, no kernel. The engine is tested against it: same seeds, same tokens. Read this
first.

    completion = generate_naive(model, Request(prompt, max_new_tokens=64, seed=1))

Left out: stop texts and reports of the likeliest tokens, which only the engine has.
"""

import numpy as np
import torch

from ..packed import pack
from ..routes import RecordedRouting
from ..transformer import Transformer
from .requests import Completion, Request, check_requests
from .sampling import counter_uniform, sample_tokens, signed


@torch.inference_mode()
def generate_naive(model: Transformer, request: Request) -> Completion:
    """Continue one prompt, one token at a time.

    Raises ValueError for a request that cannot be served, and for one with stop texts or
    top_logprobs.
    """
    check_requests(model, [request])
    if request.top_logprobs:
        raise ValueError(
            f"generate_naive: top_logprobs is {request.top_logprobs}; only the engine reports them"
        )
    device = model.device
    seed = torch.tensor([signed(request.seed)], device=device)
    filters = None
    if request.filtered:
        options = (request.top_k, request.top_p, request.min_p)
        filters = tuple(torch.tensor([option], device=device) for option in options)

    sequence = [int(token) for token in request.prompt]
    tokens, logps = [], []
    finish_reason = "length"
    while len(tokens) < request.max_new_tokens:
        # 1. The model reads all tokens so far, [T]. The last one's hidden state predicts the next.
        # A mixture of experts chooses its experts for each, and says which (routes.py).
        routing = RecordedRouting()
        hidden_TM = model.hidden_states(pack([sequence], device), routing)
        logits_1V = model.logits(hidden_TM[-1:])

        # 2. A token's random number is a function of the request's seed and the token's position.
        position = torch.tensor([len(sequence)], device=device)
        uniform = counter_uniform(seed, position)

        # 3. Sample one token from softmax(logits / temperature).
        token, logp = sample_tokens(logits_1V, request.temperature, uniform, filters)

        # 4. Append it. The next prediction reads it, too.
        sequence.append(int(token))
        tokens.append(int(token))
        logps.append(float(logp))

        # 5. A stop token ends the sequence, and is part of it.
        if tokens[-1] in request.stop_ids:
            finish_reason = "stop"
            break
    routes = routing.routes(model.config)
    return Completion(np.array(tokens), np.array(logps, np.float32), finish_reason, routes=routes)
