"""How a question is put to a base model, and how its next question would look.

    zero_shot   Question: ... / how to end / Answer:           what GSM8K is evaluated with
    r1_zero     the template of DeepSeek-R1-Zero               (arXiv 2501.12948, table 1)
    few_shot    four worked problems, then Question: ... Answer:
    plain       the question alone

A base model that has answered often runs on into another question of the form that it was asked in.
So each template has a pattern for that, which cuts the response (`own_response` in response.py). A
plain question has no form: there the first answer block behind the thoughts ends the response.

R1-Zero's template ends with `Assistant:`, as in the paper, and the model writes <think> itself.
TinyZero and others write `<think>` into the prompt; then half of the frame that the format reward
is for would be given.

Left out: chat templates, which are for models that are no base models.
"""

import re
from dataclasses import dataclass

from ..response import own_response

FRAME_ASKED = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: "
)
EXAMPLES = """\
Question: A box holds 12 pencils. Mia buys 3 boxes and gives away 10 pencils. How many are left?
Answer: <think>3 boxes hold 3 * 12 = 36 pencils. She gives away 10, so 36 - 10 = 26 are left.\
</think> <answer>26</answer>

Question: A train ticket costs $8, and a child pays half. What do 2 adults and 3 children pay?
Answer: <think>A child pays 8 / 2 = 4 dollars. The adults pay 2 * 8 = 16, the children 3 * 4 = 12. \
Together that is 16 + 12 = 28.</think> <answer>28</answer>

Question: Omar reads 15 pages a day. His book has 180 pages, and he has read 4 days. How many days \
are left?
Answer: <think>In 4 days he read 4 * 15 = 60 pages. 180 - 60 = 120 pages are left, which take \
120 / 15 = 8 days.</think> <answer>8</answer>

Question: A tank holds 500 litres and is 30% full. How many litres fit into it?
Answer: <think>It holds 500 * 30 / 100 = 150 litres, so 500 - 150 = 350 litres fit.</think> \
<answer>350</answer>

"""
# Where the next turn of the conversation begins: on a line of its own, anywhere behind an answer
# block, behind an answer on its line, or with the frame of the whole prompt. Each way is linear: no
# piece of the text is read again from another start.
NEXT_USER = re.compile(
    r"\n[ \t]*+User:[ \t]*+"
    r"|(?<=</answer>)(?:[^<]|<(?!/answer>))*?\bUser:[ \t]*+"
    r"|####[^\n#]*?(\bUser:)[ \t]*+"
    rf"|A conversation between User and Assistant(?:[^\n]{{0,{len(FRAME_ASKED)}}}?User:[ \t]*+)?"
)


@dataclass(frozen=True)
class Template:
    """A form of prompts."""

    before: str
    after: str
    next_question: re.Pattern
    """Matches where another question begins, or has a group that does; where the match ends, its
    text begins."""

    def prompt(self, question: str) -> str:
        """The text that the model continues."""
        return f"{self.before}{question}{self.after}"

    def own_part(self, question: str, response: str) -> str:
        """The response up to another question; the own one, said again, does not end it."""

        def is_own(match: re.Match) -> bool:
            is_known = bool(question and self.before)
            return is_known and response.startswith(question, match.end())

        return own_response(response, self.next_question, is_own)


TEMPLATES = {
    "zero_shot": Template(
        before="Question: ",
        after="\nThink step by step, then end with a line `#### n`, "
        "where n is the answer as a number.\nAnswer:",
        next_question=re.compile(r"\nQuestion:[ \t]*+"),
    ),
    "r1_zero": Template(
        before=FRAME_ASKED,
        after=" Assistant:",
        next_question=NEXT_USER,
    ),
    "few_shot": Template(
        before=f"{EXAMPLES}Question: ",
        after="\nAnswer:",
        next_question=re.compile(r"(?:\n|(?<=</answer>))[ \t]*+Question:[ \t]*+"),
    ),
    "plain": Template(before="", after="", next_question=re.compile(r"(?<=</answer>)")),
}


def check_template(name: str, known: tuple[str, ...] = tuple(TEMPLATES)) -> None:
    """ValueError, with the known names, for a template that is not among them."""
    if name not in known:
        raise ValueError(f"template is {name!r}; it must be one of: {', '.join(known)}")
