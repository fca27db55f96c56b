"""The step and the loop of next-token training: the gradient is the oracle's, however the batch is cut."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from r1zero.model.optimizer import OptimConfig
from r1zero.model.transformer import Transformer
from r1zero.train.fit import train_step

from ..rl.cases import Capture, assert_same_gradient, naive_logp, tiny
from .loop_cases import few_documents, pretrain_config, text_file
from .run_cases import pretrain_on_text


@pytest.mark.parametrize("n_prompt", [0, 3])
def test_gradient_does_not_depend_on_micro_tokens_and_equals_the_oracle(n_prompt):
    model = tiny(dtype=torch.float64)
    batch = few_documents(n_prompt).batch(0)
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


def test_a_target_that_is_padding_of_the_head_is_refused():
    batch = few_documents(0).batch(0)
    model = tiny()
    head_rows = int(batch.targets.max())
    model = Transformer(replace(model.config, vocab_in_use=head_rows)).init_weights(0)
    with pytest.raises(ValueError, match=f"token id {head_rows} .*from 0 to {head_rows - 1}"):
        train_step(model, Capture(model), batch, 1.0, OptimConfig(), 10**6)


def test_every_step_trains_on_its_own_batch(tmp_path):
    asked = []
    config = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=5)
    pretrain_on_text(config, spoil=lambda step, model: asked.append(step))
    assert asked == [0, 1, 2, 3, 4]
