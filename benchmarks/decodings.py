"""What greedy decoding, sampling, beam search and a repetition penalty give on the three demonstration prompts.

    python benchmarks/decodings.py --model output/checkpoint-epoch-3

Prints the answers of a checkpoint with what can be measured about them: the figures of docs/results.md.
"""

import argparse
import math
import statistics
import sys
from itertools import combinations
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import handspun
import train_inference as script
from handspun.runs.sample_answers import BEAM_PROMPT, GREEDY_PROMPT, SAMPLING_PROMPT

LIST_PROMPT = "Name three rivers in Europe."
RIGHT = "First, use n(n+1)/2. Then, 100 x 101 / 2 = 5050. The answer is 5050."
MOST = {"max_new_tokens": 128, "logprobs": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--base", default="smollm2-135m", help="the model before training")
    arguments = parser.parse_args()
    model = handspun.load(arguments.model)
    before(arguments.base)
    greedy(model)
    sampling(model)
    beams(model)
    penalty(model)
    right_answer(arguments.model)


def before(base: str) -> None:
    print("\n## Greedy, before training")
    for result in handspun.generate(handspun.load(base), [GREEDY_PROMPT, SAMPLING_PROMPT, BEAM_PROMPT], **MOST):
        show(result)


def greedy(model: handspun.ChatModel) -> None:
    """Each token with its probability, since an invented fact reads like any other."""
    print("\n## Greedy")
    for result in handspun.generate(model, [GREEDY_PROMPT, SAMPLING_PROMPT, BEAM_PROMPT], **MOST):
        show(result)
        assert result.logprobs is not None
        pairs = zip(result.token_ids, result.logprobs, strict=True)
        print(" ".join(f"{model.tokenizer.decode([token])!r}:{math.exp(logprob):.2f}" for token, logprob in pairs))


def sampling(model: handspun.ChatModel) -> None:
    """Three answers at each temperature, and twenty for the figures."""
    print("\n## Sampling")
    for temperature in (0.3, 0.7, 1.0, 1.5):
        results = handspun.generate(
            model,
            SAMPLING_PROMPT,
            do_sample=True,
            temperature=temperature,
            num_return_sequences=20,
            seed=0,
            **MOST,
        )
        print(f"\ntemperature {temperature}")
        for result in results[:3]:
            show(result)
        different = len({result.text for result in results})
        print(
            f"three: words not shared {words_apart(results[:3]):.0%}; twenty: {words_apart(results):.0%}, "
            f"{different} different texts, mean log-probability per token {per_token(results):.2f}, "
            f"ended by eos {sum(result.finish_reason == 'eos' for result in results)}"
        )


def words_apart(results: list[handspun.GenerationResult]) -> float:
    """Mean over all pairs: the share of their words that only one of the two has."""
    words = [set(result.text.lower().split()) for result in results]
    return statistics.mean(1 - len(a & b) / len(a | b) for a, b in combinations(words, 2))


def per_token(results: list[handspun.GenerationResult]) -> float:
    return statistics.mean(sum(result.logprobs or []) / len(result.token_ids) for result in results)


def beams(model: handspun.ChatModel) -> None:
    print("\n## Beams")
    for prompt in (BEAM_PROMPT, GREEDY_PROMPT, SAMPLING_PROMPT):
        for num_beams in (1, 2, 4, 8):
            print(f"\n{num_beams} beams")
            [result] = handspun.generate(model, prompt, num_beams=num_beams, **MOST)
            show(result)
    print("\n4 beams, length penalty 0")
    [result] = handspun.generate(model, BEAM_PROMPT, num_beams=4, length_penalty=0.0, **MOST)
    show(result)


def penalty(model: handspun.ChatModel) -> None:
    print("\n## Repetition penalty")
    for prompt in (BEAM_PROMPT, LIST_PROMPT):
        for value in (1.0, 1.1, 1.3, 1.5):
            print(f"\npenalty {value}")
            [result] = handspun.generate(model, prompt, repetition_penalty=value, **MOST)
            show(result)
        print("\npenalty 1.3, template exempt")
        exempt = {"repetition_penalty": 1.3, "repetition_penalty_exempt": "template"}
        show(handspun.generate(model, prompt, **exempt, **MOST)[0])


@torch.inference_mode()
def right_answer(checkpoint: str) -> None:
    """How probable the right sum is, which no beam gives."""
    model, tokenizer = script.load(checkpoint)
    row = script.encode_row(tokenizer, {"instruction": BEAM_PROMPT, "input": "", "output": RIGHT})
    loss_sum, tokens = script.batch_loss(model.eval(), [row])
    print(f"\n## The right sum\n{RIGHT}\n[{tokens} tokens, log-probability {-loss_sum:.2f}]")


def show(result: handspun.GenerationResult) -> None:
    assert result.logprobs is not None
    total = sum(result.logprobs)
    print(
        f"{result.text}\n[{len(result.token_ids)} tokens, ended by {result.finish_reason}, log-probability "
        f"{total:.2f}, {total / len(result.token_ids):.3f} per token]",
        flush=True,
    )


if __name__ == "__main__":
    main()
