"""Six recipes on open models: `r1zero recipe NAME`. open_models.py runs them.

A recipe is a class: its facts, and its defaults where they differ from the common ones. What is
said to be published was published by others, with other code, and often without an interval. What
is predicted was not measured. None of the six has been run by us yet on a GPU.

The Countdown problems are generated, so nothing of them stands in a pretraining set. GSM8K and MATH
are known to Qwen's bases to an unknown extent: Qwen2.5 completes half of MATH-500 from a part of
each question (arXiv 2507.10532). So there is a recipe on OLMo-2, whose pretraining data is public.
"""

from dataclasses import dataclass
from typing import ClassVar

from .open_models import (
    Facts,
    OpenModelConfig,
    open_model,  # noqa: F401  (the command line looks for it beside the flags)
    predicted,
)

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
GSM8K_FILES = (
    f"curl -L -o gsm8k_train.jsonl {GSM8K}/train.jsonl",
    f"curl -L -o gsm8k_test.jsonl {GSM8K}/test.jsonl",
)
MATH_TRAIN = (
    "https://raw.githubusercontent.com/rasbt/math_full_minus_math500/main/"
    "math_full_minus_math500.json"
)
TO_LINES = 'python -c "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"'
MATH_FILES = (
    f"curl -L {MATH_TRAIN} | {TO_LINES} > math_train.jsonl",
    "hf download HuggingFaceH4/MATH-500 test.jsonl --repo-type dataset --local-dir math500",
)
COUNTDOWN = "Countdown with 4 numbers up to 99 and + - * /, made by the task; others are held out"
MATH = "MATH, 12,000 problems; MATH-500 is held out"
APACHE = "Apache-2.0"


@dataclass(frozen=True, kw_only=True)
class CountdownQwen15B(OpenModelConfig):
    """R1-Zero on Qwen2.5-1.5B: the Countdown game, the classic small reproduction."""

    task: ClassVar[str] = "countdown"
    facts: ClassVar[Facts] = Facts(
        name="countdown-qwen2.5-1.5b",
        model="Qwen/Qwen2.5-1.5B",
        model_license=APACHE,
        problems=COUNTDOWN,
        data_license="no licence needed",
        fetch=(),
        settings="learning rate, KL and length as TinyZero and nano-aha-moment have them",
        expected="TinyZero reports that 1.5B learns to search and 0.5B does not, without a number",
        shape="Qwen2.5-1.5B",
        prompt_tokens=128,
    )
    run: str = "runs/countdown-qwen2.5-1.5b"
    task_options: ClassVar[tuple[str, ...]] = (
        "template=r1_zero",
        "n_numbers=4",
        "high=99",
        "ops=+-*/",
    )


@dataclass(frozen=True, kw_only=True)
class CountdownQwen3B(CountdownQwen15B):
    """R1-Zero on Qwen2.5-3B: the Countdown game on one large GPU."""

    facts: ClassVar[Facts] = Facts(
        name="countdown-qwen2.5-3b",
        model="Qwen/Qwen2.5-3B",
        model_license="Qwen Research License",
        problems=COUNTDOWN,
        data_license="no licence needed",
        fetch=(),
        settings="learning rate, KL and length as nano-aha-moment has them",
        expected="about 60 % after 1,000 steps, under 10 hours on one GPU of 80 GB "
        "(nano-aha-moment; 3 or 4 numbers, no interval given)",
        shape="Qwen2.5-3B",
        prompt_tokens=128,
    )
    run: str = "runs/countdown-qwen2.5-3b"
    steps: int = 1000


@dataclass(frozen=True, kw_only=True)
class GSM8KQwen05B(OpenModelConfig):
    """GRPO on Qwen2.5-0.5B: word problems, with worked examples in the prompt."""

    task: ClassVar[str] = "gsm8k"
    facts: ClassVar[Facts] = Facts(
        name="gsm8k-qwen2.5-0.5b",
        model="Qwen/Qwen2.5-0.5B",
        model_license=APACHE,
        problems="GSM8K, 7,473 problems; its 1,319 test problems are held out",
        data_license="MIT",
        fetch=GSM8K_FILES,
        settings="ours; they are not tuned",
        expected="32.6 % -> 46.1 % with 8 worked examples of its own; how it sampled is not said "
        "(GSM8K-RLVR's README; it gives 41.6 % as Qwen's own figure for the base)",
        shape="Qwen2.5-0.5B",
        prompt_tokens=768,
    )
    run: str = "runs/gsm8k-qwen2.5-0.5b"
    data: str = "gsm8k_train.jsonl"
    test: str = "gsm8k_test.jsonl"
    task_options: ClassVar[tuple[str, ...]] = ("template=eight_shot",)
    format_weight: float = 0.0
    max_new_tokens: int = 384
    eval_problems: int = 1319
    eval_samples: int = 1


@dataclass(frozen=True, kw_only=True)
class GSM8KSmolLM2(OpenModelConfig):
    """GRPO on SmolLM2-360M-Instruct: word problems, put through its chat template."""

    task: ClassVar[str] = "gsm8k"
    facts: ClassVar[Facts] = Facts(
        name="gsm8k-smollm2-360m",
        model="HuggingFaceTB/SmolLM2-360M-Instruct",
        model_license=APACHE,
        problems="GSM8K, 7,473 problems; its 1,319 test problems are held out",
        data_license="MIT",
        fetch=GSM8K_FILES,
        settings="ours; they are not tuned",
        expected="no published number for RL on this model was found",
        shape="SmolLM2-360M",
        prompt_tokens=256,
    )
    run: str = "runs/gsm8k-smollm2-360m"
    data: str = "gsm8k_train.jsonl"
    test: str = "gsm8k_test.jsonl"
    task_options: ClassVar[tuple[str, ...]] = ("template=chat",)
    format_weight: float = 0.0
    chat: bool = True
    max_new_tokens: int = 384
    eval_problems: int = 1319
    eval_samples: int = 1


@dataclass(frozen=True, kw_only=True)
class MathQwen06B(OpenModelConfig):
    """GRPO on Qwen3-0.6B-Base: competition mathematics."""

    task: ClassVar[str] = "math"
    facts: ClassVar[Facts] = Facts(
        name="math-qwen3-0.6b",
        model="Qwen/Qwen3-0.6B-Base",
        model_license=APACHE,
        problems=MATH,
        data_license="training file Apache-2.0, MATH itself MIT",
        fetch=MATH_FILES,
        settings="512 tokens, 8 answers and no KL as reasoning-from-scratch has them; 8 problems a "
        "step at 1e-6 are ours, where it takes 1 problem at 1e-5",
        expected="15.2 % -> 47.4 % at its step 50, 44.0 % at step 100, greedy with up to 2,048 "
        "tokens (reasoning-from-scratch, chapter 6; 500 problems, about ± 4.3)",
        shape="Qwen3-0.6B",
        prompt_tokens=1024,
    )
    run: str = "runs/math-qwen3-0.6b"
    data: str = "math_train.jsonl"
    test: str = "math500/test.jsonl"
    task_options: ClassVar[tuple[str, ...]] = ("template=boxed",)
    format_weight: float = 0.0
    skip_bad: bool = True
    steps: int = 100
    prompts_per_step: int = 8
    max_new_tokens: int = 512
    kl_coef: float = 0.0
    eval_samples: int = 1
    eval_temperature: float = 0.0
    eval_max_new_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class MathOLMo2(MathQwen06B):
    """GRPO on OLMo-2-1B, a base with public pretraining data: competition mathematics."""

    facts: ClassVar[Facts] = Facts(
        name="math-olmo2-1b",
        model="allenai/OLMo-2-0425-1B",
        model_license=APACHE,
        problems=MATH,
        data_license="training file Apache-2.0, MATH itself MIT",
        fetch=MATH_FILES,
        settings="those of math-qwen3-0.6b, so that the two bases can be compared",
        expected="no published number for RL straight on this base was found; random rewards did "
        "not lift OLMo-2-7B, unlike Qwen (arXiv 2506.10947)",
        shape="OLMo-2-1B",
        prompt_tokens=1024,
    )
    run: str = "runs/math-olmo2-1b"


RECIPES = (CountdownQwen15B, CountdownQwen3B, GSM8KQwen05B, GSM8KSmolLM2, MathQwen06B, MathOLMo2)


def markdown_table() -> str:
    """The table of the README."""
    head = (
        "| recipe | base (licence) | problems (licence) | published by others | memory, predicted |"
    )
    rows = [head, "|---|---|---|---|---|"]
    for recipe in RECIPES:
        f = recipe.facts
        cells = (
            f"`{f.name}`",
            f"{f.model} ({f.model_license})",
            f"{f.problems} ({f.data_license})",
            f.expected,
            predicted(recipe()),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
