"""A whole training step through the Triton kernels, against the same step on the references."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1zero.kernels import attention, grpo, linear_logprob, mlp, moe, rmsnorm, rope
from r1zero.model.config import LatentShape, ModelConfig
from r1zero.model.moe_config import MoEConfig
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

# an odd group size, q/k norm, biases, and a d_model that is no power of 2
CONFIG = ModelConfig(vocab_size=101, n_layers=2, d_model=48, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=80,
                     rope_theta=1e4, norm_eps=1e-6, qk_norm=True, qkv_bias=True, tie_embeddings=True,
                     max_seq_len=64)
EXPERTS = replace(CONFIG, moe=MoEConfig(5, 2, 24, d_shared=16, scores="sigmoid", dense_layers=(0,)))
# keys of 24 and values of 12
LATENT = ModelConfig(vocab_size=101, n_layers=2, d_model=48, n_heads=3, n_kv_heads=3, head_dim=24, d_ff=80,
                     latent=LatentShape(kv_rank=20, q_rank=28, rope_dim=8, value_dim=12), max_seq_len=64)


class OpsSeen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "r1zero":
            self.names.add(func.name().removeprefix("r1zero::"))
        return func(*args, **(kwargs or {}))


def step(config, after):
    """Loss of GRPO, a little off-policy, its gradients and the ops of ours that ran."""
    model = Transformer(config).init_weights(0)
    rng = torch.Generator().manual_seed(1)
    sequences = [torch.randint(101, (n,), generator=rng).tolist() for n in (1, 17, 40, 5)]
    packed = pack(sequences, after=after)
    with OpsSeen() as seen:
        logp, _ = model.logprobs(model.hidden_states(packed), packed.tokens.roll(-1), 0.9)
        old = logp.detach() + 0.1 * torch.randn(logp.shape, generator=rng)
        advantages = torch.tensor([1.0, -1.5, 2.0, 0.5]).repeat_interleave(packed.cu_seqlens.diff().long())
        weights = torch.full_like(old, 1 / len(logp))
        loss, _ = grpo.policy_loss(logp, old, old, advantages, weights, packed.cu_seqlens, kl_coef=0.1)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, seen.names


@pytest.mark.parametrize("config, after, more", [
    (CONFIG, None, ()), (LATENT, None, ()), (LATENT, np.array([-1, -1, 1, 1]), ()),
    (EXPERTS, None, ("moe_fwd", "moe_bwd"))],
    ids=["grouped-query", "latent", "latent, shared prefixes", "experts"])
def test_a_training_step_on_kernels_is_that_on_references(config, after, more, monkeypatch):
    loss, grads, ops = step(config, after)
    assert ops == {"attention_fwd", "attention_bwd", "rmsnorm_fwd", "rmsnorm_bwd", "rope", "swiglu_fwd",
                   "swiglu_bwd", "logprob_fwd", "logprob_bwd", "policy_loss", "policy_loss_bwd", *more}
    for module, table in ((attention, "ATTENTION"), (attention, "ROPE_ATTENTION"), (grpo, "POLICY_LOSS"),
                          (linear_logprob, "LINEAR_LOGPROB"), (mlp, "SWIGLU"), (mlp, "SWIGLU_MLP"),
                          (moe, "MOE_MLP"),
                          (rmsnorm, "RMSNORM"), (rope, "ROPE")):
        monkeypatch.setattr(module, table, getattr(module, table)[-1:])
    expected_loss, expected, ops = step(config, after)
    assert not ops
    assert abs(loss - expected_loss) <= 1e-6 * abs(expected_loss)
    for name, e in expected.items():
        assert torch.linalg.vector_norm(grads[name] - e) <= 1e-5 * torch.linalg.vector_norm(e), name
