"""Problems from a data set on the Hugging Face hub, instead of a file: `--data hub:OWNER/NAME`.

    hub:HuggingFaceH4/MATH-500              its split "test"
    hub:openai/gsm8k:train:main             another split, and a configuration

Each row becomes one line of JSON, and is then read as a line of a file is. This needs the package
`datasets`, which nothing else here does, and a network, unless the package has kept the data set.

Left out: streaming, and a revision: the newest data are read. Where a result must repeat, keep a
file.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from ..lines import Line

PREFIX = "hub:"
SPLIT = "test"


def is_on_hub(path: str) -> bool:
    """Whether --data names a data set on the hub."""
    return path.startswith(PREFIX)


def load_rows(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a data set, by the package `datasets`."""
    from datasets import load_dataset

    return load_dataset(name, config, split=split)


def read_hub(path: str, load: Callable[..., Iterable[dict[str, Any]]] = load_rows) -> list[Line]:
    """The rows of `hub:OWNER/NAME[:SPLIT[:CONFIG]]` as numbered lines of JSON.

    load: gives the rows. Raises ValueError for a name of another form, for a package that is
    missing, and for whatever keeps the data from being read.
    """
    name, *rest = path.removeprefix(PREFIX).split(":")
    split, config = (*rest, *(SPLIT, None)[len(rest) :])[:2]
    if name.count("/") != 1 or not all((*name.split("/"), split)) or len(rest) > 2:
        raise ValueError(
            f"{path!r} names no data set; expected {PREFIX}OWNER/NAME[:SPLIT[:CONFIG]]"
        )
    try:
        rows = load(name, config, split)
        texts = [json.dumps(row) for row in rows]
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package datasets ({error}); pip install datasets, or give a file"
        ) from None
    except Exception as error:  # the network, the hub, or a script of the data set
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {reason}); see whether the network "
            "and the name are right, or give a file"
        ) from error
    return [Line(number, text.encode()) for number, text in enumerate(texts, 1)]
