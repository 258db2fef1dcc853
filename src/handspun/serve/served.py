"""`ServedModel`: a loaded model as requests use it. `Context`: what a handler is given besides the body."""

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handspun import __version__
from handspun.config import GenerationOptions
from handspun.config.serving import told_name
from handspun.decoding.constraint import Constraint, Grammar, compile_grammar, token_table
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.prompts import context_length
from handspun.decoding.text import Vocabulary, vocabulary
from handspun.display import captured_log
from handspun.errors import HandspunError
from handspun.files import read_json_object
from handspun.models.embedding_rows import embedding_rows
from handspun.models.fingerprints import model_fingerprints
from handspun.models.load import ChatModel, ModelSource, model_source
from handspun.runs.record import RUN_FILE
from handspun.serve.errors import ApiError

if TYPE_CHECKING:
    from handspun.config.serving import ServeOptions
    from handspun.serve.metrics import Metrics
    from handspun.serve.worker import Worker

_MAX_CONSTRAINTS = 64
_GRAMMAR_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
}
"""Below llguidance's defaults: its 250,000 states of the lexer would take up to 500 MB."""
_TOLD = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "do_sample", "min_new_tokens"),
)


@dataclass(eq=False)
class ServedModel:
    """A loaded model under the name that clients use."""

    name: str
    chat: ChatModel
    vocabulary: Vocabulary
    context: int | None
    """Most tokens of a prompt and its answer together."""
    fingerprint: str
    """Changes with weights, template, tokenizer, or version of Handspun: the same seed may answer differently."""
    vocabulary_id: str
    """The same for models whose token ids mean the same."""
    created: int
    base: str | None
    """The model that it was fine-tuned from, if its folder says so."""
    is_adapter: bool
    """Whether LoRA adapters are merged into the base's weights."""
    defaults: dict[str, Any]
    """Sampling options of requests that say nothing about them."""
    samples_by_default: bool
    """Whether requests that name no way of choosing tokens sample: the model's settings do not say otherwise."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the tokenizer or the template is used: neither is made for several threads."""
    _constraints: OrderedDict[str, Constraint] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, name: str, chat: ChatModel) -> "ServedModel":
        """Return a model ready for requests. Raises HandspunError if its own settings cannot be used."""
        config = chat.model.generation_config
        says = [getattr(config, option, None) for option in ("do_sample", "num_beams")]
        samples = says[0] is None and says[1] in (None, 1)
        is_chat = bool(chat.tokenizer.chat_template)
        params, _ = resolve(GenerationOptions(do_sample=samples or None), chat, chat=is_chat)
        source = _source(chat)
        made = cls(
            name=name,
            chat=chat,
            vocabulary=vocabulary(chat.tokenizer),
            context=context_length(chat),
            fingerprint=_fingerprint(chat, source),
            vocabulary_id=_hash_of("v", chat.tokenizer.get_vocab()),
            created=int(time.time()),
            base=None if source is None else _base(source),
            is_adapter=source is not None and source.adapter is not None,
            defaults={option: getattr(params, option) for option in _TOLD},
            samples_by_default=samples,
        )
        if params.eos_token_ids and getattr(chat.tokenizer, "is_fast", False):
            token_table(chat.tokenizer, made.constraint_eos(params))
        return made

    @cached_property
    def token_ids(self) -> int:
        """Number of token ids that the model knows."""
        return embedding_rows(self.chat.model)

    def constraint_eos(self, params: SamplingParams) -> tuple[int, ...]:
        """Return the tokens that may end a constrained answer."""
        return tuple(token for token in params.eos_token_ids if token < len(self.chat.tokenizer))

    def constraint(self, grammar: Grammar, params: SamplingParams) -> Constraint:
        """Return the constraint of a grammar, compiled at most once. Raises ConfigError."""
        eos = self.constraint_eos(params)
        key = f"{grammar.name} {eos} {grammar.text}"
        with self.lock:
            if (known := self._constraints.get(key)) is not None:
                self._constraints.move_to_end(key)
                return known.fresh()
        made = compile_grammar(grammar, self.chat.tokenizer, eos, _GRAMMAR_LIMITS)
        with self.lock:
            self._constraints[key] = made
            if len(self._constraints) > _MAX_CONSTRAINTS:
                self._constraints.popitem(last=False)
        return made.fresh()

    def describe(self) -> dict[str, Any]:
        """Return the model as GET /v1/models shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "handspun",
            "max_model_len": self.context,
            "weights": _weights(self.chat),
            "base_model": self.base,
            "adapter": self.is_adapter,
            "system_fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary_id,
            "defaults": self.defaults,
        }


@dataclass(frozen=True)
class Context:
    """What a handler is given besides the body."""

    models: Mapping[str, ServedModel]
    worker: "Worker"
    limits: "ServeOptions"
    request_id: str
    namespace: str = ""
    """Whose cached prompts may be used: from the API key."""
    metrics: "Metrics | None" = None
    log: dict[str, Any] = field(default_factory=dict)
    """What the request's line in the log says besides: model, token counts, seed, finish reason."""


def find_model(context: Context, name: str | None) -> ServedModel:
    """Return a served model. Raises ApiError. Names are looked up, and never opened as files."""
    if name is None and len(context.models) == 1:
        [model] = context.models.values()
    elif name is None:
        raise ApiError(
            f"model is missing. Use one of {', '.join(context.models)}.",
            code="missing_required_parameter",
            param="model",
        )
    elif name in context.models:
        model = context.models[name]
    else:
        raise ApiError(
            f"model: there is none of this name here. Use one of {', '.join(context.models)}.",
            "not_found_error",
            code="model_not_found",
            param="model",
        )
    context.log["model"] = model.name
    return model


def _weights(chat: ChatModel) -> str:
    return "int8" if chat.fused is not None else str(chat.model.dtype).removeprefix("torch.")


def _source(chat: ChatModel) -> ModelSource | None:
    try:
        with captured_log():  # loading has said which checkpoint it is
            return model_source(chat.name)
    except HandspunError:  # a model that was made in memory has no files
        return None


def _base(source: ModelSource) -> str | None:
    """Return the name of an adapter's base, or of the model that a run has fine-tuned."""
    if source.base is not None:
        return told_name(source.base)
    config = (read_json_object(Path(source.location).parent / RUN_FILE) or {}).get("config")
    name = config.get("model") if isinstance(config, dict) else None
    return told_name(name) if isinstance(name, str) else None


def _fingerprint(chat: ChatModel, source: ModelSource | None) -> str:
    """Return a name for what decides a seed's answer."""
    known: dict[str, Any] = {
        "version": __version__,
        "weights": _weights(chat),
        "template_args": chat.template_args,
        "config": chat.model.config.to_dict(),
    }
    known |= {"name": chat.name} if source is None else model_fingerprints(source, chat.tokenizer)
    return _hash_of("fp", known)


def _hash_of(kind: str, value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return f"{kind}_{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
