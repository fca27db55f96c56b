"""`<out>.partial`: the samples of a collection, until they are complete and the lines are written.

The first line says what the samples depend on: flags and weights. Each other line is a problem:

    {"index": 7, "prompt": "3 7 9 -> 13", "seconds": 0.2,
     "responses": [{"text": "...", "tokens": [5, 9], "finish_reason": "stop"}, ...]}

A collection that is resumed keeps whole batches, so that the batches after them have the shape that
they would have had: matrix products round differently in another shape. What follows, such as half
a line that was written when its process died, is sampled again.

`<out>.labels.partial` is the same for the labels of steps (step_labels.py): a line per problem
whose completions were sampled. It is of the samples beside it, and begins and ends with them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..eval.console import say
from ..eval.response import quoted
from ..eval.result_file import partial_path
from .inputs import changes_of
from .settings import check_settings


class SampleFile:
    """The samples of the collection that writes to `out`."""

    def __init__(self, out: str | Path):
        self.path = partial_path(out)
        self.step_labels = StepLabelFile(out)
        self.n_problems = 0
        """How many problems it holds."""
        self.has_more = False
        """Whether it holds others, which this call did not ask for."""

    # ---- beginning and end ----

    def open(self, config, header: dict, prompts: Sequence[str]) -> None:
        """Take over what is there, with --resume, or begin.

        config: has `out`, `resume` and `batch`. header: the settings and inputs of this call.
        Raises ValueError if there are samples and no --resume, or samples of something else.
        """
        if self.path.exists() and not config.resume:
            raise ValueError(
                f"{self.path} holds the samples of a call that was broken off; go on with "
                "--resume, or remove it"
            )
        if config.resume and self._has_header():
            self._take_over(config, header, prompts)
            return
        if config.resume:
            say(f"{self.path} holds no samples to go on with: starting at the first problem")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.step_labels.remove()  # of other samples
        self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def remove(self) -> None:
        """To be called when the lines are written. The samples of other problems stay."""
        if self.has_more:
            say(
                f"{self.path} stays, since it holds the samples of more problems than were asked "
                "for; --resume with more --problems takes them from there, or remove it"
            )
            return
        self.step_labels.remove()
        self.path.unlink()

    def _has_header(self) -> bool:
        if not self.path.exists():
            return False
        with open(self.path, "rb") as file:
            return file.readline().endswith(b"\n")

    def _take_over(self, config, header: dict, prompts: Sequence[str]) -> None:
        """Compare the header, and cut off what is no whole batch."""
        with open(self.path, "rb") as file:
            # 1. Are they samples of this model, with these flags?
            then = parsed(file.readline())
            if then is None or then.keys() != header.keys():
                raise ValueError(
                    f"{self.path} is not as r1zero collect wrote it; restore it, or remove it"
                )
            check_settings(then["settings"], header["settings"], config, self.path)
            if changes := changes_of(then["inputs"], header["inputs"]):
                raise ValueError(
                    f"the samples in {self.path} are of another model ({changes}); give that one, "
                    "or another --out"
                )
            # 2. Where does each problem end that is there, and is it the same problem?
            ends = [file.tell()]
            for index, prompt in enumerate(prompts, config.start):
                group = parsed(file.readline())
                if group is None or group.get("index") != index:
                    break
                if group.get("prompt") != prompt:
                    raise ValueError(
                        f"problem {index} has another prompt in {self.path}: "
                        f"{quoted(str(group.get('prompt')))}, and {quoted(prompt)} now; restore "
                        "the problems, or remove that file"
                    )
                ends.append(file.tell())
            else:
                self.has_more = bool(file.readline())
        # 3. Whole batches stay.
        self.n_problems = len(ends) - 1
        if self.n_problems < len(prompts):
            self.n_problems -= self.n_problems % config.batch
            os.truncate(self.path, ends[self.n_problems])

    # ---- samples ----

    def append(self, groups: Sequence[dict]) -> None:
        """Write the next problems."""
        lines = [json.dumps(group) + "\n" for group in groups]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(lines)
        self.n_problems += len(groups)

    def groups(self) -> Iterator[dict]:
        """Each problem that it holds, in order."""
        with open(self.path, encoding="utf-8") as file:
            file.readline()
            for line in file:
                yield json.loads(line)


class StepLabelFile:
    """The labels of steps by completions, of the collection that writes to `out`."""

    def __init__(self, out: str | Path):
        self.path = partial_path(f"{out}.labels")
        self._by_index: dict[int, dict] | None = None

    def find(self, asked: dict) -> dict | None:
        """The line of a problem, if all that it was asked for was the same; else None.

        asked: the index of the problem, the number of completions, [sample, end] of each step, and
        the files that grade.
        """
        if self._by_index is None:
            self._by_index = self._read()
        line = self._by_index.get(asked["index"], {})
        is_same = all(line.get(name) == value for name, value in asked.items())
        return line if is_same else None

    def append(self, line: dict) -> None:
        """Keep the line of a problem."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._by_index = None

    def _read(self) -> dict[int, dict]:
        """The lines that are whole; what follows the first other one is cut off."""
        found: dict[int, dict] = {}
        if not self.path.exists():
            return found
        with open(self.path, "rb") as file:
            while (line := parsed(file.readline())) is not None and "index" in line:
                found[line["index"]] = line
                end = file.tell()
        os.truncate(self.path, end if found else 0)
        return found


def parsed(line: bytes) -> dict | None:
    """The object in a line; None for a line that was not written whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
