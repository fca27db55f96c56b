"""Logs and flags of made-up runs, for the rules of the diagnosis."""
from dataclasses import asdict, replace

import numpy as np

from r1zero.rl.losses import LossConfig
from r1zero.train.grpo import grpo_config

NAN = float("nan")
HEALTHY = {"accuracy": (0.33, 0.8), "format": (0.86, 0.88), "length": (37.0, 72.0), "truncated": (0.0, 0.09),
           "dead_groups": (0.0, 0.03), "all_right": (0.0, 0.1), "all_wrong": (0.1, 0.0), "loss": (0.0, 0.17),
           "entropy": (0.26, 0.28), "kl_to_reference": (0.0, 0.14), "gradient_norm": (0.12, 0.26),
           "trained_samples": (256, 248), "logp_gap_mean": (2e-6, 2e-6), "ratio_max": (1.0, 1.0),
           "clipped_low": (0.0, 0.0), "clipped_high": (0.0, 0.0), "value_explained": (0.1, 0.5),
           "reward": (0.5, 0.98)}


def log(steps: int = 60, wobble: float = 0.02, **changes) -> list[dict]:
    """Rows like those of a demo that went well: metrics go from one number in the first ten steps to another
    in the last ten, and accuracy wobbles as with 256 answers per step. changes: metrics, pairs or numbers;
    of three numbers the second is reached half-way."""
    rows = []
    for step in range(steps):
        done, row = min(1.0, max(0.0, (step - 9) / max(1, steps - 19))), {"step": step + 1}
        for name, value in (HEALTHY | changes).items():
            stops = value if isinstance(value, tuple) else (value, value)
            row[name] = float(np.interp(done, np.linspace(0, 1, len(stops)), stops))
        row["accuracy"] = min(1.0, max(0.0, row["accuracy"] + wobble * (-1) ** step))
        rows.append(row)
    return rows


def flags(**changes) -> dict:
    """The flags of a preset as run.json has them, with flags like loss__kl_coef changed; without a preset
    those of GRPO with a mean over tokens and no KL."""
    plain = {} if "algo" in changes else dict(loss=LossConfig(), ref_refresh=0)
    c = grpo_config(changes.pop("algo", "r1_zero"), run=".", base=".", **plain)
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        c = replace(c, **{outer: replace(getattr(c, outer), **{inner: value}) if inner else value})
    return asdict(c)
