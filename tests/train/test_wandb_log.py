"""wandb informs: it is refused early, in one line; it never ends a run; a resumed run continues its own."""
import json
import sys
from types import SimpleNamespace

import pytest

from r1zero.train.grpo import grpo
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.wandb_log import table_rows

from .loop_cases import grpo_config, pretrain_config, save_base, text_file
from .run_cases import fails, kept_samples, outcome


class FakeWandb(SimpleNamespace):
    """Enough of wandb: it notes what it is told, and raises `errors` by the name of the call."""

    def __init__(self, **errors):
        super().__init__(errors=errors, started=[], logged=[], finished=[], tables={})

    def _maybe_raise(self, call: str):
        if call in self.errors:
            raise self.errors[call]

    def init(self, **options):
        self._maybe_raise("init")
        self.started.append(options)
        return SimpleNamespace(id=options["id"] or f"id{len(self.started)}", log=self.log, finish=self.finish)

    def log(self, metrics, step):
        self._maybe_raise("log")
        self.logged.append(step)
        if "samples" in metrics:
            self.tables[step] = metrics["samples"]

    def Table(self, columns, data):  # noqa: N802 (wandb's name)
        self._maybe_raise("Table")
        return [dict(zip(columns, row, strict=True)) for row in data]

    def finish(self, exit_code):
        self._maybe_raise("finish")
        self.finished.append(exit_code)


@pytest.fixture
def use(monkeypatch):
    """Put a stand-in where `import wandb` finds it."""
    def put(fake):
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake
    return put


def config(tmp_path, **changes):
    changes = {"wandb": True, "steps": 4, **changes}
    return pretrain_config(tmp_path / "run", text_file(tmp_path), **changes)


@pytest.mark.parametrize("error, said", [
    (RuntimeError("api_key not configured (no-tty).\ncall wandb.login()"), "api_key not configured"),
    (ConnectionError("Run initialization has timed out after 90.0 sec."), "timed out after 90"),
    (ValueError("API key must be 40 characters long, yours was 3"), "40 characters"),
    (AssertionError(), "AssertionError"),
])
def test_a_wandb_that_cannot_start_is_told_before_anything_is_computed(tmp_path, use, error, said):
    use(FakeWandb(init=error))
    with fails(ValueError, f"--wandb: wandb cannot start: .*{said}.*wandb login.*WANDB_MODE=offline"):
        pretrain(config(tmp_path))
    assert not (tmp_path / "run/run.json").exists()
    pretrain(config(tmp_path, wandb=False))  # the corrected command just works
    assert len(read_metrics(tmp_path / "run")) == 4


def test_a_missing_wandb_is_told_with_what_to_install(tmp_path, use):
    use(None)  # what Python takes for a module that cannot be imported
    with fails(ValueError, "--wandb needs the package wandb .*pip install wandb, or leave it out"):
        pretrain(config(tmp_path))


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("service died"),
                                   ValueError("step must be larger")])
def test_a_wandb_that_dies_on_the_way_ends_nothing_and_is_told_once(tmp_path, use, capsys, error):
    use(FakeWandb(log=error, finish=error))
    pretrain(config(tmp_path))
    said = capsys.readouterr().err
    assert said.count("the run goes on without it, metrics.jsonl has all rows") == 1
    assert said.count("wandb could not finish") == 1
    plain = pretrain_config(tmp_path / "plain", text_file(tmp_path), steps=4)
    pretrain(plain)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")


def test_grpo_sends_a_table_of_one_group_every_tenth_step_or_with_each_evaluation(tmp_path, use):
    base = save_base(tmp_path / "base")
    for changes, steps in ((dict(steps=11), [10]), (dict(steps=5, eval_every=2, eval_problems=4), [2, 4]),
                           (dict(steps=2, eval_every=1, eval_problems=4, keep_rollouts=0), [])):
        fake, run = use(FakeWandb()), tmp_path / f"run{len(steps)}"
        grpo(grpo_config(run, base, wandb=True, **changes))
        assert list(fake.tables) == steps and fake.logged == list(range(1, changes["steps"] + 1))
        for step, rows in fake.tables.items():
            assert len(rows) == 4 and len({row["prompt"] for row in rows}) == 1
            advantages = [row["advantage"] for row in rows]
            assert advantages == sorted(advantages, reverse=True) and advantages[0] > 0
            kept = [sample for sample in kept_samples(run) if sample["step"] == step]
            assert {row["response"] for row in rows} <= {sample["response"] for sample in kept}
            assert rows[0]["tokens"] == 3 and rows[0]["finish_reason"] == "length" and rows[0]["why"]


def test_a_group_that_teaches_nothing_is_sent_where_there_is_no_other():
    samples = [dict(prompt="p", response=f"{n}", reward=0.0, advantage=advantage, finish_reason="stop",
                    why="w", tokens=[1], group=group) for n, (group, advantage)
               in enumerate([(1, 0.0), (1, 0.0), (2, None), (2, None)])]
    assert [row[1] for row in table_rows(samples)] == ["0", "1"]
    samples[3]["advantage"] = 0.5
    assert [row[1] for row in table_rows(samples)] == ["3", "2"]


def test_a_table_is_in_the_order_in_which_show_prints_the_group():
    samples = [dict(prompt="p", response=f"{n}", reward=reward, advantage=advantage, finish_reason="stop",
                    why="w", tokens=[1], group=1)
               for n, (reward, advantage) in enumerate([(0.0, 0.5), (1.0, 0.5), (0.2, None), (0.4, 0.7)])]
    assert [row[1] for row in table_rows(samples)] == ["3", "1", "0", "2"]


def test_a_table_that_cannot_be_made_ends_nothing(tmp_path, use, capsys):
    use(FakeWandb(Table=RuntimeError("too large")))
    grpo(grpo_config(tmp_path / "run", save_base(tmp_path / "base"), wandb=True, eval_every=1,
                     eval_problems=4, steps=2))
    assert capsys.readouterr().err.count("wandb failed (too large); the run goes on without it") == 1
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_resumed_run_continues_its_wandb_run_and_another_has_its_own(tmp_path, use):
    fake = use(FakeWandb())
    pretrain(config(tmp_path, steps=2))
    pretrain(config(tmp_path, steps=4, resume=True))
    other = pretrain_config(tmp_path / "other", text_file(tmp_path), steps=2, wandb=True, resume=True)
    pretrain(other)
    assert [options["id"] for options in fake.started] == [None, "id1", None]
    assert fake.logged == [1, 2, 3, 4, 1, 2] and fake.finished == [0, 0, 0]
    assert fake.started[0]["name"] == "run" and json.dumps(fake.started[0]["config"])
