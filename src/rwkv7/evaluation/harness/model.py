"""A model of ours as lm-evaluation-harness sees one: texts in, scores and texts out.

The harness's base class cuts texts into contexts and continuations, so that figures can be put
beside those of other models. Imported by name alone: lm-eval has to be installed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from rwkv7.chat import template_called
from rwkv7.engine import Engine, Handle, PrefixCache, Request
from rwkv7.evaluation import carried_bits, scores_as_they_come
from rwkv7.machine import device_called, dtype_called
from rwkv7.nn import RWKV7
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import Tokenizer, tokenizer_of
from rwkv7.turns import END, ROLES, turn
from rwkv7.weights import load_model

__all__ = ["HarnessModel"]

CACHE_BYTES = 1 << 30  # of states after beginnings that prompts share
CARRIED_FROM = 8192  # ids; longer texts are read one by one, in windows
MAX_TOKENS = 256  # of a text where a task names no limit, as in the harness's own models

_ARGUMENTS = ("path", "tokenizer", "dtype", "device", "slots", "template")
_IGNORED = ("batch_size", "max_batch_size")  # batches are packed by their tokens
_UNSAID_DEVICE = "cuda:0"  # what the harness's command line says where nobody did
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_CUTS = ("top_k", "top_p", "min_p")

_THOUGHT = "</think>"  # the end of one
# The form of a conversation as the harness keeps it with its results; a template's opening follows.
_JINJA = (
    f"{{% for message in messages %}}{{{{ {ROLES}[message['role']] }}}}: "
    r"{{ (message['content'] | replace('\r\n', '\n') | trim).split('\n') | select | join('\n') }}"
    r"{{ '\n\n' }}{% endfor %}"
)


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests, each as if it were alone.

    Every text is read after an end of document, as RWKV's models are trained, or after a new line
    where the tokenizer has none and the context is empty. Nothing is ever truncated.

    Args:
        model: in evaluation mode; on any device.
        tokenizer: the model's.
        slots: how many texts are written at once.
        template: of conversations, where the harness is asked for them: a name in
            `rwkv7.chat.TEMPLATES`.

    Raises ValueError for an unknown template.
    """

    def __init__(
        self, model: RWKV7, tokenizer: Tokenizer, slots: int = 32, template: str = "plain"
    ) -> None:
        super().__init__()
        self._choose(template)
        self._model, self._text, self._slots = model, tokenizer, slots
        self._device = model.device

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """From "path=…,tokenizer=…", as `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """From the arguments that `register` lists; ValueError names what is unknown or missing."""
        given = {**arg_dict, **(additional_config or {})}
        unknown = set(given) - {*_ARGUMENTS, *_IGNORED}
        if unknown or not given.get("path"):
            found = ", ".join(sorted(unknown)) or "no path"
            raise ValueError(f"model_args: expected {', '.join(_ARGUMENTS)}, found {found}")
        dtype = dtype_called(str(given["dtype"])) if given.get("dtype") else None
        name = given.get("device")
        if name == _UNSAID_DEVICE and not torch.cuda.is_available():
            name = None
        model = load_model(str(given["path"]), device=device_called(name), dtype=dtype).eval()
        tokenizer = tokenizer_of(model.config.vocab_size, given.get("tokenizer"))
        slots, template = int(given.get("slots", 32)), str(given.get("template", "plain"))
        return cls(model, tokenizer, slots, template)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps cached requests apart by, in names of files."""
        return re.sub(r"[^\w.-]+", "__", f"{self._text.name}-{self._name}")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The form of conversations, in Jinja, for the harness to keep; a name chooses a template.

        None for False. ValueError for an unknown name.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            self._choose(chat_template)
        return f"{_JINJA}{{% if add_generation_prompt %}}{self._prompt}{{% endif %}}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to where the assistant answers.

        Without `add_generation_prompt` its last message stays open, for the model to go on with.
        ValueError for what is no message.
        """
        text = "".join(f"{name}: {said}{END}" for name, said in map(turn, chat_history))
        if add_generation_prompt:
            return text + self._prompt
        last = chat_history[-1]["content"] if chat_history else ""
        return text.removesuffix(END) + last[len(last.rstrip()) :]

    @property
    def eot_token_id(self) -> int:
        """The id between two documents, or of a new line where there is none."""
        end = self._text.end_of_document
        return self._text.encode("\n")[0] if end is None else end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of `string`; special tokens are never added here."""
        return self._text.encode(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The logarithm of each text's probability, the state carried from its start to its end."""
        texts = [request.args[0] for request in requests]
        ids = [self._text.encode(text) for text in texts]
        found = [0.0] * len(texts)
        short = [i for i, tokens in enumerate(ids) if len(tokens) <= CARRIED_FROM]
        pairs = [([self.prefix_token_id], ids[i]) for i in short]
        with tqdm(total=len(texts), desc="rolling", disable=disable_tqdm) as progress:
            for place, score in scores_as_they_come(self._model, pairs):
                found[short[place]] = score.log_probability
                progress.update()
            for i in sorted(set(range(len(texts))) - set(short)):
                bits = carried_bits(self._model, [self.prefix_token_id, *ids[i]])
                found[i] = -bits * math.log(2)
                progress.update()
        for text, result in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A text after each prompt, up to a stop string, an end of document or a limit.

        What prompts begin with is read once. ValueError for a setting that is not known here.
        """
        jobs = [self._request(*request.args) for request in requests]
        if not jobs:
            return []
        engine = Engine(
            self._model,
            slots=min(self._slots, len(jobs)),
            cache=PrefixCache(self._model, CACHE_BYTES),
            decode=self._text.decode_bytes,
        )
        handles: list[Handle] = [engine.submit(job) for job in jobs]
        found = []
        for request, handle in zip(
            requests, tqdm(handles, desc="writing", disable=disable_tqdm), strict=True
        ):
            found.append(self._answer(handle.result().text, *request.args))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        pairs = [(self._after_end(context), rest) for _, context, rest in requests]
        found = [(0.0, True)] * len(pairs)
        scores = scores_as_they_come(self._model, pairs)
        for i, score in tqdm(scores, total=len(pairs), desc="scoring", disable=disable_tqdm):
            found[i] = score.log_probability, score.greedy
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def _choose(self, template: str) -> None:
        self._name, self._template = template, template_called(template)
        self._opening = self._template.opening or " "
        if f"{self._opening}>".endswith(_THOUGHT):
            self._opening += ">\n"  # else a choice that is scored would follow the open tag
        # The blank at its end belongs to the answer, but the harness's choices have none after a
        # template: its base class takes it from here to score them, `_request` leaves it out.
        self._prompt = f"{ROLES['assistant']}:{self._opening}"

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        given = {name: x for name, x in settings.items() if x is not None}
        stops = _until(settings)
        given.pop("until", None)
        if context.endswith(self._prompt):
            context = context.rstrip()
            # A thought may hold what ends the answer after it.
            stops = [self._template.stop, *([] if self._template.opening else stops)]
        limits = [int(given.pop(name)) for name in _LIMITS if name in given]
        samples = given.pop("do_sample", None)
        temperature = float(given.pop("temperature", 1.0 if samples else 0.0))
        cuts = {name: given.pop(name) for name in _CUTS if name in given}
        if given.pop("num_beams", 1) != 1 or given:
            name = next(iter(given), "num_beams")
            raise ValueError(
                f"generation_kwargs: expected until, do_sample, temperature, {', '.join(_CUTS)} "
                f"or a limit such as max_gen_toks, found {name}"
            )
        # The harness seeds torch, so that a run gives the same texts again.
        seed = int(torch.randint(2**62, ()))
        chosen = 0.0 if samples is False else temperature
        end = self._text.end_of_document
        return Request(
            self._after_end(self._text.encode(context)),
            max_tokens=limits[0] if limits else MAX_TOKENS,
            sampler=Sampler(chosen, seed=seed, order="hf", **cuts),
            stop_tokens=() if end is None else (end,),
            stop_strings=stops,
        )

    def _answer(self, text: str, context: str, settings: Mapping[str, Any]) -> str:
        """What the harness gets of the text that was written: an answer less the thought."""
        if not context.endswith(self._prompt):
            return text
        if not self._template.opening:
            return text.removeprefix(" ")
        answer = (self._opening + text).rpartition(_THOUGHT)[2].lstrip()
        for stop in _until(settings):
            answer = answer.partition(stop)[0]
        return answer

    def _after_end(self, ids: list[int]) -> list[int]:
        end = self._text.end_of_document
        if end is None or ids[:1] == [end]:
            return ids or [self.prefix_token_id]
        return [end, *ids]


def _until(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
