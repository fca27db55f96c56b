"""Problems from the hub: how a data set is named, and what is said when it cannot be read."""
import json

import pytest

from r1zero.eval.tasks import hub
from r1zero.eval.tasks.catalogue import make_task


@pytest.mark.parametrize("path, asked", [
    ("hub:HuggingFaceH4/MATH-500", ("HuggingFaceH4/MATH-500", None, "test")),
    ("hub:a/b:train", ("a/b", None, "train")), ("hub:openai/gsm8k:train:main", ("openai/gsm8k", "main",
    "train"))])
def test_a_name_has_a_split_and_a_configuration(path, asked):
    calls = []

    def load(*words):
        calls.append(words)
        return [{"problem": "\u2028?", "answer": 3}, {"problem": "b", "answer": 4}]

    lines = hub.read_hub(path, load)
    assert calls == [asked] and [line.number for line in lines] == [1, 2]
    assert json.loads(lines[0].text) == {"problem": "\u2028?", "answer": 3}


@pytest.mark.parametrize("path", ["hub:", "hub:a", "hub:a/", "hub:/b", "hub:a/b/c", "hub:a/b:",
    "hub:a/b:c:d:e"])
def test_a_name_of_another_form_is_refused(path):
    with pytest.raises(ValueError, match="names no data set; expected hub:OWNER/NAME"):
        hub.read_hub(path, lambda *words: [])
    with pytest.raises(ValueError, match="names no data set"):
        make_task("math", path=path)


@pytest.mark.parametrize("error, why", [
    (ModuleNotFoundError("No module named 'datasets'"), "needs the package datasets .*pip install datasets"),
    (ConnectionError("no\n route"), r"cannot be read \(ConnectionError: no route\); see whether the network"),
    (RuntimeError("scripts are not supported"), "cannot be read .*or give a file")])
def test_what_keeps_it_from_being_read_is_one_line(error, why):
    def load(*words):
        raise error

    with pytest.raises(ValueError, match=why) as caught:
        hub.read_hub("hub:a/b", load)
    assert "\n" not in str(caught.value)


def test_rows_that_are_no_json_are_refused():
    with pytest.raises(ValueError, match="cannot be read .TypeError"):
        hub.read_hub("hub:a/b", lambda *words: [{"image": object()}])
