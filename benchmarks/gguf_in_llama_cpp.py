"""What llama.cpp makes of the files that `handspun export --gguf` writes, against the model itself.

    python benchmarks/gguf_in_llama_cpp.py [--model FOLDER] [--kinds f32 f16 q8_0] [--python PYTHON]

Tokens of texts, logits behind a prompt, and greedy tokens; in an environment that has llama-cpp-python.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import handspun
from handspun.exports.gguf_file import write_gguf
from handspun.models.embedded import EMBEDDED_NAME
from measurements import HERE, run_process, table

NEW_TOKENS = 40
PROMPT = "Give me a brief introduction to Shanghai Jiao Tong University."
TEXTS = [
    "Tell me a joke about computers.",
    "It's 1,234.5 — naïve café\n\n  user  12   x\t\ty",
    "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x):\n    return x**2  # 中文 テスト 🙂",
    "  leading",
    "I'LL  DON'T we've 100000",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_NAME)
    parser.add_argument("--kinds", nargs="+", default=["f32", "f16", "q8_0"])
    parser.add_argument("--python", type=Path, default=HERE.parent / ".venv-peers-decoding" / "bin" / "python")
    arguments = parser.parse_args()
    chat = handspun.load(arguments.model, weights="float32", device="cpu")
    prompt_ids = chat.template.encode_prompt([{"role": "user", "content": PROMPT}], None)
    with torch.no_grad():
        logits: torch.Tensor = chat.model(torch.tensor([prompt_ids])).logits[0, -1]
    [own] = handspun.generate(chat, PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens = [chat.tokenizer(text)["input_ids"] for text in TEXTS]
    rows = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(chat, file, kind)
            job = {"file": str(file), "texts": TEXTS, "prompt_ids": prompt_ids, "new_tokens": NEW_TOKENS}
            found = read_in_llama_cpp(arguments.python, job)
        same_texts = sum(a == b for a, b in zip(tokens, found["tokens"], strict=True))
        same = next(
            (i for i, (a, b) in enumerate(zip(own.token_ids, found["answer"], strict=False)) if a != b), NEW_TOKENS
        )
        difference = (torch.tensor(found["logits"]) - logits).abs().max().item()
        rows.append([kind, f"{same_texts} of {len(TEXTS)}", f"{difference:.4f}", f"{same} of {NEW_TOKENS}"])
    spread = (logits.max() - logits.min()).item()
    print(f"{arguments.model}: logits from {logits.min():.1f} to {logits.max():.1f}, a range of {spread:.1f}")
    print(
        table(
            ["file", "texts with the same tokens", "logits differ by", "first greedy tokens that are the same"],
            rows,
        )
    )


def read_in_llama_cpp(python: Path, job: dict[str, Any]) -> Any:
    """Tokens, logits and answer, from a process of its own."""
    done = run_process([python, HERE / "contenders" / "llama_cpp_read.py", json.dumps(job)])
    return json.loads(done.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
