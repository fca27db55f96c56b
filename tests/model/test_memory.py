"""The prediction of memory, part by part: against parameters that are counted, and against real tensors."""
from dataclasses import replace

import pytest
import torch

from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.lora import LoRAConfig, adapter_tensors, add_adapters, cast_frozen
from r1zero.model.memory import Setup, predict, smallest_card, usable
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer, count_parameters

QWEN = preset("qwen2.5-0.5b", 151_936)
N = 494_032_768  # its published number of parameters
BIG = Setup(QWEN, rows=64, longest=1280)


def test_the_parts_of_full_training_follow_from_the_number_of_parameters():
    p = predict(BIG)
    assert (p.weights, p.gradients, p.moments) == (4 * N, 4 * N, 8 * N)
    assert 2 * N <= p.reference < 2.001 * N and p.engine_copy == 2 * N  # norms stay in fp32
    assert p.cache == 64 * 16 * 81 * 12_288  # rows of 81 pages; 12,288 bytes per token are published
    assert p.critic == p.visiting == 0 and p.peak == p.held + max(p.update, p.sampling)


def test_with_adapters_the_base_is_held_once_and_in_16_bit():
    full, p = predict(BIG), predict(replace(BIG, lora=LoRAConfig(16)))
    with torch.device("meta"):
        model = cast_frozen_model(QWEN)
    adapters = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    assert 2 * N + 4 * adapters <= p.weights < 2.001 * N + 4 * adapters
    assert (p.gradients, p.moments, p.reference) == (4 * adapters, 8 * adapters, 4 * adapters)
    assert p.engine_copy == 2 * (N - 151_936 * 896 - norms_and_biases(QWEN))  # all matrices of the blocks
    assert p.peak < 0.5 * full.peak


def cast_frozen_model(config):
    model = add_adapters(Transformer(config, torch.bfloat16), LoRAConfig(16), 0)
    cast_frozen(model)
    return model


def norms_and_biases(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters() if p.ndim < 2)


@pytest.mark.parametrize("change, part, factor", [
    (dict(moments="bf16"), "moments", 0.5), (dict(reference="none"), "reference", 0),
    (dict(reference="cpu"), "reference", 0), (dict(rows=128), "cache", 2),
])
def test_an_option_changes_its_part(change, part, factor):
    before, after = (getattr(predict(setup), part) for setup in (BIG, replace(BIG, **change)))
    assert after == pytest.approx(factor * before, rel=0.02)


def test_a_larger_micro_batch_keeps_as_much_more():
    small, large = (predict(replace(BIG, micro_tokens=size)).activations for size in (4096, 8192))
    with torch.device("meta"):
        model = Transformer(QWEN, torch.bfloat16)
    per_token = sum(block.kept_per_token for block in model.blocks) + model.blocks[0].kept_per_token
    assert large - small == pytest.approx(4096 * 2 * per_token, rel=0.01)  # and of a layer's gradients


def test_recompute_keeps_the_streams_and_one_layer():
    kept, again = (predict(replace(BIG, recompute=value, micro_tokens=8192)) for value in (False, True))
    streams = 8192 * 24 * 2 * 896 * 2  # two numbers per width, layer and token, in bf16
    assert streams < again.activations < 0.35 * kept.activations


def test_an_offloaded_reference_counts_while_it_is_in_use():
    setup = replace(BIG, reference="cpu", micro_tokens=1280, lora=LoRAConfig(0), recompute=True)
    p = predict(setup)
    assert 2 * N <= p.visiting < 2.001 * N and p.peak == p.held + max(p.update, p.visiting, p.sampling)


def test_models_that_judge_are_held_by_both_phases_without_fp32_masters():
    alone, p = predict(BIG), predict(replace(BIG, judges=(QWEN, QWEN)))
    assert p.judges == 2 * alone.reference and p.peak == alone.peak + p.judges
    tight, crowded = (predict(setup, usable(20e9)) for setup in (BIG, replace(BIG, judges=(QWEN,))))
    assert crowded.cache < tight.cache and crowded.peak <= usable(20e9)  # the cache makes room for them


def test_the_cache_gets_what_is_left_and_two_sequences_at_least():
    roomy, tight = (predict(BIG, usable(total)) for total in (80e9, 14e9))
    assert roomy.cache_tokens == 64 * 16 * 81 and tight.cache_tokens == 2 * 1280
    middle = predict(BIG, usable(20e9))
    assert tight.cache_tokens < middle.cache_tokens < roomy.cache_tokens
    assert middle.peak <= usable(20e9)


@pytest.mark.parametrize("setup", [BIG, replace(BIG, lora=LoRAConfig(8)), replace(BIG, recompute=True)])
def test_a_run_fits_the_smallest_card_and_no_smaller_one(setup):
    needed = smallest_card(setup)
    assert predict(setup, usable(needed)).peak <= usable(needed) * 1.0001
    assert predict(setup, usable(0.99 * needed)).peak > usable(0.99 * needed)


@pytest.mark.parametrize("lora", [LoRAConfig(0), LoRAConfig(4)])
def test_the_parts_are_the_bytes_of_the_tensors_there_are(lora):
    """A model in bf16 on a CPU, whose engine decodes from the trainer's own weights."""
    config = preset("demo-moe", 300)
    model = Transformer(config, torch.bfloat16).init_weights(0)
    if lora.rank:
        cast_frozen(add_adapters(model, lora, 0))
    p = predict(Setup(config, rows=4, longest=64, lora=lora, on_gpu=False))
    assert p.weights == sum(parameter.nbytes for parameter in model.parameters())
    engine = Engine(model, max_rows=4, longest=64, keep_routes=True)
    assert p.cache_tokens == engine.cache_tokens and p.cache == engine.cache_tokens * engine.token_bytes
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = [x for x in engine.decoded.parameters() if x.data_ptr() not in shared]
    assert p.engine_copy == sum(x.nbytes for x in own)


def test_a_mixture_and_latents_are_counted_by_their_own_layers():
    config = preset("demo-moe", 300)
    assert predict(Setup(config, longest=64, on_gpu=False)).gradients == 4 * count_parameters(config)


def kept_bytes(model, tokens) -> int:
    """Bytes that autograd keeps of a forward pass, weights aside, each tensor once."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}  # the storages themselves, so that no other gets the address of one

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden_states(pack([tokens]))
    return sum(storage.nbytes() for storage in kept.values())


def test_frozen_experts_do_not_keep_what_their_own_gradients_would_need():
    model = Transformer(preset("demo-moe", 300)).init_weights(0)
    tokens = torch.randint(300, (64,)).tolist()
    trained, predicted = kept_bytes(model, tokens), model.saved_bytes(64)
    for block in model.blocks:
        block.mlp.gate_up.requires_grad_(False)
        block.mlp.down.requires_grad_(False)
    assert trained - kept_bytes(model, tokens) == predicted - model.saved_bytes(64) > 0.1 * trained
