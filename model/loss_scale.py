"""Dynamic loss scaling: how gradients survive in fp16, whose smallest number is 6e-8.

    loss times scale -> backward -> gradients divided by scale -> is every gradient finite?
        yes: step; after 2000 such steps in a row the scale is doubled
        no:  the scale was too large: no step, and the scale is halved

Without it the gradients of most tokens, which are divided by all tokens of a batch, become 0.
Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2. The arithmetic is PyTorch's own
torch.amp.GradScaler; this file adds what a run needs: what is logged, saved and refused.

fp32 and bf16 need none: the scaler is then off, and each of its calls does nothing.
"""

import torch

LEAST_SCALE = 1.0  # a gradient that is not finite at this scale has another reason


class LossScaler:
    """The loss scale of one run. A policy and its critic share one."""

    def __init__(self, device: str = "cpu", enabled: bool = False):
        self._scaler = torch.amp.GradScaler(device, enabled=enabled)
        self.enabled = enabled
        self.skipped = 0
        """Number of updates that were left out so far."""

    @classmethod
    def of(cls, model) -> "LossScaler":
        """The scaler that a Transformer needs: one that is on in fp16 alone."""
        return cls(model.device.type, enabled=model.compute_dtype == torch.float16)

    @property
    def value(self) -> float:
        """What a loss is multiplied by."""
        return self._scaler.get_scale()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward() on."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, in place, once all micro-batches are added up."""
        self._scaler.unscale_(optimizer)

    def stepped(self) -> None:
        """Count a step that was made; every so often the scale is doubled."""
        self._scaler.update()

    def overflowed(self) -> bool:
        """After a norm that is not finite: whether the scale was to blame. It is then halved."""
        before = self.value
        if not self.enabled or before <= LEAST_SCALE:
            return False
        # PyTorch halves the scale if `unscale` met a gradient that was not finite.
        self._scaler.update()
        was_halved = self.value < before
        self.skipped += was_halved
        return was_halved

    # ---- the log and the checkpoint ----

    def metrics(self) -> dict[str, float]:
        """What a step's log shows; nothing where the scaler is off."""
        if not self.enabled:
            return {}
        return {"loss_scale": self.value, "skipped_updates": self.skipped}

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps, as numbers; nothing where the scaler is off."""
        if not self.enabled:
            return {}
        steps = self._scaler.state_dict()["_growth_tracker"]
        return {**self.metrics(), "steps_since_scaling": steps}

    def load(self, counters: dict[str, float]) -> None:
        """Go on from what `counters` returned; a dict without it changes nothing."""
        if not self.enabled or "loss_scale" not in counters:
            return
        saved = {
            "scale": counters["loss_scale"],
            "_growth_tracker": counters["steps_since_scaling"],
        }
        self._scaler.load_state_dict(self._scaler.state_dict() | saved)
        self.skipped = counters["skipped_updates"]
