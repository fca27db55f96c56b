"""A model as the harness wants it: a callable from prompts to responses.

Random numbers are counter-based: the seed of a response is a function of (seed, running number of
its problem, number of the sample). So a response depends neither on the batch's size nor on how
many samples a problem has, up to rounding: matrix products change with the batch's shape, at the
1e-6 level.

A prompt that leaves no room for the response in the model's max_seq_len is an error. On request it
loses its beginning and is counted instead, so that a small model can take a whole test set, long
questions included, and the user knows what it was not shown. The token that begins a text is kept.
A message in a chat template is never cut: the system's words and the marks of turns would go first.
"""

from collections.abc import Iterator

import torch

from ..model.chat_template import encode_problems, encode_prompts
from ..model.engine.engine import Engine
from ..model.engine.requests import Completion, Request, group_requests
from ..model.engine.sampling import sample_seeds
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .harness import Sampled
from .response import response_text


class ModelSampler:
    """`sampler(prompts, n_samples)` -> n_samples responses to each prompt, for `evaluate`.

    Use one sampler per evaluation. Raises ValueError for max_new_tokens that leave no room for a
    prompt, and, when called, as the engine does.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        cut_prompts: bool = False,
        engine: Engine | None = None,
        chat: bool = False,
    ):
        """cut_prompts: cut the beginning of a prompt that is too long, instead of raising; not with
        chat.

        chat: put each prompt through the model's chat template.

        engine: one that the model has already, since each holds a cache; None makes one.
        """
        limit = model.config.max_seq_len
        if not 1 <= max_new_tokens < limit:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, but the model's max_seq_len is {limit}, "
                f"prompt and response together; expected 1 to {limit - 1}"
            )
        self.engine = engine or Engine(model, tokenizer)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.cut_prompts = cut_prompts
        self.chat = chat
        self.room = limit - max_new_tokens
        """Tokens that a prompt may have."""
        self.n_prompts = 0
        """Prompts seen so far: the running number of the next one."""
        self.n_cut = 0
        """How many of them lost their beginning."""

    def check(self, prompts: list[str]) -> None:
        """Try to encode all prompts of an evaluation, and sample nothing.

        Raises ValueError, with the problem's number, for one that cannot be put to the model.
        """
        for number, ids in enumerate(encode_problems(self.tokenizer, prompts, self.chat)):
            if self.chat:
                self._check_room(ids, f"problem {number} (the first is 0)")

    def stream(self, prompt: str) -> Iterator[tuple[str, Sampled | None]]:
        """One response as it comes: (new text, None), and with the last of it the whole."""
        [ids] = self._encode([prompt])
        return self.stream_tokens(ids)

    def stream_tokens(self, prompt: list[int]) -> Iterator[tuple[str, Sampled | None]]:
        """`stream` of a prompt's token ids, as `encode_messages` gives those of a conversation."""
        [request] = self._requests([prompt], 1)
        for event in self.engine.stream([request]):
            yield event.text, self._sampled(event.completion) if event.completion else None

    def __call__(self, prompts: list[str], n_samples: int) -> list[list[Sampled]]:
        completions = self.engine.generate(self._requests(self._encode(prompts), n_samples))
        responses = [self._sampled(completion) for completion in completions]
        return [responses[i : i + n_samples] for i in range(0, len(responses), n_samples)]

    def _sampled(self, completion: Completion) -> Sampled:
        tokens = tuple(completion.tokens.tolist())
        text = response_text(self.tokenizer, tokens)
        return Sampled(text, len(tokens), completion.finish_reason, tokens)

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        ids = encode_prompts(self.tokenizer, prompts, self.chat)
        if self.chat:
            for prompt in ids:
                self._check_room(prompt, "a prompt")
        elif self.cut_prompts:
            self.n_cut += sum(len(prompt) > self.room for prompt in ids)
            ids = [self._cut(prompt) for prompt in ids]
        return ids

    def _check_room(self, ids: list[int], what: str) -> None:
        """ValueError for a message that is too long."""
        if len(ids) > self.room:
            raise ValueError(
                f"{what} has {len(ids)} tokens in the chat template, and a max_seq_len of "
                f"{self.engine.model.config.max_seq_len} leaves {self.room} beside "
                f"{self.max_new_tokens} new ones; a conversation is not cut: lower "
                "--max-new-tokens, or leave the problem out"
            )

    def _cut(self, ids: list[int]) -> list[int]:
        """The end of a prompt that is too long, behind bos if it began with that."""
        n_kept = 1 if self.tokenizer.adds_bos else 0
        n_lost = max(len(ids) - self.room, 0)
        return ids[:n_kept] + ids[n_kept + n_lost :]

    def _requests(self, ids: list[list[int]], n_samples: int) -> list[Request]:
        seeds = torch.cat(
            [sample_seeds(n_samples, self.seed, self.n_prompts + i) for i in range(len(ids))]
        )
        self.n_prompts += len(ids)
        stop_ids = self.tokenizer.eos_ids
        return group_requests(
            ids, n_samples, self.max_new_tokens, self.temperature, seeds, stop_ids
        )

    def cut_message(self) -> str | None:
        """What to tell the user about prompts that were cut; None if none was."""
        if not self.n_cut:
            return None
        limit = self.engine.model.config.max_seq_len
        return (
            f"{self.n_cut:,} of {self.n_prompts:,} prompts are longer than the {self.room} tokens "
            f"that a max_seq_len of {limit} leaves beside {self.max_new_tokens} new ones; "
            "the model was shown their ends only"
        )
