"""What the files of a Hugging Face folder say of its tokenizer.

tokenizer.json            vocabulary, merges, split, added tokens; perhaps bos before each text
tokenizer_config.json     the names of bos, eos and padding, perhaps chat template and added tokens
chat_template.jinja       the chat template, in newer folders
generation_config.json    the ids that end an answer, often several; else config.json has them
"""

import json
from pathlib import Path

from .imported import Settings


def _read_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; download it again")
    return value


def _is_id(value) -> bool:
    return type(value) is int and value >= 0


def _check_entry(path: Path, key: str, entry: dict) -> None:
    """Raise ValueError unless an entry describes an added token."""
    described = isinstance(entry, dict) and isinstance(entry.get("content"), str)
    if not described or not _is_id(entry.get("id")):
        raise ValueError(
            f"{path}: {key} has {entry!r:.200}; expected an object with id, a whole number, and "
            "with content, a text; download it again"
        )


def _added_tokens(path: Path, source: dict) -> list[dict]:
    """The added tokens of a tokenizer.json."""
    entries = source.get("added_tokens", [])
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: added_tokens is {entries!r:.60}; expected a list; download it again"
        )
    for entry in entries:
        _check_entry(path, "added_tokens", entry)
    return entries


def _declared_tokens(path: Path, tokenizer_config: dict) -> list[dict]:
    """The added tokens that a tokenizer_config.json describes, by id."""
    entries = tokenizer_config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
        raise ValueError(
            f"{path}: added_tokens_decoder is {entries!r:.60}; expected an object whose keys are "
            "ids; download it again"
        )
    tokens = []
    for key, entry in entries.items():
        token = entry | {"id": int(key)} if isinstance(entry, dict) else entry
        _check_entry(path, "added_tokens_decoder", token)
        tokens.append(token)
    return sorted(tokens, key=lambda token: token["id"])


def read_source(folder: Path, tokenizer_config: dict) -> dict:
    """The content of tokenizer.json, and added tokens that only tokenizer_config.json names.

    Raises ValueError if there is none, if it is damaged, or if the two contradict each other.
    """
    path = folder / "tokenizer.json"
    source = _read_json(path)
    if not source:
        old = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()]
        has = f"it has {old[0]}, which transformers converts" if old else "it belongs to the model"
        raise ValueError(f"{folder} has no tokenizer.json; {has}: AutoTokenizer...save_pretrained")
    model = source.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError(f"{path} is no tokenizer: it has no model with a vocab; download it again")

    if isinstance(model["vocab"], dict):
        for text, i in model["vocab"].items():
            if not _is_id(i):
                raise ValueError(
                    f"{path}: the id of {text!r} is {i!r:.60}, expected a whole number; download "
                    "it again"
                )

    added = _added_tokens(path, source)
    content_of_id = {token["id"]: token["content"] for token in added}
    missing = []
    for token in _declared_tokens(folder / "tokenizer_config.json", tokenizer_config):
        known = content_of_id.get(token["id"])
        if known is None:
            missing.append(token)
        elif known != token["content"]:
            raise ValueError(
                f"{folder}: id {token['id']} is {known!r} in tokenizer.json, but "
                f"{token['content']!r} in tokenizer_config.json; take both files from one model"
            )
    return source | {"added_tokens": added + missing} if missing else source


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id is {ids}, expected an integer or a list of integers")
    return ids


class Folder:
    """What the files beside tokenizer.json say. Raises ValueError for files that are damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        names = _read_json(self.path / "special_tokens_map.json")
        self.tokenizer_config = names | _read_json(self.path / "tokenizer_config.json")
        self.generation = _read_json(self.path / "generation_config.json")
        self.config = _read_json(self.path / "config.json")
        self.source = read_source(self.path, self.tokenizer_config)
        added = {t["content"]: t["id"] for t in self.source.get("added_tokens", [])}
        self._id_of = dict(self.source["model"]["vocab"]) | added
        self._id_of_added = added

    def _named_id(self, name: str) -> int | None:
        """The id of bos_token or eos_token; None if the folder names none."""
        content = _content(self.tokenizer_config.get(name))
        if content is not None and content not in self._id_of:
            raise ValueError(
                f"{self.path}/tokenizer_config.json: {name} is {content!r}, which tokenizer.json "
                "does not have; take both files from one model"
            )
        return None if content is None else self._id_of[content]

    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the tokenizer's own first, then those of generation.

        config.json counts only where neither says anything: its value may be a class's default.
        """
        ids = _as_list(self._named_id("eos_token"))
        ids += _as_list(self.generation.get("eos_token_id"))
        ids = ids or _as_list(self.config.get("eos_token_id"))
        if not ids:
            raise ValueError(
                f"{self.path} names no end token, so no answer would end; give eos_token_id in "
                "generation_config.json"
            )
        return tuple(dict.fromkeys(ids))

    def bos(self) -> tuple[int | None, bool]:
        """(the id of bos, whether a prompt begins with it).

        add_bos_token goes before the template of tokenizer.json, as in transformers 4. Version 5.24
        looks at the template alone. An export writes a template that says the same to both.
        """
        # 1. A template that is applied to each text. It may end with tokens too; a prompt does not.
        in_template = template_bos(self.source.get("post_processor"))
        stated = self.tokenizer_config.get("add_bos_token")
        if not isinstance(stated, bool | None):
            raise ValueError(
                f"add_bos_token is {stated!r} in tokenizer_config.json; expected true or false"
            )
        adds_bos = in_template is not None if stated is None else stated

        # 2. Its id: from there, by name, or from the model's config.
        if adds_bos and in_template is not None:
            return in_template, True
        if "bos_token" in self.tokenizer_config:
            return self._named_id("bos_token"), adds_bos
        bos_id = self.generation.get("bos_token_id", self.config.get("bos_token_id"))
        return (bos_id if bos_id in self._id_of.values() else None), adds_bos

    def pad_and_unk(self) -> tuple[int | None, int | None]:
        """The ids of padding and of the unknown token; None for each that is no added token."""
        pad, unk = (_content(self.tokenizer_config.get(f"{name}_token")) for name in ("pad", "unk"))
        files = (self.generation, self.config)
        candidates = [self._id_of_added.get(pad), *(file.get("pad_token_id") for file in files)]
        known = self._id_of_added.values()
        pad_id = next((i for i in candidates if type(i) is int and i in known), None)
        return pad_id, self._id_of_added.get(unk)

    def chat_template(self) -> str | None:
        """From its own file, or from tokenizer_config.json; of several, the one named default."""
        path = self.path / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            by_name = {entry["name"]: entry["template"] for entry in template}
            template = by_name.get("default")
        if not isinstance(template, str | None):
            raise ValueError(
                f"chat_template is {template!r:.60} in tokenizer_config.json; expected a text"
            )
        return template

    def settings(self, vocab_size: int | None) -> Settings:
        """All of it. vocab_size: rows of the model; None is as many as the tokenizer has ids."""
        bos_id, adds_bos = self.bos()
        n_ids = 1 + max(self._id_of.values())
        size = n_ids if vocab_size is None else vocab_size
        pad_id, unk_id = self.pad_and_unk()
        return Settings(
            size, self.eos_ids(), bos_id, adds_bos, self.chat_template(), pad_id, unk_id
        )


def template_bos(post_processor: dict | None) -> int | None:
    """The id that a post-processor puts in front of a text; None if it puts none."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        found = [template_bos(part) for part in post_processor["processors"]]
        return next((i for i in found if i is not None), None)
    if post_processor["type"] != "TemplateProcessing":
        return None
    first = post_processor["single"][0].get("SpecialToken")
    return post_processor["special_tokens"][first["id"]]["ids"][0] if first else None
