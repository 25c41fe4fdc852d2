"""A loaded model as one of EleutherAI's lm-eval, imported by the functions that need it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.commands.loaded_model import LoadedModel
from tokenyard_train.data.finetuning.template import ChatTemplate, Message
from tokenyard_train.data.tokenizer import Tokenizer
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.sampling import Sampling, sample, text_after, utf8
from tokenyard_train.engine.scoring import Request, score

_NEW_TOKENS = 256  # of a text, if its task does not say: lm-eval's default
_UNREAD = ("top_k", "top_p", "min_p", "repetition_penalty", "num_beams")


def build_harness_model(*arguments: Any) -> Any:
    """Return a model as an ``lm_eval.api.model.LM``. The arguments are those of `HarnessModel`."""
    from lm_eval.api.model import TemplateLM

    return type("TokenyardLM", (HarnessModel, TemplateLM), {})(*arguments)


class HarnessModel:
    """The methods of lm-eval's TemplateLM for a loaded model, scored and sampled in batches.

    No token precedes a text but the end id.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Tokenizer,
        batch_size: int,
        template: ChatTemplate | None = None,
    ):
        super().__init__()
        self._loaded = loaded
        self._model = loaded.model
        self._text = tokenizer
        self._batch_size = batch_size
        self._template = template
        self._stops = {tokenizer.end, *loaded.stop_ids()}

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document. It also precedes a text without a context."""
        return self._text.end

    @property
    def tokenizer_name(self) -> str:
        """The digest of the tokenizer."""
        return self._text.identity

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text, as in training: nothing is added."""
        ids: list[int] = self._text.encode(utf8(string)).tolist()
        return ids

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of messages. Without the prompt, it ends in the last message."""
        if self._template is None:
            raise ConfigError("the tasks ask for a chat template; add --chat")
        text = self._template.render(chat_history, "a task's messages", add_generation_prompt)
        if add_generation_prompt:
            return text
        before, last, _ = text.rpartition(chat_history[-1]["content"])
        return before + last

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        with self._loaded.autocast():
            scores = score(self._model, pairs, self._batch_size)
        return [(each.nats, each.greedy) for each in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text. Each token is predicted once, in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self._text.end, self._model.max_seq_len, 1)
            parts = [Request(*make_disjoint_window(window)) for window in windows]
            pairs += parts
            owners += [i] * len(parts)
        totals = [0.0] * len(requests)
        with self._loaded.autocast():
            scores = score(self._model, pairs, self._batch_size)
        for i, each in zip(owners, scores):
            totals[i] += each.nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop of its task.

        Long contexts come first, because later batches then fit in the cache of the first one.
        """
        texts = [""] * len(requests)
        decoder = Decoder()
        arguments = [request.args for request in requests]
        order = sorted(
            range(len(requests)), key=lambda i: (str(arguments[i][1]), -len(arguments[i][0]))
        )
        for _, group in itertools.groupby(order, key=lambda i: str(arguments[i][1])):
            indices = list(group)
            options = arguments[indices[0]][1]
            for start in range(0, len(indices), self._batch_size):
                batch = indices[start : start + self._batch_size]
                answers = self._continue([arguments[i][0] for i in batch], options, decoder)
                for i, answer in zip(batch, answers):
                    texts[i] = answer
        return texts

    def _continue(
        self, contexts: Sequence[str], options: dict[str, Any], decoder: Decoder
    ) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        settings = normalize_gen_kwargs(options, _NEW_TOKENS)
        until = [stop for stop in settings["until"] if stop]
        unread = [name for name in _UNREAD if settings.get(name) is not None]
        if unread and settings["do_sample"]:
            raise ConfigError(
                f"a task samples with {unread[0]}, which is not read; remove it there"
            )
        new_tokens = settings["max_gen_toks"]
        room = self._model.max_seq_len - new_tokens
        if room < 1:
            raise ConfigError(
                f"a task generates {new_tokens} tokens, and the model's max_seq_len is "
                f"{self._model.max_seq_len}; lower max_gen_toks of the task"
            )
        prompts = [(self.tok_encode(text) or [self._text.end])[-room:] for text in contexts]

        def has_stop(prompt: Sequence[int], ids: Sequence[int]) -> bool:
            text = text_after(self._text, prompt, ids)
            return any(stop in text for stop in until)

        sampling = Sampling(
            new_tokens,
            settings.get("temperature", 0.0),  # absent if a task says nothing of sampling
            0,
            self._stops,
            complete=has_stop if until else None,
        )
        with self._loaded.autocast():
            rows = sample(self._model, prompts, sampling, decoder)
        texts = [text_after(self._text, prompt, row) for prompt, row in zip(prompts, rows)]
        return [_before(text, until) for text in texts]


def _before(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of some stops."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text
