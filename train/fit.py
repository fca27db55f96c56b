"""The loop that pretraining and fine-tuning share: next-token prediction, one batch per step.

`train_step` is one step, `fit` is the loop around it: learning rate, log, checkpoints, resume.

Left out: what to train on (batches.py), and evaluation while training (see pretrain.py).

Shapes: T tokens of a micro-batch (flat).
"""

import math
import time

from ..kernels.linear_logprob import check_targets
from ..model.balance import Balance
from ..model.loss_scale import LossScaler
from ..model.optimizer import OptimConfig, learning_rate, make_optimizer, optimizer_step
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .batches import Batch, split_batch
from .run import Run


def train_step(
    model: Transformer,
    optimizer,
    batch: Batch,
    lr: float,
    optim: OptimConfig,
    micro_tokens: int,
    scaler: LossScaler | None = None,
    balance: Balance | None = None,
) -> tuple[float, float]:
    """One optimizer step. Returns (mean loss in nats per weighted token, gradient norm).

    The mean's denominator is that of the whole batch, so the gradient does not depend on
    `micro_tokens`. A loss that is not finite changes nothing; the gradient norm is then NaN.
    scaler: for fp16; None is one that is off. An update that it skips has the gradient norm 0.
    balance: of the experts; None is a default one. Its losses are no part of the mean loss.
    """
    scaler, balance = scaler or LossScaler(), balance or Balance(model)
    balance.begin()
    device = model.embed.device
    check_targets(batch.targets, model.config.head_rows)
    denominator = float(batch.weight.sum())
    mean_loss = 0.0
    for part in split_batch(batch, micro_tokens):
        # Only some targets count when there is a prompt: then the head is computed for those alone.
        targets_T, weight_T, rows = part.targets, part.weight, None
        if not weight_T.all():
            rows = weight_T.nonzero().flatten()
            targets_T, weight_T = targets_T[rows], weight_T[rows]
            rows = rows.to(device)

        # Forward: the log-prob of each target given the tokens before it.
        with balance.watch():
            hidden_TM = model.hidden_states(part.inputs.to(device))
        logp_T, _ = model.logprobs(hidden_TM, targets_T.to(device), rows=rows)
        loss = -(logp_T * weight_T.to(device)).sum() / denominator

        # Backward: the gradients of all micro-batches add up, each times the same loss scale.
        total = loss
        if balance.routers:
            total = loss + balance.loss(len(part.targets) / len(batch.targets))
        scaler.scale(total).backward()
        mean_loss += float(loss.detach())

    if not math.isfinite(mean_loss):
        return mean_loss, math.nan
    norm = optimizer_step(model, optimizer, lr, optim, scaler)
    if 0 < norm < math.inf:
        balance.update()
    return mean_loss, norm


def fit(run: Run, model: Transformer, tokenizer: Tokenizer, batches, config) -> None:
    """Train `model` for the steps that `run` has left.

    batches: its `batch(step)` is the data of a step, so a resumed run needs no more than the step.
    config: has `save_every`, `optim`, `balance` and `micro_tokens`.
    Raises FloatingPointError for a loss or gradient that is not finite.
    """
    optimizer = make_optimizer(model, config.optim)
    scaler, balance = LossScaler.of(model), Balance(model, config.balance)
    scaler.load(run.restore(model, tokenizer, optimizer))
    n_tokens, started = 0, time.perf_counter()
    for step in run.steps():
        batch = batches.batch(step)
        lr = learning_rate(step, run.schedule_steps, config.optim)
        loss, gradient_norm = train_step(
            model, optimizer, batch, lr, config.optim, config.micro_tokens, scaler, balance
        )
        run.check_finite(step, model, loss=loss, gradient_norm=gradient_norm)
        n_tokens += len(batch.targets)
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "lr": lr,
            "tokens": len(batch.targets),
            "tokens_per_s": n_tokens / (time.perf_counter() - started),
            **scaler.metrics(),
            **balance.metrics(),
        }
        run.done(step, metrics, scaler.counters())
        run.log(step, metrics, show=("loss", "tokens_per_s"))
        if run.due(step, config.save_every):
            run.save(step)
