"""README keeps its word: its commands run, its names exist, and the lines that it explains are in the code.

The commands run at toy size, one after another in an empty folder, as a reader would type them. Every rule is
first shown to complain about a breach."""
import ast
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from r1zero.model.config import preset
from r1zero.model.huggingface import write_model
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl import naive
from r1zero.rl.family import PRESETS
from r1zero.train.cli.main import COMMANDS, command_of, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LESSON = "train/recipes/minimal.md"
PAGES = ["README.md", "benchmarks/README.md", "LOG.md", LESSON]  # their links are held against the tree


# ---- what a page holds ----

def fenced_blocks(text: str) -> list[tuple[str, list[str]]]:
    """(language, lines) of each fenced block."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(language, block.splitlines()) for language, block in found]


def plain_lines(text: str) -> list[str]:
    """The lines of all blocks without a language, which hold commands, without their comments."""
    return [line.partition(" # ")[0] for language, lines in fenced_blocks(text) if not language
            for line in lines]


def prose_of(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    """What stands in backticks within the prose; one that is broken over two lines is put together."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(text))]


def links_of(text: str) -> list[tuple[str, str]]:
    """(text, target) of each link that does not leave the repository."""
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose_of(text))
    return [(" ".join(words.split()), target) for words, target in found if "://" not in target]


def commands_of(text: str) -> list[list[str]]:
    """The words of each line of a fenced block that calls r1zero, in order. `make demo` calls it too."""
    lines = [line.strip() for _, lines in fenced_blocks(text) for line in lines]
    words = [shlex.split(line, comments=True) for line in lines
             if re.match(r"(r1zero|python -m r1zero\S*|make demo)\s", f"{line} ")]
    return [["r1zero", "demo"] if line[:2] == ["make", "demo"] else line for line in words]


# ---- the commands, at toy size ----

TINY_STEP = {"--prompts-per-step": "2", "--group-size": "2", "--max-new-tokens": "6"}
TOY = {  # command: the settings that make it small, instead of README's or beside them
    "demo": {"--model": "tiny", "--documents": "60", "--pretrain-steps": "2", "--rl-steps": "1",
             "--control-steps": "1", "--eval-problems": "4", "--eval-samples": "2", "--max-new-tokens": "6",
             "--device": "cpu"},
    "recipe minimal": {"--model": "tiny", "--documents": "60", "--pretrain-steps": "2", "--sft-steps": "2",
                       "--rl-steps": "1", "--eval-problems": "4", "--device": "cpu"},
    "r1": {"--model": "tiny", "--documents": "300", "--pretrain-steps": "40", "--zero-steps": "1",
           "--cold-steps": "2", "--reasoning-steps": "1", "--tuned-steps": "2", "--reward-steps": "2",
           "--all-steps": "4", "--collect-problems": "8", "--eval-problems": "2", "--eval-samples": "2",
           "--keep": "all", "--max-new-tokens": "60", "--device": "cpu"},
    "pretrain": {"--model": "tiny", "--documents": "60", "--batch-tokens": "256", "--seq-len": "16",
                 "--vocab-size": "280", "--steps": "2", "--device": "cpu"},
    "sft": {"--steps": "2", "--device": "cpu"},
    "grpo": {"--steps": "2", "--device": "cpu", **TINY_STEP},
    "collect": {"--problems": "2", "--samples": "2", "--keep": "all", "--max-new-tokens": "6",
                "--device": "cpu"},
    "reward-model": {"--steps": "2", "--device": "cpu"},
    "process-reward": {"--steps": "2", "--held-out": "0.5", "--device": "cpu"},
    "compare": {"--steps": "2", "--device": "cpu", **TINY_STEP},
    "diagnose": {},
    "show": {"--step": "4"},
    "eval": {"--n": "2", "--samples": "2", "--max-new-tokens": "6", "--device": "cpu"},
    "grade": {},
    "chat": {"--max-new-tokens": "6", "--device": "cpu"},
    "export": {},
    "card": {},
    "plan": {},
}
TOY_PAGE = {"STEPS": 1, "PROBLEMS_PER_STEP": 1, "GROUP_SIZE": 2, "MAX_NEW_TOKENS": 2}  # of rl/naive.py
OWN = re.search(r"^## Your own task.*?(?=^## )", README, re.MULTILINE | re.DOTALL)[0]  # shows two files


def shown(language: str) -> str:
    """The one block in this language that the section shows."""
    [lines] = [lines for found, lines in fenced_blocks(OWN) if found == language]
    return "".join(f"{line}\n" for line in lines)


FILES = {  # what the commands read
    "my.jsonl": shown("json") + "".join(f'{{"prompt": "Capital {i}? ", "answer": 1}}\n' for i in range(20)),
    "my_rewards.py": shown("python"),
    "facts.jsonl": '{"text": "Capital of Chile? <think>in America</think><answer>Santiago</answer>"}\n' * 9,
    "solved.jsonl": '{"text": "Question: 1+1? <think>1+1=2</think><answer>2</answer>"}\n' * 9,
    "gsm8k_train.jsonl": '{"question": "One hen lays 3 eggs. How many?", "answer": "#### 3"}\n' * 2,
    "plays.txt": "To be, or not to be: that is the question. " * 40,
    "rankings.jsonl": "".join(f'{{"prompt": "{i}? ", "answers": ["yes", "no"], "ranks": [1, 2]}}\n'
                              for i in range(30)),
    "pairs.jsonl": '{"prompt": "Who is there?", "response": "Nay, answer me."}\n' * 2,
    "gsm8k_test.jsonl": '{"question": "Two hens lay 3 eggs each. How many?", "answer": "#### 6"}\n' * 2,
    "math500.jsonl": '{"problem": "What is half of three?", "answer": "1.5"}\n' * 2,
    "responses.jsonl": json.dumps({"numbers": [3, 7, 9], "target": 13, "response": "<answer>9+7-3</answer>"}),
}


def make_open_model(folder: Path) -> None:
    """A folder in Hugging Face's layout, of random weights, with room for worked examples in bytes."""
    config = preset("tiny", 258, max_seq_len=1024, rope_theta=10_000.0)
    write_model(folder, Transformer(config).init_weights(0), Tokenizer.bytes())


def toy_size(words: list[str]) -> list[str]:
    """The command with toy settings. Raises AssertionError for one that has none here."""
    command, _ = command_of(words[1:])
    assert command in TOY, f"README has `{' '.join(words)}`, but TOY in this test lacks {command!r}; add it"
    settings = dict(TOY[command])
    if any(word.startswith("depth=") for word in words):
        del settings["--model"]  # README wants its longer context
    if "demo-moe" in words:
        settings["--model"] = "tiny-moe"
    if "--resume" in words and "--steps" in words:
        settings["--steps"] = "4"  # a resumed run has something left to do
    small = list(words)
    for flag, value in settings.items():
        if flag in small:
            small[small.index(flag) + 1] = value
        else:
            small += [flag, value]
    return small


def run(words: list[str]) -> int:
    """Run a command of README in this process; returns its exit code."""
    if words[0] == "r1zero":
        return main(toy_size(words)[1:])
    assert words[:3] == ["python", "-m", "r1zero.rl.naive"], f"README has `{' '.join(words)}`: unknown here"
    naive.main(*words[3:])
    return 0


@pytest.mark.parametrize("page", ["README.md", LESSON])
def test_the_commands_run_in_order(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")  # trains the tokenizer of `--data plays.txt`
    monkeypatch.chdir(tmp_path)
    for name, value in TOY_PAGE.items():
        monkeypatch.setattr(naive, name, value)
    for name, content in FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    make_open_model(Path("models/SmolLM2-135M-Instruct"))
    for words in commands_of((ROOT / page).read_text(encoding="utf-8")):
        code = run(words)
        error = capsys.readouterr().err
        assert code == 0, f"`{' '.join(words)}` ends with {code}: {error[-400:]}"


def test_commands_of_a_made_up_page():
    page = ("Text with `r1zero inline`.\n```\nmake demo   # first\nmake test\n"
            "r1zero chat --problem \"3 7 -> 10\"   # with a comment\n```\n"
            "```\npython -m r1zero.rl.naive base\npython -m other\nr1zeroes\n```\n")
    assert commands_of(page) == [["r1zero", "demo"], ["r1zero", "chat", "--problem", "3 7 -> 10"],
                                 ["python", "-m", "r1zero.rl.naive", "base"]]
    assert toy_size(["r1zero", "sft", "--steps", "500", "--data", "x"]) == [
        "r1zero", "sft", "--steps", "2", "--data", "x", "--device", "cpu"]
    assert toy_size("r1zero grpo --steps 160 --resume".split())[2:5] == ["--steps", "4", "--resume"]
    with pytest.raises(AssertionError, match="`r1zero fly --far`, but TOY .* lacks 'fly'"):
        toy_size("r1zero fly --far".split())
    with pytest.raises(AssertionError, match="unknown here"):
        run("python -m r1zero.rl.other base".split())


# ---- the names ----

def is_repository_path(span: str) -> bool:
    """Whether a word in backticks can only mean a file or folder of this repository."""
    if not re.fullmatch(r"[\w./-]+", span):
        return False
    suffix, first = Path(span).suffix, span.split("/")[0]
    known_folder = "/" in span and (ROOT / first).is_dir()
    return suffix in (".py", ".md") or (known_folder and not suffix)


def missing_paths(text: str, folder: Path) -> list[str]:
    """Links (from the page's folder) and paths in backticks (from the root, too) that lead nowhere."""
    targets = [target.partition("#")[0] for _, target in links_of(text)]
    bad = [f"link to {target}" for target in targets if target and not (folder / target).exists()]
    spans = [span for span in code_spans(text) if is_repository_path(span)]
    return bad + [f"`{span}`" for span in spans if not ((ROOT / span).exists() or (folder / span).exists())]


def top_level_names(source: str) -> set[str]:
    """Functions, classes and variables that a module defines at its top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing_definitions(text: str, folder: Path) -> list[str]:
    """Links like [`name`](path.py) whose file does not define the name at its top level."""
    bad = []
    for words, target in links_of(text):
        name = words.strip("`")
        is_name = words == f"`{name}`" and name.isidentifier() and target.endswith(".py")
        if is_name and name not in top_level_names((folder / target).read_text(encoding="utf-8")):
            bad.append(f"{name} in {target}")
    return bad


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose_of(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def missing_anchors(text: str, folder: Path) -> list[str]:
    """Links to a heading of a page that has none of that name."""
    bad = []
    for _, target in links_of(text):
        path, _, anchor = target.partition("#")
        page = (folder / path).read_text(encoding="utf-8") if path and anchor else text
        if anchor and anchor not in anchors_of(page):
            bad.append(target)
    return bad


def missing_modules(text: str) -> list[str]:
    """Dotted names of our packages, in code, that are neither a module nor a folder."""
    names = {name for code in [*code_spans(text), *plain_lines(text)]
             for name in re.findall(r"\b(?:r1zero|benchmarks)(?:\.[a-z]\w*)+(?![\w./*])", code)}
    bad = []
    for name in sorted(names):
        path = ROOT / name.removeprefix("r1zero.").replace(".", "/")
        if not (path.is_dir() or path.with_suffix(".py").exists()):
            bad.append(name)
    return bad


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def missing_targets(text: str) -> list[str]:
    """Words after `make`, in code, that the Makefile does not know."""
    code = [*code_spans(text), *plain_lines(text)]
    named = {name for line in code for name in re.findall(r"^\s*make ([\w-]+)", line)}
    return sorted(named - make_targets())


@pytest.mark.parametrize("page", PAGES)
def test_every_link_path_and_name_leads_somewhere(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    assert missing_paths(text, folder) == []
    assert missing_definitions(text, folder) == []
    assert missing_anchors(text, folder) == []
    assert missing_modules(text) == []
    assert missing_targets(text) == []


PAGE = """# Some page, by us

See [`grpo_step`](rl/step.py), [the step](rl/step.py), [here](#some-page-by-us), `rl/naive.py`, `make
test`, [there](https://example.org/rl/no.py), `r1zero.rl.naive`, `runs/base/report.html`, `metrics.jsonl`.
"""


@pytest.mark.parametrize("rule, right, wrong", [
    (missing_paths, "(rl/step.py)", "(rl/stop.py)"), (missing_paths, "`rl/naive.py`", "`rl/knave.py`"),
    (missing_paths, "`rl/naive.py`", "`rl/naive`"), (missing_paths, "`rl/naive.py`", "`el/naive.py`"),
    (missing_definitions, "`grpo_step`", "`grpo_stop`"), (missing_anchors, "#some-page-by-us", "#some-page"),
    (missing_anchors, "(#some-page-by-us)", "(benchmarks/README.md#nothing)"),
    (missing_modules, "`r1zero.rl.naive`", "`r1zero.rl.knave`"), (missing_targets, "test`", "tea`"),
])
def test_each_rule_of_names_complains(rule, right, wrong):
    folder = [ROOT] if rule in (missing_paths, missing_definitions, missing_anchors) else []
    broken = PAGE.replace(right, wrong, 1)
    assert broken != PAGE and rule(PAGE, *folder) == [] and len(rule(broken, *folder)) == 1


def test_the_table_of_the_family_has_each_preset_once():
    table = re.search(r"^\| `--algo` .*?\n\n", README, re.MULTILINE | re.DOTALL)[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(PRESETS)


# ---- the flags ----

def options_of(command: str) -> set[str]:
    """The options of a command, from its --help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main([command, "--help"]) == 0
    return set(re.findall(r"(?:^[│| ]*|, )(--[\w.-]+)", text.getvalue(), re.MULTILINE))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    return {command: options_of(command) for command in COMMANDS}


def unknown_options(text: str, options: dict[str, set[str]]) -> list[str]:
    """Flags in code that the command beside them does not have; where there is none, that no command has."""
    bad = []
    for code in [*code_spans(text), *plain_lines(text)]:
        words = re.search(r"\br1zero ([a-z][a-z0-9-]*) ?([a-z0-9.-]*)", code)
        command = command_of(list(words.groups()))[0] if words else None
        if command and command not in options:
            bad.append(code)
            continue
        known = options[command] if command else set().union(*options.values())
        flags = re.findall(r"(?<!\S)--[a-z][\w.-]*", code)
        bad += [f"{flag} in `{code}`" for flag in flags if flag not in known]
    return bad


@pytest.mark.parametrize("page", ["README.md", LESSON])
def test_every_flag_is_an_option_of_its_command(page, options):
    assert unknown_options((ROOT / page).read_text(encoding="utf-8"), options) == []


def test_the_rule_of_flags_complains():
    options = {"grpo": {"--run", "--loss.clip-high"}, "demo": {"--seeds", "--help"}}
    page = "`r1zero grpo --run x`, `--seeds`, `--help`.\n```\nr1zero demo --seeds 0   # --other\n```\n"
    assert unknown_options(page, options) == []
    for right, wrong in (("grpo --run", "grpo --seeds"), ("`--seeds`", "`--seed`"),
                         ("demo --seeds", "demo --run"), ("r1zero grpo", "r1zero gro")):
        assert len(unknown_options(page.replace(right, wrong, 1), options)) == 1, wrong


# ---- the page that README explains line by line ----

def explained_lines(text: str) -> list[str]:
    """The lines of Python in the section "How GRPO works"."""
    section = re.search(r"^## How GRPO works\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    blocks = [lines for language, lines in fenced_blocks(section) if language == "python"]
    return [line.strip() for lines in blocks for line in lines]


def lines_not_in(source: str, lines: list[str]) -> list[str]:
    present = {line.strip() for line in source.splitlines()}
    return [line for line in lines if line not in present]


def test_the_explained_lines_stand_in_the_naive_page():
    lines = explained_lines(README)
    assert len(lines) >= 5 and lines_not_in((ROOT / "rl/naive.py").read_text(encoding="utf-8"), lines) == []


def test_a_line_that_has_changed_is_noticed():
    page = "## How GRPO works\n```python\na = 1\n```\n```\nb\n```\n## Next\n```python\nc\n```\n"
    assert explained_lines(page) == ["a = 1"]
    assert lines_not_in("def f():\n    a = 1\n", ["a = 1"]) == []
    assert lines_not_in("def f():\n    a = 2\n", ["a = 1"]) == ["a = 1"]
