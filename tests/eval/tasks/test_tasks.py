"""Generators: exact counts, disjoint splits, determinism, and that every problem can be solved and graded."""
from itertools import combinations_with_replacement, islice, permutations

import pytest

from r1zero.eval.tasks.arithmetic import Arithmetic
from r1zero.eval.tasks.base import is_held_out, permutation, stable_hash
from r1zero.eval.tasks.catalogue import make_task
from r1zero.eval.tasks.countdown import (
    Countdown,
    CountdownProblem,
    parse_prompt,
    reachable,
    solve,
)
from r1zero.eval.tasks.expression import parse_expression


def brute_force(numbers, ops):
    """All values by merging any two numbers until one is left: another algorithm than the solver's table."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for a, b, *rest in set(permutations(numbers)):
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}
        for op in ops:
            if results[op] >= 0:
                values |= brute_force((results[op], *rest), ops)
    return values


@pytest.mark.parametrize(("high", "count"), [(9, 550), (20, 5640)])
def test_number_of_problems(high, count):
    """Multisets of three numbers times the different targets from 1 up that + and - reach."""
    task = Countdown(high=high)
    assert task.size("train") + task.size("test") == count
    assert high != 20 or task.size("test") >= 1000


@pytest.mark.parametrize(("numbers", "ops"), [((3, 7, 9), "+-"), ((2, 5, 5, 8), "+-*/"), ((1, 4, 6), "-/")])
def test_reachable_against_brute_force(numbers, ops):
    reached = reachable(numbers, ops)
    assert set(reached) == brute_force(numbers, ops)
    for value, text in reached.items():
        assert parse_expression(text)[0] == value
        assert sorted(parse_expression(text)[1]) == sorted(numbers)


def test_reachable_counts_and_limits():
    assert len(reachable((2, 3, 5), whole=False)) < 68 == len(reachable((10007, 20011, 40009), whole=False))
    assert 24 not in reachable((3, 3, 8, 8)) and 24 in reachable((3, 3, 8, 8), whole=False)
    with pytest.raises(ValueError, match="1 to 6 numbers, got 7"):
        reachable((1,) * 7)


def test_all_solutions_of_small_problems():
    assert sorted(solve(CountdownProblem((3, 7, 9), 13), "+-")) == sorted(
        ["(9-3)+7", "7+(9-3)", "(7-3)+9", "9+(7-3)", "(7+9)-3", "(9+7)-3"]
    )
    assert list(solve(CountdownProblem((4, 4), 8), "+")) == ["4+4"]  # equal numbers: no text twice
    assert list(solve(CountdownProblem((4, 4), 5), "+-")) == []
    assert list(solve(CountdownProblem((3, 3, 8, 8), 24), whole=False)) == ["8/(3-(8/3))"]


@pytest.mark.parametrize("options", [{"high": 9}, {"high": 12, "ops": "+-*/", "max_target": 30}])
def test_listed_splits_are_disjoint_and_complete(options):
    task = Countdown(**options)
    n_train, n_test = task.size("train"), task.size("test")
    train = [problem.key for problem in task.problems("train", n_train)]
    test = [problem.key for problem in task.problems("test", n_test)]
    assert len(set(train)) == n_train and len(set(test)) == n_test  # one epoch holds every problem once
    assert not set(train) & set(test)
    every = {
        (numbers, target)
        for numbers in combinations_with_replacement(range(task.low, task.high + 1), task.n_numbers)
        for target in brute_force(numbers, task.ops)
        if 1 <= target <= task.max_target
    }
    assert set(train) | set(test) == every


def key_of(problem):
    """What splits must not share; for arithmetic without order, so that 17+25 and 25+17 stay together."""
    if isinstance(problem, CountdownProblem):
        return problem.key
    text = problem.expression
    return sorted(text.translate(TO_SPACES).split()), sorted(set("+-*") & set(text))


TO_SPACES = str.maketrans("+-*", "   ")
DRAWN = [Countdown(n_numbers=4, high=11), Countdown(n_numbers=6, ops="+-*/"), Arithmetic()]


@pytest.mark.parametrize("task", DRAWN)
def test_drawn_splits_are_disjoint(task):
    train, test = ({repr(key_of(p)) for p in task.problems(split, 400)} for split in ("train", "test"))
    assert len(train) > 200 and len(test) > 200 and not train & test
    assert task.size("train") is None


def test_drawn_problems_have_whole_solutions():
    for options in ({"n_numbers": 4, "high": 50, "ops": "+-*/"}, {"n_numbers": 5, "ops": "-/"}):
        task = Countdown(**options)
        for problem in task.problems("train", 20) + task.problems("test", 20):
            assert 1 <= problem.target <= task.max_target
            assert all(task.low <= number <= task.high for number in problem.numbers)
            assert problem.target in reachable(problem.numbers, task.ops)


def test_a_sampled_problem_uses_all_of_its_numbers_where_an_operation_can_be_impossible():
    """Divisions alone often get stuck with numbers left over; what is left then is no target."""
    task = Countdown(ops="/", low=1, high=40, max_target=40)
    assert task.size("train") is None
    for problem in task.problems("train", 40) + task.problems("test", 40):
        assert problem.target in reachable(problem.numbers, "/")


def test_problems_are_a_function_of_seed_split_and_index():
    for make in (Countdown, Arithmetic, lambda seed: Countdown(n_numbers=5, seed=seed)):
        task, again, other = make(seed=1), make(seed=1), make(seed=2)
        assert task.problems("train", 50)[30:] == again.problems("train", 20, start=30)
        assert task.problems("train", 50) != other.problems("train", 50)
        assert task.problems("test", 50) == other.problems("test", 50)  # whatever the seed


def test_the_split_never_changes():
    """Another hash would leak test problems of a published base into training."""
    assert stable_hash("split", (1, 2)) % 1000 == 371 and permutation(5, 0) == (1, 2, 3, 0, 4)
    assert [Countdown().prompt(p) for p in Countdown().problems("test", 2)] == ["20 16 3 -> 1", "1 8 7 -> 2"]


def test_epochs_differ_and_numbers_are_shuffled():
    task = Countdown(high=9)
    n = task.size("train")
    first, second = ([p.key for p in task.problems("train", n, start)] for start in (0, n))
    assert set(first) == set(second) and first != second
    unsorted = sum(list(p.numbers) != sorted(p.numbers) for p in task.problems("train", n))
    assert 0.6 < unsorted / n < 0.95  # 5 of 6 orders are unsorted, fewer where numbers repeat


def test_a_problem_is_held_out_for_every_setting():
    small, large = Countdown(high=9), Countdown(high=20, seed=5)
    held_out = {problem.key for problem in large.problems("test", large.size("test"))}
    assert {problem.key for problem in small.problems("test", small.size("test"))} <= held_out
    assert all(is_held_out(key, 0.3) for key in held_out)


def is_right(text, problem):
    try:
        value, numbers = parse_expression(text)
    except ValueError:
        return False
    return value == problem.target and sorted(numbers) == sorted(problem.numbers)


@pytest.mark.parametrize("task", [Countdown(ops="+-*/"), Countdown(n_numbers=4, high=9, max_target=20)])
def test_solver_and_grader_agree(task):
    """Every solution earns 1; with an operator changed or a piece lost it earns what it is worth."""
    for problem in task.problems("test", 25):
        solutions = list(islice(solve(problem, task.ops), 20))
        assert solutions
        for text in solutions:
            assert task.grade(problem, f"<think>x</think><answer>{text}</answer>").accuracy == 1.0
            for i, char in enumerate(text):
                changed = text[:i] + {"+": "-", "-": "+", "*": "/", "/": "*"}.get(char, "") + text[i + 1 :]
                accuracy = task.grade(problem, f"<answer>{changed}</answer>").accuracy
                assert accuracy == float(is_right(changed, problem)), changed
            other = CountdownProblem(problem.numbers, problem.target + 1)
            assert task.grade(other, f"<answer>{text}</answer>").accuracy == 0.0
            assert task.grade(problem, f"<answer>{text}+{problem.numbers[0]}</answer>").accuracy == 0.0
            assert task.grade(problem, f"<answer>{text}+0</answer>").accuracy == 0.0


@pytest.mark.parametrize("task", [Arithmetic(n_operands=3, ops="+-*"), Arithmetic(digits=9)])
def test_arithmetic_answers(task):
    for problem in task.problems("test", 50) + task.problems("train", 50):
        numbers = [int(word) for word in problem.expression.translate(TO_SPACES).split()]
        assert len(numbers) == task.n_operands and max(numbers) < 10**task.digits
        assert problem.answer == parse_expression(problem.expression)[0]
        assert task.prompt(problem) == problem.expression + "="
        assert task.grade(problem, f"<answer>{problem.answer}</answer>").accuracy == 1.0
        assert task.grade(problem, f"<answer>{problem.answer + 1}</answer>").accuracy == 0.0


@pytest.mark.parametrize("text", ["3 7 -> -4", "3 7 → −4", "3,7 -> ﹣4", "3 7 ->－4", "3 7 -> -4.0"])
def test_a_typed_target_may_be_negative(text):
    assert parse_prompt(text) == CountdownProblem((3, 7), -4)
    assert Countdown.prompt(parse_prompt(text)) == "3 7 -> -4"


@pytest.mark.parametrize("text", ["3 7 9 -> 13", " 3,7, 9→13 ", "3\t7 9->13\n"])
def test_typed_problems(text):
    assert parse_prompt(text) == CountdownProblem((3, 7, 9), 13)
    assert parse_prompt(Countdown().prompt(parse_prompt(text))) == parse_prompt(text)


@pytest.mark.parametrize(
    "text",
    ["", "3 7 9", "-> 13", "3 7 9 ->", "3 7 9 -> 1 3", "3 7 9 -> 13 -> 4", "3 x 9 -> 13", "3 7.5 -> 4",
     "3 -7 -> 4", "3 ٧ -> 10", "1234567890 1 -> 2", "1 1 1 1 1 1 1 -> 7", "3 7 -> --4", "3 7 -> –4",
     "3 −7 -> 4", "3 7 -> -1234567890", "3 7 -> 4.5"],
)  # fmt: skip
def test_typed_problems_that_are_malformed(text):
    for typed in (text, text * 10**4):
        with pytest.raises(ValueError, match="whole number|expected numbers|list of 1 to 6") as error:
            parse_prompt(typed)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(("numbers", "target"), [((), 1), ("37", 1), ((1.0,), 1), ((True,), 1), ((1,), None)])
def test_problems_check_their_fields(numbers, target):
    with pytest.raises(ValueError, match="Countdown takes"):
        CountdownProblem(numbers, target)
    assert CountdownProblem([1, 2], 3).numbers == (1, 2)  # a list, as JSON gives it


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("sudoku", {}, "no task 'sudoku'; choose one of: arithmetic, assistant, countdown, game24, gsm8k"),
        ("countdown", {"digits": 3}, "no option 'digits'; it has: n_numbers, low"),
        ("countdown", {"n_numbers": 7}, "n_numbers is 7"),
        ("countdown", {"low": 5, "high": 4}, "low is 5, high 4"),
        ("countdown", {"ops": "+%"}, "ops is '\\+%'"),
        ("countdown", {"ops": ""}, "ops is ''"),
        ("countdown", {"max_target": 0}, "max_target is 0"),
        ("countdown", {"test_share": 1.0}, "test_share is 1.0"),
        ("countdown", {"n_numbers": 2, "high": 1}, "left without problems"),
        ("arithmetic", {"n_operands": 1}, "n_operands is 1"),
        ("arithmetic", {"digits": 10}, "digits is 10"),
        ("arithmetic", {"ops": "/"}, "ops is '/'"),
        ("gsm8k", {}, "path=FILE"),
    ],
)
def test_unknown_tasks_and_options(name, options, why):
    with pytest.raises(ValueError, match=why):
        make_task(name, **options)


def test_positions_out_of_range():
    for task in (Countdown(), Countdown(n_numbers=5), Arithmetic()):
        with pytest.raises(ValueError, match="split is 'dev'"):
            task.problem("dev", 0)
        with pytest.raises(ValueError, match="index is -1"):
            task.problem("test", -1)
    with pytest.raises(ValueError, match=f"there are {Countdown().size('test')}"):
        Countdown().problems("test", 2000)
    with pytest.raises(ValueError, match="tries gave no test"):
        Arithmetic(test_share=1e-9).problem("test", 0)
    with pytest.raises(ValueError, match="no test problem in 10,000 tries"):
        Countdown(n_numbers=5, test_share=1e-9).problem("test", 0)
