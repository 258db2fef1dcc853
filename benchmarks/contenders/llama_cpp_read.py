"""What llama.cpp makes of a GGUF file. Argument: {"file", "texts", "prompt_ids", "new_tokens"} as JSON.

Prints the tokens of each text, the logits behind the prompt, and the greedy tokens that follow.
"""

import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    job = json.loads(sys.argv[1])
    model = llama_cpp.Llama(job["file"], n_ctx=512, n_threads=1, verbose=False)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    model.eval(job["prompt_ids"])
    first = next_logits(model)
    answer = [int(first.argmax())]
    while len(answer) < job["new_tokens"]:
        model.eval(answer[-1:])
        answer.append(int(next_logits(model).argmax()))
    print(json.dumps({"tokens": tokens, "logits": first.tolist(), "answer": answer}))


def next_logits(model: llama_cpp.Llama) -> np.ndarray:
    """(vocab,): behind the last token."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(logits, (model.n_vocab(),)).copy()


if __name__ == "__main__":
    main()
