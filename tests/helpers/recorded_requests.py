"""32 requests of all kinds, whose answers must not depend on what else the server does."""

from typing import Any

_TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
_LONG = "Give me a brief introduction to the city. What is the sum of the first numbers? " * 6
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["b"],
}


def _chat(text: str, **body: Any) -> tuple[str, dict[str, Any]]:
    system = {"role": "system", "content": _LONG}
    messages = [system, {"role": "user", "content": text}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 24, "seed": len(text), **body}


def _plain(prompt: Any, **body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": prompt, "max_tokens": 24, "seed": 7, **body}


RECORDED: list[tuple[str, dict[str, Any]]] = [
    # greedy
    _chat("Hi", temperature=0),
    _chat("Tell me a joke.", temperature=0, logprobs=True, top_logprobs=5),
    _plain("The answer is", temperature=0),
    _plain(_LONG * 3, temperature=0, ignore_eos=True),
    _plain(["one", "two", _LONG], temperature=0, logprobs=3),
    _plain(_LONG * 2, temperature=0, echo=True, logprobs=5, max_tokens=0),
    # sampled
    _chat("Hi", ignore_eos=True, max_tokens=60),
    _chat("List three colours", n=4, logprobs=True, top_logprobs=2),
    _chat("Hi", temperature=1.7, top_p=0.9, min_p=0.01),
    _chat("Hello", temperature=0.3, top_k=7, repetition_penalty=1.2),
    _chat("Hi there", frequency_penalty=1, presence_penalty=0.5, ignore_eos=True),
    _chat("A", typical_p=0.5, no_repeat_ngram_size=2),
    _chat("B", logit_bias={"65": 4, "66": -100}, ignore_eos=True),
    _chat("C", stop=["e", "the"], ignore_eos=True, max_tokens=90),
    _chat("D", bad_words=["a"], min_tokens=10),
    _plain(_LONG * 4, seed=2, ignore_eos=True),
    _plain(_LONG * 4 + "And", seed=2, ignore_eos=True, logprobs=0),
    _plain("Hi", n=3, best_of=6),
    _plain([65, 66, 67, 68], n=5, echo=True, logprobs=2),
    # beams
    _chat("Hi", num_beams=4),
    _chat("Tell me", num_beams=3, n=3, length_penalty=0.5, logprobs=True),
    _plain("The user", num_beams=5, early_stopping=True, max_tokens=30),
    _plain(_LONG, num_beams=2, repetition_penalty=1.3),
    # constrained
    _chat("Hi", response_format={"type": "json_object"}, max_tokens=40),
    _chat("Hi", response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}),
    _chat("Red or green?", structured_outputs={"choice": ["red", "green", "reddish"]}, n=3),
    _plain("Digits:", guided_regex="[0-9]{3}(-[a-z]{4}){2}"),
    # tools
    _chat("Weather?", tools=[_TOOL], tool_choice="required", max_tokens=60),
    _chat("Weather now?", tools=[_TOOL], ignore_eos=True),
    # drafts
    _chat("Rewrite this sentence", temperature=0, prompt_lookup_num_tokens=5, ignore_eos=True, max_tokens=80),
    _chat("Rewrite", prompt_lookup_num_tokens=3, ignore_eos=True, max_tokens=60),
    _plain("abcabcabcabc", prompt_lookup_num_tokens=8, ignore_eos=True, max_tokens=80, temperature=0),
]
