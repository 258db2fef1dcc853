"""Resolve generation options: the user's values, then the model's generation_config, then the defaults."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from handspun.config import CONSTRAINTS, NEXT_USER, SAMPLING_OPTIONS, GenerationOptions, option_name, read_option
from handspun.config.typed import as_type
from handspun.decoding.filters import Bias
from handspun.decoding.schema import read_schema
from handspun.errors import ConfigError
from handspun.models.embedding_rows import embedding_rows
from handspun.models.end_of_turn import eos_token_ids
from handspun.models.load import ChatModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def normalize(values: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the options in decoding's form: token ids for words and biases, JSON text for schemas.

    Raises ConfigError for a schema that cannot be read.
    """
    made = dict(values)
    for name in {"logit_bias", "sequence_bias"} & made.keys():
        made[name] = tuple((tuple(map(int, ids.split())), bias) for ids, bias in made[name].items())
    if "json_schema" in made:
        made["json_schema"] = read_schema(made["json_schema"])
    if "bad_words" in made:
        made["bad_words_ids"] = made.get("bad_words_ids", ()) + _words_ids(made.pop("bad_words"), tokenizer)
    return made


def check_vocabulary(values: dict[str, Any], vocabulary: int) -> list[str]:
    """Return one problem per option with token ids beyond the model's vocabulary."""
    problems = []
    for name in ("logit_bias", "sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        runs = [item if isinstance(item, tuple) else (item,) for item in values.get(name, ())]
        ids = [token for run in runs for token in (run[0] if isinstance(run[0], tuple) else run)]
        beyond = sorted({token for token in ids if token >= vocabulary})
        if beyond:
            few = ", ".join(map(str, beyond[:_MOST_NAMED])) + (", ..." if len(beyond) > _MOST_NAMED else "")
            problems.append(
                f"{option_name(name)} has {few}, but the model's token ids end at {vocabulary - 1}. Use ids of "
                "this model's tokenizer."
            )
    return problems


def _words_ids(words: tuple[str, ...], tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each word, both alone and after a space."""
    spelled = [prefix + word.lstrip(" ") for word in words for prefix in ("", " ")]
    runs = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spelled]
    return tuple(dict.fromkeys(run for run in runs if run))


_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """GenerationOptions with every value set. The defaults are those that its help texts name."""

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_penalty_exempt: Literal["none", "template"] = "none"
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[Bias, ...] = ()
    sequence_bias: tuple[Bias, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Includes the ids of bad_words."""
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    json_schema: str | None = None
    """JSON text of the schema."""
    regex: str | None = None
    choice: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 2
    stop_strings: tuple[str, ...] = ()
    seed: int | tuple[int, ...] = 0
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    pad_token_id: int = 0
    """Fills the left of shorter prompts. The attention mask, not this id, marks padding."""
    unpenalized_ids: frozenset[int] = frozenset()
    """Tokens exempt from the repetition penalty."""


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(SamplingParams)}
_BEAMS = ("length_penalty", "early_stopping")
_ALWAYS_USED = (
    "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "sequence_bias",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings",
)  # fmt: skip
# Settings of a generation_config that change what transformers generates and that have no counterpart here, each
# with the value that disables it.
_UNSUPPORTED: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_length": 20,
    "min_length": 0,
    "num_beam_groups": 1,
    "top_h": None,
    "watermarking_config": None,
}


def resolve(given: GenerationOptions, model: ChatModel, *, chat: bool) -> tuple[SamplingParams, list[str]]:
    """Return the value of every option, and notices about values that come from the model.

    Raises ConfigError if an option of the user has no effect or is not supported.
    """
    chosen = {field.name: getattr(given, field.name) for field in fields(given)}
    chosen = normalize({name: value for name, value in chosen.items() if value is not None}, model.tokenizer)
    own, unreadable = _model_settings(
        model, (*_ALWAYS_USED, *SAMPLING_OPTIONS, *_BEAMS, "do_sample", "num_beams", "num_return_sequences")
    )
    vocabulary = embedding_rows(model.model)
    if problems := check_vocabulary(chosen, vocabulary):
        raise ConfigError(problems)
    taken = {name: value for name, value in _inherited(chosen, own).items() if value != _DEFAULTS[name]}
    needed = (
        _inherited(chosen, {**own, **{name: _DEFAULTS[name] for name in unreadable}}).keys() & unreadable.keys()
    )
    _check_inherited(taken, _strategy(chosen, own), [unreadable[name] for name in sorted(needed)], vocabulary)
    constrained = any(name in chosen for name in CONSTRAINTS)
    defaults = {"stop_strings": _default_stop_strings(model) if chat and not constrained else ()}
    options = SamplingParams(
        **{**defaults, **taken, **chosen, **_strategy(chosen, own)},
        eos_token_ids=_eos_token_ids(model, chat=chat),
        pad_token_id=_pad_token_id(model),
        unpenalized_ids=_unpenalized_ids(chosen, model),
    )
    _check(options, chosen)
    return options, _notices(taken, model, options)


def _model_settings(model: ChatModel, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of the model's generation_config, and the problems of those that cannot be read."""
    # transformers' global defaults (such as top_k 50) are None in the config, and so are not included.
    config = model.model.generation_config
    found, unreadable = dict[str, Any](), dict[str, str]()
    for name in names:
        try:
            value = read_option(name, getattr(config, name, None))
        except ValueError as error:
            unreadable[name] = str(error)
        else:
            found |= {} if value is None else {name: value}
    return normalize(found, model.tokenizer), unreadable


def _strategy(chosen: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return do_sample and num_beams, which exclude each other.

    The user's choice wins over the model's: a sampling option means sampling, num_beams beam search, and a
    temperature of 0 greedy decoding.
    """
    if chosen.get("num_beams", 1) > 1:
        return {"do_sample": False, "num_beams": chosen["num_beams"]}
    wants_sampling = any(name in chosen for name in SAMPLING_OPTIONS) or own.get("do_sample", False)
    sample = chosen.get("do_sample", wants_sampling)
    if chosen.get("temperature", own.get("temperature") if sample else None) == 0:
        return {"do_sample": False, "num_beams": 1}
    if sample:
        return {"do_sample": True, "num_beams": 1}
    return {"do_sample": False, "num_beams": chosen.get("num_beams", own.get("num_beams", 1))}


def _inherited(chosen: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the settings inherited from the model: those that the user did not give and that have an effect."""
    strategy = _strategy(chosen, own)
    names: tuple[str, ...] = (*_ALWAYS_USED, "do_sample", "num_beams")
    names += SAMPLING_OPTIONS if strategy["do_sample"] else ()
    if chosen.get("do_sample", own.get("do_sample")) and own.get("temperature") == 0:
        names += ("temperature",)  # so that the notice shows why nothing is sampled
    names += _BEAMS if strategy["num_beams"] > 1 else ()
    values = {**own, **strategy}
    if strategy["do_sample"] or own.get("num_return_sequences", 1) <= strategy["num_beams"]:
        names += ("num_return_sequences",)
    return {name: values[name] for name in names if name in own and name not in chosen}


def _check_inherited(
    taken: dict[str, Any], strategy: dict[str, Any], unreadable: list[str], vocabulary: int
) -> None:
    problems = unreadable + check_vocabulary(taken, vocabulary)
    if not problems:
        options = {name: value for name, value in taken.items() if not name.endswith("_bias")}
        strategy = {"do_sample": strategy["do_sample"] or None, "num_beams": strategy["num_beams"]}
        try:
            GenerationOptions(**{**options, **strategy})
        except ConfigError as error:
            problems = error.problems
    if problems:
        what = "the model's generation_config cannot be used"
        raise ConfigError([f"{what}: {problem} Give your own value to override it." for problem in problems])


def _check(options: SamplingParams, chosen: dict[str, Any]) -> None:
    problems = []
    returned = options.num_return_sequences
    if not options.do_sample and returned > options.num_beams:
        problems.append(
            f"--num-return-sequences {returned} needs {returned} different answers, but there is "
            f"{'one greedy answer' if options.num_beams == 1 else f'only --num-beams {options.num_beams}'}. "
            f"Add --do-sample or --num-beams {returned}."
        )
    if options.repetition_penalty_exempt == "template" and options.repetition_penalty == 1.0:
        problems.append(
            "--repetition-penalty-exempt has no effect without a repetition penalty. Add one, for example "
            "--repetition-penalty 1.1."
        )
    if options.prompt_lookup_num_tokens and options.num_beams > 1:
        problems.append(
            f"--prompt-lookup-num-tokens {options.prompt_lookup_num_tokens} does not work with beam search "
            f"(--num-beams {options.num_beams}). Remove it, or use --num-beams 1."
        )
    if "max_matching_ngram_size" in chosen and not options.prompt_lookup_num_tokens:
        problems.append(
            "--max-matching-ngram-size has no effect without prompt lookup. Add --prompt-lookup-num-tokens, for "
            "example --prompt-lookup-num-tokens 10."
        )
    if problems:
        raise ConfigError(problems)


def _notices(taken: dict[str, Any], model: ChatModel, options: SamplingParams) -> list[str]:
    notices = []
    if taken:
        values = ", ".join(f"{name} {value}" for name, value in sorted(taken.items()))
        greedy = ", which is greedy decoding" if taken.get("temperature") == 0 else ""
        notices.append(f"from the model's generation_config: {values}{greedy}")
    config = model.model.generation_config
    settings = {name: getattr(config, name, None) for name in _UNSUPPORTED}
    other = {name: value for name, value in settings.items() if value is not None and value != _UNSUPPORTED[name]}
    if other:
        values = ", ".join(f"{name} {value}" for name, value in sorted(other.items()))
        notices.append(f"ignored settings of the model's generation_config (not supported here): {values}")
    if not options.eos_token_ids:
        notices.append(
            "neither the model nor its tokenizer has an end-of-sequence token: answers end at a stop string or at "
            "max_new_tokens"
        )
    return notices


def _default_stop_strings(model: ChatModel) -> tuple[str, ...]:
    return model.template.end_of_turn, NEXT_USER


def _unpenalized_ids(chosen: dict[str, Any], model: ChatModel) -> frozenset[int]:
    exempt = chosen.get("repetition_penalty_exempt") == "template"
    return frozenset(model.tokenizer.added_tokens_decoder) if exempt else frozenset()


def _eos_token_ids(model: ChatModel, *, chat: bool) -> tuple[int, ...]:
    try:
        eos = list(as_type(eos_token_ids(model.model), tuple[int, ...]))
    except ValueError as error:
        raise ConfigError(f"the model's eos_token_id is invalid (expected {error}). Correct it.") from None
    if not eos and model.tokenizer.eos_token_id is not None:
        eos = [model.tokenizer.eos_token_id]
    if chat:
        eos.append(model.template.end_of_turn_id)
    return tuple(dict.fromkeys(eos))


def _pad_token_id(model: ChatModel) -> int:
    """Return a pad id that the model's embeddings contain."""
    # Some models name an id outside their embeddings (-1). Padding is masked, so 0 is as good as any other id.
    rows = embedding_rows(model.model)
    for pad in (getattr(model.model.generation_config, "pad_token_id", None), model.tokenizer.pad_token_id):
        if isinstance(pad, int) and 0 <= pad < rows:
            return pad
    return 0
