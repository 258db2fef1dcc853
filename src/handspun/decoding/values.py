"""Values of options as they may be given, and as decoding holds them."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from handspun.config import option_name
from handspun.decoding.schema import read_schema


def concrete(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the same options as decoding holds them: runs of ids for words and biases, JSON for files.

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
    """Return what is wrong with token ids that the model has no logits for."""
    problems = []
    for name in ("logit_bias", "sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        runs = [item if isinstance(item, tuple) else (item,) for item in values.get(name, ())]
        ids = [token for run in runs for token in (run[0] if isinstance(run[0], tuple) else run)]
        beyond = sorted({token for token in ids if token >= vocabulary})
        if beyond:
            few = ", ".join(map(str, beyond[:_MOST_NAMED])) + (", ..." if len(beyond) > _MOST_NAMED else "")
            problems.append(
                f"{option_name(name)} has {few}: the model's token ids end at {vocabulary - 1}. They may be those "
                "of another tokenizer."
            )
    return problems


def _words_ids(words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised alone and behind a space."""
    spelled = [prefix + word.lstrip(" ") for word in words for prefix in ("", " ")]
    runs = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spelled]
    return tuple(dict.fromkeys(run for run in runs if run))


_MOST_NAMED = 5

__all__ = ["check_vocabulary", "concrete"]
