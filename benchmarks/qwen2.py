"""A model of ours as transformers' Qwen2: the same weights under other names, so the same function.

Needs transformers only when `qwen2_of` is called.
"""
import torch

from r1zero.model.config import ModelConfig
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer


def qwen2_shaped() -> ModelConfig:
    """0.92 M parameters in the shape of Qwen2."""
    return ModelConfig(vocab_size=1024, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32,
                       d_ff=384, rope_theta=1e6, qkv_bias=True, tie_embeddings=True, max_seq_len=512)


def qwen2_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights of `model` under the names of transformers' Qwen2ForCausalLM."""
    config = model.config
    rows_of_qkv = [config.head_dim * n for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    weights = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm,
               "lm_head.weight": model.head}
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        parts = zip("qkv", attn.qkv.weight.split(rows_of_qkv), attn.qkv.bias.split(rows_of_qkv), strict=True)
        for name, weight, bias in parts:
            weights[f"model.layers.{i}.self_attn.{name}_proj.weight"] = weight
            weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias
        gate, up = mlp.gate_up.weight.chunk(2)
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in {
            "self_attn.o_proj": attn.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": mlp.down.weight,
            "input_layernorm": block.attn_norm, "post_attention_layernorm": block.mlp_norm}.items()}
    return weights


def qwen2_of(model: Transformer):
    """The same function as `model`, as a Qwen2ForCausalLM. Raises RuntimeError if their log-probs differ."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = model.config
    peer = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    peer.load_state_dict(qwen2_weights(model))

    # Both score the same random tokens.
    rows = torch.randint(config.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
    with torch.no_grad():
        hidden = model.hidden_states(pack(list(inputs.numpy())))
        ours, _ = model.logprobs(hidden, targets)
        logits = peer(inputs).logits.flatten(0, 1)
        theirs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    gap = float((ours - theirs).abs().max())
    if not gap < 1e-3:
        raise RuntimeError(f"ours and transformers' Qwen2 differ by {gap} in log-prob: this version of "
                           "transformers means something else by the same weights")
    return peer
