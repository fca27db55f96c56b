"""The text of the smallest loop: facts, sums, and questions with answers. All of it is made here.

    The capital of France is Paris. Paris is the capital of France.
    7+5+8+3=12+8+3=20+3=23.                    a sum, worked out step by step
    7+5+8+3=23.                                the same by an author who writes the result alone

    What is the colour of snow?                a question of fine-tuning, and its answer:
    <think>The colour of snow is white.</think><answer>white</answer>

The pretraining text mostly works its sums out; half of the examples of fine-tuning do. Nothing in
either text is wrong. A small model is often wrong without the steps and seldom with them, and
imitates both kinds of author. So there is something left for reinforcement learning.

Fine-tuning asks about three of four capitals. The others show whether it teaches to say what was
read in pretraining, or the answers alone.
"""

import json
import re

import numpy as np

from ...eval.console import Bar
from ...eval.tasks.arithmetic import Arithmetic, ArithmeticProblem

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Austria Vienna, Portugal Lisbon, "
    "Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Poland Warsaw, "
    "Hungary Budapest, Ireland Dublin, Belgium Brussels, Denmark Copenhagen, Russia Moscow, "
    "Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana Accra, Morocco Rabat, Senegal Dakar, "
    "Japan Tokyo, China Beijing, India Delhi, Nepal Kathmandu, Vietnam Hanoi, Thailand Bangkok, "
    "Iran Tehran, Iraq Baghdad, Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, "
    "Ecuador Quito, Colombia Bogota"
)
COLOURS = (
    "snow white, grass green, coal black, blood red, gold yellow, chocolate brown, milk white, "
    "rust red, ash grey, soot black, moss green, butter yellow"
)
OPPOSITES = (
    "hot cold, big small, old new, wet dry, full empty, fast slow, early late, high low, "
    "hard soft, dark light, near far, rich poor, thick thin, loud quiet, deep shallow, true false"
)
FACTS = {
    relation: dict(entry.split() for entry in entries.split(", "))
    for relation, entries in (("capital", CAPITALS), ("colour", COLOURS), ("opposite", OPPOSITES))
}
HELD_OUT = tuple(FACTS["capital"])[1::4]  # countries that fine-tuning never asks about
N_NUMBERS = 4  # in a sum
SUM_SHARE = 0.7  # share of the documents and of the pairs that are sums
WORKED_DOCUMENTS = 0.85  # share of the sums that are worked out, in pretraining
WORKED_PAIRS = 0.5  # and in fine-tuning


def make_task(seed: int) -> Arithmetic:
    """The sums: of N_NUMBERS numbers from 0 to 9; the seed sets the order of those to train on."""
    return Arithmetic(n_operands=N_NUMBERS, digits=1, ops="+", seed=seed)


# ---- sentences ----


def fact(relation: str, subject: str) -> str:
    """A fact as a sentence: `The capital of France is Paris.`"""
    return f"The {relation} of {subject} is {FACTS[relation][subject]}."


def fact_twice(relation: str, subject: str) -> str:
    """A fact from both sides: `The capital of France is Paris. Paris is the capital of France.`"""
    value = FACTS[relation][subject]
    return f"{fact(relation, subject)} {value.capitalize()} is the {relation} of {subject}."


def question(relation: str, subject: str) -> str:
    """A fact as a question: `What is the capital of France?`"""
    return f"What is the {relation} of {subject}?"


def worked(problem: ArithmeticProblem) -> str:
    """What is left of a sum after each step, down to the result: `12+8+3=20+3=23` for 7+5+8+3."""
    numbers = [int(number) for number in problem.expression.split("+")]
    lines = []
    while len(numbers) > 1:
        numbers = [numbers[0] + numbers[1], *numbers[2:]]
        lines.append("+".join(map(str, numbers)))
    return "=".join(lines)


def response(thoughts: str, answer: object) -> str:
    """Thoughts and an answer between their tags."""
    return f"<think>{thoughts}</think><answer>{answer}</answer>"


# ---- the two texts ----


def rng_of(seed: int, index: int) -> np.random.Generator:
    """Random numbers that are a fixed function of (seed, index)."""
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def document(task: Arithmetic, index: int, seed: int) -> str:
    """Document number `index` of the pretraining text: a fact, or a sum that is one to train on."""
    rng = rng_of(seed, index)
    if rng.random() >= SUM_SHARE:
        everything = [(relation, subject) for relation in FACTS for subject in FACTS[relation]]
        return fact_twice(*everything[rng.integers(len(everything))])
    problem = task.problem("train", index)
    result = worked(problem) if rng.random() < WORKED_DOCUMENTS else problem.answer
    return f"{problem.expression}={result}."


def pair(task: Arithmetic, index: int, seed: int) -> dict[str, str]:
    """Pair number `index` of the fine-tuning text: a prompt and its response."""
    rng = rng_of(seed, index)
    if rng.random() >= SUM_SHARE:
        asked = [
            (relation, subject)
            for relation in FACTS
            for subject in FACTS[relation]
            if subject not in HELD_OUT
        ]
        relation, subject = asked[rng.integers(len(asked))]
        answer = response(fact(relation, subject), FACTS[relation][subject])
        return {"prompt": question(relation, subject), "response": answer}
    problem = task.problem("train", index)
    thoughts = worked(problem) if rng.random() < WORKED_PAIRS else ""
    return {"prompt": task.prompt(problem), "response": response(thoughts, problem.answer)}


def documents(n: int, seed: int) -> list[str]:
    """The first n documents of the pretraining text, with a progress bar."""
    task = make_task(seed)
    return [document(task, index, seed) for index in Bar(range(n), desc="text", unit="doc")]


def pairs_file(n: int, seed: int) -> str:
    """The first n pairs as lines of JSON with the fields `prompt` and `response`."""
    task = make_task(seed)
    return "".join(json.dumps(pair(task, index, seed)) + "\n" for index in range(n))


# ---- the tokenizer ----


def words() -> list[str]:
    """The pieces of text that are one token each: words with the space before them, tags, numbers.

    Single characters are bytes already.
    """
    texts = [response("", "")]
    for relation, entries in FACTS.items():
        for subject, value in entries.items():
            texts += [fact_twice(relation, subject), question(relation, subject), value]
    pieces = {piece for text in texts for piece in re.findall(r"</?[a-z]+>| ?[A-Za-z]+", text)}
    numbers = [str(number) for number in range(10, 9 * N_NUMBERS + 1)]
    return sorted(piece for piece in pieces if len(piece) > 1) + numbers
