"""`lm-eval` through `handspun serve` against `handspun eval`: the log-likelihood of each row's answer, by both.

    pip install 'lm-eval[api]' transformers datasets        # in an environment of its own
    python benchmarks/lm_eval_rows.py --lm-eval PATH/TO/bin/lm_eval --model FOLDER --data ROWS.csv [--weights int8]

lm-eval moves white space at a prompt's end into the answer. So both use a chat template whose prompts end with a
special token, and what they score is the same. It ends with 1 if two log-likelihoods differ by more than 0.001.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import handspun
from handspun.config import DataConfig
from handspun.data.dataset import example_set
from handspun.data.rows import read_sources
from handspun.models.embedded import EMBEDDED_NAME, embedded_folder
from measurements import table
from serve import free_port, running

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant<|im_start|>{% endif %}"
)
TASK = """\
task: handspun_rows
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
LARGEST_DIFFERENCE = 1e-3


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "template.jinja").write_text(TEMPLATE)
        texts = write_rows(arguments, folder)
        own = losses(arguments, folder)
        theirs = log_likelihoods(arguments, folder)
    rows = []
    for (prompt, answer), loss in zip(texts, own, strict=True):
        found = theirs[prompt, answer]
        rows.append([answer[:30], f"{-loss:.6f}", f"{found:.6f}", f"{abs(found + loss):.1e}"])
    print(table(["answer", "handspun eval", "lm-eval", "difference"], rows))
    differences = [abs(theirs[text] + loss) for text, loss in zip(texts, own, strict=True)]
    print(f"{len(rows)} rows, {arguments.weights}, largest difference {max(differences):.2e}")
    sys.exit(max(differences) > LARGEST_DIFFERENCE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="its program")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a folder, or smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=20, help="of rows")
    parser.add_argument("--weights", default="int8")
    return parser.parse_args()


def write_rows(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    """Write the rows as lm-eval reads them, and return them: the text before the answer, and the answer's."""
    chat = handspun.load(arguments.model, device="cpu", chat_template=str(folder / "template.jinja"))
    config = DataConfig(data=arguments.data, limit=arguments.limit)
    notes: dict[str, list[str]] = {}
    made = example_set(
        read_sources(config.sources, notes, config.column_names, config.limit),
        config,
        chat.template,
        max_length=2048,
        file_notes=notes,
    )
    found = []
    for one in made.examples:
        first, last = one.loss_mask.index(True), len(one) - one.loss_mask[::-1].index(True)
        found.append(
            (chat.tokenizer.decode(one.input_ids[:first]), chat.tokenizer.decode(one.input_ids[first:last]))
        )
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in found]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "task.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return found


def losses(arguments: argparse.Namespace, folder: Path) -> list[float]:
    """The rows' losses by `handspun eval`, summed over tokens."""
    given = ["--weights", arguments.weights, "--device", "cpu", "--limit", str(arguments.limit)]
    template = ["--chat-template", str(folder / "template.jinja"), "--per-row", str(folder / "scores.jsonl")]
    command = [sys.executable, "-m", "handspun", "eval", arguments.data, "--model", arguments.model]
    subprocess.run([*command, *given, *template], check=True)
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    return [score["loss"] * score["tokens"] for score in scores]


def log_likelihoods(arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], float]:
    """lm-eval's figures, by prompt and answer."""
    port = free_port()
    command = [sys.executable, "-m", "handspun", "serve", f"model={arguments.model}", "--port", str(port)]
    tokenizer = embedded_folder() if arguments.model == EMBEDDED_NAME else arguments.model
    told: dict[str, Any] = {
        "model": "model",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": tokenizer,
        "tokenized_requests": True,
        "num_concurrent": 4,
        "max_length": 2048,
    }
    evaluate = [
        *(str(arguments.lm_eval), "--model", "local-completions", "--tasks", "handspun_rows"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in told.items())),
        *("--include_path", str(folder), "--log_samples", "--output_path", str(folder / "out")),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with running([*command, "--weights", arguments.weights, "--no-log-requests"], port):
        subprocess.run(evaluate, check=True, env={**environment, "HF_HUB_OFFLINE": "1"})
    [samples] = (folder / "out").rglob("samples_handspun_rows_*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc"]["prompt"], sample["doc"]["answer"]] = float(sample["resps"][0][0][0])
    return found


if __name__ == "__main__":
    main()
