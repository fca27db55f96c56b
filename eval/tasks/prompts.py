"""How a question is put to a model, and how its next question would look.

    zero_shot       Question: ... / how to end / Answer:           what GSM8K is evaluated with
    r1_zero         the template of DeepSeek-R1-Zero               (arXiv 2501.12948, table 1)
    r1_zero_think   the same, with `<think>` written behind it
    few_shot        four worked problems, then Question: ... Answer:
    eight_shot      eight worked problems, then Q: ... A:          (the form of arXiv 2201.11903)
    chat            the question, and how to end: for --chat, which adds the model's own template
    plain           the question alone

All but the last two end in a cue that a base model writes on behind. In a chat model's template
they would be a user's message that ends with the assistant's first word, so --chat refuses them.

A base model that has answered often runs on into another question of the form that it was asked in.
So each template has a pattern for that, which cuts the response (`own_response` in response.py). A
plain question has no form: there the first answer block behind the thoughts ends the response.

R1-Zero's template ends with `Assistant:`, as in the paper, and the model writes <think> itself.
TinyZero and others write `<think>` into the prompt. Such a response is judged with that `<think>`
in front (`judged_text` in response.py). So the format reward still wants the whole frame, of which
the model has to write the rest, and a second `<think>` breaks the frame.

Where `<think>` is a control token of the model (Qwen3), the one in a template becomes that token,
as the model was trained, and one in a question does not (model/framed_text.py).

The template in print reads `User: prompt. Assistant:`, where the question stands for `prompt`. Here
the full stop is taken as the sentence's own, so a question that ends in `?` gets none behind it.
The print also has a line break before <answer>, which is read as one of its lines' ends.

The worked problems are our own. Published numbers for 8-shot prompts were measured with others.

Left out: the chat templates of models. They belong to tokenizers (model/chat_template.py).
"""

import re
from dataclasses import dataclass

from ...model.framed_text import FramedText
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
EIGHT_EXAMPLES = """\
Q: A shelf has 14 books. Lena adds 9 books. How many books are on the shelf?
A: There were 14 books, and 9 more were added. 14 + 9 = 23. The answer is 23.

Q: Tom has 31 marbles and loses 12 of them. How many marbles does he have left?
A: Tom began with 31 marbles and lost 12. 31 - 12 = 19. The answer is 19.

Q: A bus has 8 rows with 4 seats each. 5 seats are empty. How many people sit on the bus?
A: There are 8 * 4 = 32 seats. 5 of them are empty, so 32 - 5 = 27 people sit. The answer is 27.

Q: A baker has 50 rolls. He sells 3 bags with 12 rolls each. How many rolls are left?
A: 3 bags hold 3 * 12 = 36 rolls. 50 - 36 = 14 rolls are left. The answer is 14.

Q: Nina is 7 years old. Her aunt is 4 times as old. How old will her aunt be in 6 years?
A: Her aunt is 4 * 7 = 28 years old. In 6 years she will be 28 + 6 = 34. The answer is 34.

Q: A rope is 45 metres long. It is cut into 5 equal pieces. How long are 2 pieces together?
A: One piece is 45 / 5 = 9 metres long. Two pieces are 2 * 9 = 18 metres long. The answer is 18.

Q: On Monday it rained 3 litres. On each of the next 4 days it rained 2 litres. How much in all?
A: On the 4 days it rained 4 * 2 = 8 litres. With Monday that is 8 + 3 = 11. The answer is 11.

Q: Emil has $20. He buys 4 pens for $3 each. How many dollars does he have left?
A: 4 pens cost 4 * 3 = 12 dollars. He had 20, so 20 - 12 = 8 are left. The answer is 8.

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
    marks: tuple[str, ...] = ("hashes",)
    """The marks of an answer outside of a block, for tasks that read any (final_answer.py)."""
    prefilled: str = ""
    """What of the answer stands in the prompt already, at its end."""

    def prompt(self, question: str) -> str:
        """The text that the model continues, which knows where the question stands in it."""
        return FramedText(self.before, question, self.after)

    def own_part(self, question: str, response: str) -> str:
        """The response up to another question; the own one, said again, does not end it."""

        def is_own(match: re.Match) -> bool:
            is_known = bool(question and self.before)
            return is_known and response.startswith(question, match.end())

        return own_response(response, self.next_question, is_own)


def zero_shot(how_to_end: str) -> Template:
    """The question, a sentence on how to end, and `Answer:`."""
    return Template(
        before="Question: ",
        after=f"\n{how_to_end}\nAnswer:",
        next_question=re.compile(r"\nQuestion:[ \t]*+"),
    )


def chat(how_to_end: str) -> Template:
    """The question and a sentence on how to end: one message of a user.

    A chat model ends its turn itself, so no further question is looked for.
    """
    return Template(
        before="",
        after=f"\n{how_to_end}",
        next_question=re.compile(r"(?!)"),
        marks=("boxed", "hashes", "sentence"),
    )


TEMPLATES = {
    "zero_shot": zero_shot(
        "Think step by step, then end with a line `#### n`, where n is the answer as a number."
    ),
    "r1_zero": Template(
        before=FRAME_ASKED,
        after=" Assistant:",
        next_question=NEXT_USER,
    ),
    "r1_zero_think": Template(
        before=FRAME_ASKED,
        after=" Assistant: <think>",
        next_question=NEXT_USER,
        prefilled="<think>",
    ),
    "few_shot": Template(
        before=f"{EXAMPLES}Question: ",
        after="\nAnswer:",
        next_question=re.compile(r"(?:\n|(?<=</answer>))[ \t]*+Question:[ \t]*+"),
    ),
    "eight_shot": Template(
        before=f"{EIGHT_EXAMPLES}Q: ",
        after="\nA:",
        next_question=re.compile(r"\n[ \t]*+Q:[ \t]*+"),
        marks=("sentence", "hashes"),
    ),
    "chat": chat(r"Think step by step, then put the answer, a number, into \boxed{}."),
    "plain": Template(before="", after="", next_question=re.compile(r"(?<=</answer>)")),
}

# The templates that end in a cue for the answer, as base models take them.
CONTINUED = ("zero_shot", "r1_zero", "r1_zero_think", "few_shot", "eight_shot")


def check_template(name: str, known: tuple[str, ...] = tuple(TEMPLATES)) -> None:
    """ValueError, with the known names, for a template that is not among them."""
    if name not in known:
        raise ValueError(f"template is {name!r}; it must be one of: {', '.join(known)}")


def check_message(template: str | None) -> None:
    """ValueError for a template whose prompts are no messages of a user, so nothing for --chat.

    None, and the templates of a task of the user's own, are taken.
    """
    if template in CONTINUED:
        raise ValueError(
            f"--chat puts a question through the model's own template, and template={template} is "
            "for a model that continues the text; leave out --chat, or give --options with a "
            "template that asks as a user does: chat, plain, or boxed of --task math"
        )
