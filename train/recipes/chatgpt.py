"""ChatGPT's recipe on a toy: demonstrations -> rankings -> reward model -> PPO.

    r1zero recipe chatgpt --run runs/chatgpt
    r1zero recipe chatgpt --run runs/chatgpt --base runs/demo/seed0/base    without the pretraining

1. Pretrain the demo's base, or take the one of --base.
2. Fine-tune it on demonstrations: answers of careful authors, all of them well formed.
3. Sample answers from that model, and rank those to each problem by a hidden preference
   (hidden_preference.py), which nothing else in training sees.
4. Train a reward model on the rankings.
5. PPO against the reward model, with a KL to the fine-tuned model in the reward.
6. The same with nothing to hold it back: a reward model from a few rankings, and no KL.

Then both are measured on held-out problems (over_optimisation.py): how often their answers are
liked better than those of the fine-tuned model, and how the score and the hidden preference move
with the distance from that model. Every stage is a run of its own in a folder of its own, so Ctrl-C
and --resume work throughout.

Source: InstructGPT, arXiv 2203.02155. Left out: its pretraining loss in PPO, people.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...eval.console import say, show
from ...eval.tasks.countdown import Countdown
from ...model.checkpoint import checkpoint_steps, load_model
from ...model.engine.engine import Engine
from ...model.files import atomic_write_text
from ...model.optimizer import OptimConfig
from ...rl.family import rl_optim
from ...rl.rewards import RewardConfig
from ..grpo import GRPOConfig, grpo, grpo_config
from ..machine import describe_machine, pick_device, reuse_memory
from ..pretrain import pretrain
from ..rankings import FEWEST, MOST
from ..reward_model import RewardModelConfig, reward_model
from ..run import RunConfig, at_least
from ..sft import SFTConfig, sft
from ..task_flags import TaskFlags
from .demo import DemoConfig, base_config
from .demo_corpus import CorpusConfig, document
from .hidden_preference import ranking_lines, sample_answers
from .over_optimisation import MICRO_TOKENS, Arms, Evaluator, measure_all, plot_distance, table
from .parts import (
    PartResults,
    Stage,
    check_not_begun,
    check_part,
    check_size,
    enough_to_split,
    run_stage,
)

TASK_OPTIONS = ("n_numbers=3", "high=20", "ops=+-")
N_DEMONSTRATIONS = 1000
CAREFUL = CorpusConfig(persistent_share=0.3, broken_share=0.0)
MAX_NEW_TOKENS = 144
POINTS = 8  # checkpoints of PPO that are measured
FEW_STEPS = 20  # of the reward model of a few rankings: more than ten epochs of the default
FREE = ("run", "resume", "base", "device")  # flags that may change on resume
DEMONSTRATIONS, RANKING, MEASURING = 1, 2, 3  # what beside the seed tells random numbers apart


@dataclass(frozen=True, kw_only=True)
class ChatGPTConfig:
    """ChatGPT's recipe on a toy: fine-tuning, reward model, PPO."""

    run: str = "runs/chatgpt"
    """Folder of the recipe."""
    resume: bool = False
    """Continue a recipe that was stopped."""
    base: str | None = None
    """Folder of a base that the demo has pretrained; without it the recipe pretrains one."""
    seed: int = 0
    """Seed of the texts, the weights and the sampling."""
    pretrain_steps: int = 2000
    """Number of pretraining steps, of 2,048 tokens each."""
    documents: int = 60_000
    """Number of documents in the pretraining text."""
    model: str = "demo"
    """Size of the model that is pretrained: a preset or depth=N."""
    sft_steps: int = 40
    """Number of steps of fine-tuning, of 2,048 tokens each."""
    rankings: int = 1000
    """Number of problems whose answers are ranked."""
    answers: int = 6
    """Number of answers per ranking; InstructGPT had 4 to 9."""
    noise: float = 0.0
    """Probability that the judge of two answers errs."""
    rm_steps: int = 80
    """Number of steps of the reward model, of 16 rankings each."""
    ppo_steps: int = 32
    """Number of PPO steps, of 16 problems x 16 answers each."""
    kl: float = 0.02
    """Weight of the KL to the fine-tuned model in PPO's reward."""
    few: int = 32
    """Number of rankings that the reward model of the unbridled PPO learns from, of which a quarter
    is held out; 0 leaves that PPO out."""
    eval_problems: int = 256
    """Number of held-out problems to measure on, with two answers each."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        at_least(self, 1, "pretrain_steps", "documents", "sft_steps", "rm_steps", "eval_problems")
        at_least(self, POINTS, "ppo_steps")
        at_least(self, 0, "few", "seed", "kl")
        at_least(self, 20, "rankings")
        at_least(self, FEWEST, "answers")
        if self.answers > MOST:
            raise ValueError(f"--answers is {self.answers}, expected at most {MOST}")
        if self.few == 1:
            raise ValueError("--few is 1, and a quarter is held out; expected 0, or 2 or more")
        check_problems(self)


# ---- what is refused before anything is made ----


def check_problems(config: ChatGPTConfig) -> None:
    """Raise ValueError if there are fewer problems than are asked for."""
    task, behind = toy_task(config).make(), f"behind the {N_DEMONSTRATIONS:,} of demonstrations,"
    last = N_DEMONSTRATIONS + config.rankings
    check_size(f"--rankings {config.rankings}, {behind}", last, task, "train")
    check_size(f"--eval-problems {config.eval_problems}", config.eval_problems, task, "test")


# ---- the stages: each is an ordinary run ----


def toy_task(config: ChatGPTConfig) -> TaskFlags:
    """The numbers game that the demo's base knows."""
    return TaskFlags(name="countdown", options=(*TASK_OPTIONS, f"seed={config.seed}"))


def base_folder(config: ChatGPTConfig, folder: Path) -> str:
    """Where fine-tuning begins."""
    return config.base or str(folder / "base")


def pretrain_config(config: ChatGPTConfig, folder: Path) -> RunConfig:
    """Pretraining from random weights, as in the demo."""
    demo = DemoConfig(
        documents=config.documents,
        model=config.model,
        pretrain_steps=config.pretrain_steps,
        max_new_tokens=MAX_NEW_TOKENS,
        device=config.device,
    )
    return base_config(demo, folder / "base", config.seed)


def sft_config(config: ChatGPTConfig, folder: Path) -> SFTConfig:
    """Fine-tuning of the base on demonstrations."""
    return SFTConfig(
        run=str(folder / "sft"),
        base=base_folder(config, folder),
        data=(str(folder / "demonstrations.jsonl"),),
        steps=config.sft_steps,
        batch_tokens=2048,
        optim=OptimConfig(lr=5e-4, warmup=5, weight_decay=0.0),
        seed=config.seed,
        device=config.device,
    )


def rm_config(config: ChatGPTConfig, folder: Path, name: str) -> RewardModelConfig:
    """The reward model "rm" of all rankings, or "rm_few" of a few, gone over again and again."""
    is_few = name == "rm_few"
    return RewardModelConfig(
        run=str(folder / name),
        base=str(folder / "sft"),
        data=(str(folder / ("few_rankings.jsonl" if is_few else "rankings.jsonl")),),
        steps=min(FEW_STEPS, config.rm_steps) if is_few else config.rm_steps,
        held_out=0.25 if is_few else 0.1,
        noise=config.noise,
        seed=config.seed,
        device=config.device,
    )


def ppo_config(config: ChatGPTConfig, folder: Path, name: str) -> GRPOConfig:
    """PPO from the fine-tuned model: "ppo" with everything, or "ppo_few" without a bridle."""
    is_few = name == "ppo_few"
    optim = replace(rl_optim(4e-4), eps=1e-8)
    return grpo_config(
        "ppo",
        run=str(folder / name),
        base=str(folder / "sft"),
        task=toy_task(config),
        steps=config.ppo_steps,
        save_every=config.ppo_steps // POINTS,
        keep_last=2 * POINTS,
        max_new_tokens=MAX_NEW_TOKENS,
        updates_per_step=4,
        micro_tokens=MICRO_TOKENS,
        rewards=RewardConfig(
            accuracy_weight=0.0,
            format_weight=0.0,
            model=str(folder / ("rm_few" if is_few else "rm")),
        ),
        loss={"kl_coef": 0.0 if is_few else config.kl},
        optim=optim,
        critic_optim=replace(optim, lr=1e-3),
        seed=config.seed,
        device=config.device,
    )


def arms_of(config: ChatGPTConfig) -> Arms:
    """(reward model, PPO) of each arm."""
    return [("rm", "ppo"), ("rm_few", "ppo_few")] if config.few else [("rm", "ppo")]


# ---- texts: demonstrations and rankings ----


def write_demonstrations(config: ChatGPTConfig, path: Path) -> None:
    """Answers of careful authors to training problems."""
    task, lines = toy_task(config).make(), []
    assert isinstance(task, Countdown)
    for index in range(N_DEMONSTRATIONS):
        prompt, response = document(task, index, CAREFUL, config.seed + DEMONSTRATIONS)
        lines.append(json.dumps({"prompt": prompt, "response": response}) + "\n")
    atomic_write_text(path, "".join(lines))


def write_rankings(config: ChatGPTConfig, folder: Path, results: PartResults) -> None:
    """The fine-tuned model's answers to training problems, ranked."""
    started = time.perf_counter()
    model, tokenizer, _ = load_model(str(folder / "sft"), pick_device(config.device))
    task = toy_task(config).make()
    # Not the problems of the demonstrations, whose answers the model may know by heart.
    problems = task.problems("train", config.rankings, start=N_DEMONSTRATIONS)
    say(f"sampling and ranking {config.answers} answers to each of {config.rankings:,} problems")
    engine = Engine(model, tokenizer)
    seed = seed_of(config, RANKING)
    sampled = sample_answers(engine, task, problems, config.answers, MAX_NEW_TOKENS, seed)
    lines = ranking_lines(task, sampled)
    atomic_write_text(folder / "rankings.jsonl", "".join(lines))
    lengths = sampled.response_lengths
    results.add_sampled("rankings", str(folder / "sft"), int(lengths.sum()), len(lengths))
    results.add_seconds("rankings", time.perf_counter() - started)


def write_few_rankings(config: ChatGPTConfig, folder: Path) -> None:
    """The first of the rankings, for the second reward model. Raises ValueError if they are too few
    for it, which is known now, and not only after the first PPO."""
    lines = (folder / "rankings.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    prompts = [json.loads(line)["prompt"] for line in lines]
    enough = enough_to_split(prompts, rm_config(config, folder, "rm_few").held_out)
    if enough is None:
        raise ValueError(
            f"--few is {config.few}, but all {len(lines)} rankings are too few to hold some out; "
            "give --few 0 with --resume, or more --rankings in another --run"
        )
    if config.few < enough:
        raise ValueError(
            f"--few is {config.few}, and so few rankings do not give a reward model something to "
            f"train on and something to measure on; add --resume, and give 0, or {enough} or more"
        )
    atomic_write_text(folder / "few_rankings.jsonl", "".join(lines[: config.few]))


def seed_of(config: ChatGPTConfig, purpose: int) -> int:
    """A seed of its own for each purpose."""
    return 10 * config.seed + purpose


# ---- the whole ----


def stages_of(config: ChatGPTConfig, folder: Path) -> list[Stage]:
    """The stages in order."""
    stages = []
    if config.base is None:
        stages.append(Stage("base", pretrain, pretrain_config(config, folder)))
    stages.append(Stage("sft", sft, sft_config(config, folder)))
    for judge, ppo in arms_of(config):
        stages.append(Stage(judge, reward_model, rm_config(config, folder, judge)))
        stages.append(Stage(ppo, grpo, ppo_config(config, folder, ppo)))
    return stages


def check_same(config: ChatGPTConfig, folder: Path) -> None:
    """Raise ValueError or CheckpointError unless what was begun in the folder has these flags.

    --few may be another until something was made or measured with it.
    """
    for stage in stages_of(config, folder):
        check_part(stage.config)
    values = PartResults(folder, {}).values
    if not any(folder.glob("*/checkpoints/step_*")):
        return
    then = values.get("config", {})
    is_few_begun = bool(checkpoint_steps(folder / "rm_few")) or "points" in values
    free = FREE if is_few_begun else (*FREE, "few")
    for name, now in asdict(config).items():
        if name not in free and now != then.get(name, now):
            raise ValueError(
                f"--{name.replace('_', '-')} is {now}, but {folder} was made with {then[name]}; "
                "give that, or another --run"
            )


def chatgpt(config: ChatGPTConfig) -> Path:
    """Run everything that is not done yet; returns the path of results.json.

    Raises ValueError if the base is not there, or if the folder already holds a recipe and --resume
    was not given, or one that was made with other flags, and Stopped after Ctrl-C.
    """
    reuse_memory()
    folder = Path(config.run)
    check_not_begun(folder, config.resume)
    if config.base is not None and not Path(config.base).exists():
        raise ValueError(
            f"--base {config.base} does not exist; give the folder of a base that the demo has "
            "pretrained, or leave it out to pretrain one"
        )
    pick_device(config.device)
    check_same(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = PartResults(folder, {})
    results.values |= {"config": asdict(config), "machine": describe_machine()}
    started = time.perf_counter()

    # 1. to 6. Each stage is a run; rankings are made once there is a model to rank.
    write_demonstrations(config, folder / "demonstrations.jsonl")
    for stage in stages_of(config, folder):
        if stage.name == "rm" and not (folder / "rankings.jsonl").exists():
            write_rankings(config, folder, results)
        if stage.name == "rm" and config.few:
            write_few_rankings(config, folder)
        results.add_seconds(stage.name, run_stage(stage))

    # Then the policies, checkpoint by checkpoint, and the best of n.
    measured = time.perf_counter()
    task, device = toy_task(config).make(), pick_device(config.device)
    problems = task.problems("test", config.eval_problems)
    seed = seed_of(config, MEASURING)
    evaluator = Evaluator(folder, task, problems, MAX_NEW_TOKENS, seed, device)
    measure_all(evaluator, arms_of(config), results)
    results.add_sampled("measuring", str(folder / "sft"), evaluator.n_tokens, evaluator.n_answers)
    results.add_seconds("measuring", time.perf_counter() - measured)
    path = folder / "over_optimisation.png"
    picture = plot_distance(arms_of(config), results.values, path)
    seconds = time.perf_counter() - started
    shown = table(results.values["points"])
    show(f"\n{shown}\n\n{results.path}, {picture}   ({seconds:.0f} seconds)")
    return results.path
