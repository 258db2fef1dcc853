"""What `lm-eval` computes from /v1/completions is what `handspun eval` computes from the weights.

benchmarks/lm_eval_rows.py runs lm-eval itself. Here its arithmetic is repeated: the request of its model
local-completions, and what it reads from the answer.
"""

from typing import Any

import pytest

from asking import served_chat
from handspun.data.examples import Example
from handspun.evaluation.losses import row_losses
from handspun.models.load import ChatModel
from live import COMPLETIONS, Live, live
from tiny import tiny_model, tiny_tokenizer

TEXTS = [("Give me a joke", "The answer is red."), ("List", "three colours: red, green, blue."), ("Hi", "é 你好")]


def loglikelihoods(server: Live, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """As lm-eval's LocalCompletionsAPI: one token more is asked for, which it leaves out again."""
    body = {"prompt": [before + after for before, after in pairs], "temperature": 0, "max_tokens": 1}
    answer = server.answer(COMPLETIONS, **body, logprobs=1, seed=1234, echo=True)
    found = []
    for choice, (before, _) in zip(answer["choices"], pairs, strict=True):
        scores = choice["logprobs"]
        own, best = scores["token_logprobs"][len(before) : -1], scores["top_logprobs"][len(before) : -1]
        is_greedy = all(value == max(top.values()) for value, top in zip(own, best, strict=True))
        found.append((sum(own), is_greedy))
    return found


def example(chat: ChatModel, prompt: str, answer: str, number: int) -> Example:
    before = chat.template.encode_prompt([{"role": "user", "content": prompt}])
    after = [*chat.tokenizer(answer)["input_ids"], chat.tokenizer.eos_token_id]
    return Example(before + after, [False] * len(before) + [True] * len(after), "rows.csv", number)


def with_float_weights() -> ChatModel:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return ChatModel(tiny_model("llama", initializer_range=0.1, **sizes), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize("make", [with_float_weights, served_chat], ids=["float32", "int8"])
def test_log_likelihoods_are_the_losses_of_eval(make: Any) -> None:
    chat = make()
    examples = [example(chat, prompt, answer, number) for number, (prompt, answer) in enumerate(TEXTS)]
    losses = row_losses(chat, examples, batch_size=2)
    pairs = [(one.input_ids[: one.loss_mask.index(True)], one.input_ids[one.loss_mask.index(True) :])
             for one in examples]  # fmt: skip
    with live(chat) as server:
        found = loglikelihoods(server, pairs)
    for one, (loglikelihood, is_greedy) in zip(examples, found, strict=True):
        loss, tokens = losses[one.file, one.row]
        assert tokens == one.learned_tokens > 5
        assert loglikelihood == pytest.approx(-loss, rel=1e-5)
        assert loglikelihood < -10
        assert not is_greedy


def test_the_model_s_own_greedy_answer_is_greedy() -> None:
    with live(served_chat()) as server:
        prompt = [65, 66, 67]
        answer = server.answer(COMPLETIONS, prompt=prompt, temperature=0, max_tokens=8, return_token_ids=True)
        [(_, is_greedy), (_, is_other)] = loglikelihoods(
            server, [(prompt, answer["choices"][0]["token_ids"]), (prompt, [68, 69])]
        )
    assert is_greedy
    assert not is_other
