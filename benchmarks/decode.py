"""Decoding, Handspun against transformers, CTranslate2, llama.cpp and OpenVINO GenAI: tokens a second, prefill.

    python benchmarks/decode.py [--model FOLDER] [--gguf FILE] [--new-tokens 48] [--runs 2] [--fresh]
    python benchmarks/decode.py --only "Handspun, int8" "OpenVINO GenAI" --columns "1 row" "8 rows"

All contenders get the same prompts and decode exactly the same number of tokens; the prefill is in their time.
Every measurement is a process of its own with several repetitions, of which the first is not counted; contenders
take turns. No prompt comes twice in a process, since some engines keep what they have read. Figures are saved in
benchmarks/results/ as they are measured, and a benchmark that is run again goes on from them; --fresh starts over.
The peers run in environments of their own, which `make bench` makes, with models converted into
~/.cache/handspun-benchmarks; what is not there is left out.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from converted_models import ctranslate2_int8, gguf_file, openvino_int8
from handspun.data.chat_template import ChatTemplate
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import load_tokenizer, model_source
from measurements import (
    Contender,
    Results,
    Run,
    chosen,
    measure,
    model_folder,
    open_results,
    table,
    with_range,
)

DECODING, OPENVINO = ".venv-peers-decoding", ".venv-peers-openvino"
CONTENDERS = {
    "transformers": Contender("transformers_decode.py", environment=DECODING),
    "CTranslate2": Contender("ctranslate2_decode.py", environment=DECODING),
    "llama.cpp": Contender("llama_cpp_decode.py", environment=DECODING),
    "OpenVINO GenAI": Contender("openvino_decode.py", environment=OPENVINO),
    "Handspun": Contender("handspun_decode.py", {"options": {"weights": "float32"}}),
    "Handspun, int8": Contender("handspun_decode.py", {"options": {"weights": "int8"}}),
}


@dataclass(frozen=True)
class Column:
    """What is decoded at a time."""

    prompts: int
    beams: int = 1
    prefill: bool = False
    """Prompts of PREFILLED tokens and one new token, in seconds."""


COLUMNS = {
    "1 row": Column(1),
    "8 rows": Column(8),
    "32 rows": Column(32),
    "4 beams, 1 prompt": Column(1, beams=4),
    "4 beams, 4 prompts": Column(4, beams=4),
    "prefill": Column(1, prefill=True),
}
PREFILLED = 41
REPETITIONS_OF_PREFILL = 10
QUESTIONS = [
    "Give me a brief introduction to Shanghai Jiao Tong University.",
    "Tell me a joke about computers.",
    "What is the sum of the first 100 natural numbers? Please think step by step.",
    "List three tips for staying healthy.",
    "Explain photosynthesis to a child.",
    "Write a short poem about rain.",
    "Name the planets.",
    "How do I make tea?",
]


def main() -> None:
    arguments = parse()
    settings = {key: getattr(arguments, key) for key in ("new_tokens", "threads")}
    results = open_results(f"decode-{Path(arguments.model).name}", settings, fresh=arguments.fresh)
    folder = Path(model_folder(arguments.model))
    contenders = with_models(chosen(CONTENDERS, arguments.only), arguments.model, folder, arguments.gguf)
    measure_all(results, contenders, arguments, folder)
    print(summary(results))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--gguf", type=Path, help="the model as llama.cpp reads it")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2, help="processes for each figure")
    parser.add_argument("--repetitions", type=int, default=2, help="counted ones in each process")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"contenders: {', '.join(CONTENDERS)}")
    parser.add_argument("--columns", nargs="+", metavar="NAME", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args(words)


def with_models(
    contenders: dict[str, Contender], model: str, folder: Path, gguf: Path | None
) -> dict[str, Contender]:
    """The contenders with the model in their own format, made if need be; llama.cpp is left out without one."""
    files: dict[str, str | None] = dict.fromkeys(contenders, "")
    if "CTranslate2" in contenders:
        files["CTranslate2"] = ctranslate2_int8(folder, contenders["CTranslate2"])
    if "OpenVINO GenAI" in contenders:
        files["OpenVINO GenAI"] = openvino_int8(folder, contenders["OpenVINO GenAI"])
    if "llama.cpp" in contenders:
        files["llama.cpp"] = gguf_file(model, gguf)
        if files["llama.cpp"] is None:
            print("llama.cpp is left out: --gguf names the model's file")
    return {
        name: replace(contender, job={**contender.job, "converted": files[name]})
        for name, contender in contenders.items()
        if files[name] is not None
    }


def measure_all(
    results: Results, contenders: dict[str, Contender], arguments: argparse.Namespace, folder: Path
) -> None:
    """Every run of every contender in every column that is not there yet; contenders take turns."""
    template = ChatTemplate(load_tokenizer(model_source(str(folder), print)))
    turns = product(range(arguments.runs), arguments.columns, contenders.items())
    with tempfile.TemporaryDirectory() as work:
        for turn, title, (name, contender) in turns:
            if len(results.of(key(name, title))) <= turn and can_decode(name, COLUMNS[title]):
                job = job_of(COLUMNS[title], template, arguments, Path(work))
                results.add(key(name, title), measure(contender, model=str(folder), **job))
                print(f"{name}, {title}: {cell(results, name, title)}", flush=True)


def can_decode(name: str, column: Column) -> bool:
    """llama.cpp has no beam search."""
    return name != "llama.cpp" or column.beams == 1


def job_of(column: Column, template: ChatTemplate, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What all contenders are asked for (contenders/decoding.py); its batches are in a file of the work folder."""
    repetitions = REPETITIONS_OF_PREFILL if column.prefill else arguments.repetitions
    batches = list(prompts_of(column, template, 1 + repetitions))
    (work / "batches.json").write_text(json.dumps(batches), encoding="utf-8")
    return {
        "batches": str(work / "batches.json"),
        "new_tokens": 1 if column.prefill else arguments.new_tokens,
        "end_ids": end_ids(template),
        "beams": column.beams,
        "threads": arguments.threads,
    }


def key(name: str, title: str) -> str:
    """The name of a contender's runs of a column."""
    return f"{name}: {title}"


def end_ids(template: ChatTemplate) -> list[int]:
    """Those that would end an answer."""
    return sorted({template.tokenizer.eos_token_id, template.end_of_turn_id} - {None})


def prompts_of(column: Column, template: ChatTemplate, batches: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of prompts, each with its text and ids. Numbers in front make them all different from early on."""
    for batch in range(batches):
        numbers = range(batch * column.prompts, (batch + 1) * column.prompts)
        texts = [f"{number + 1}. {QUESTIONS[number % column.prompts % len(QUESTIONS)]}" for number in numbers]
        if column.prefill:
            texts = [lengthened(f"{number + 1}.", template) for number in numbers]
        yield [{"text": text, "ids": ids_of(text, template)} for text in texts]


def lengthened(text: str, template: ChatTemplate) -> str:
    """The text with words behind it, so that the prompt has PREFILLED tokens."""
    while (length := len(ids_of(text, template))) < PREFILLED:
        text += " and"
    if length > PREFILLED:
        raise SystemExit(f"the shortest prompts have {length} tokens: expected at most {PREFILLED}")
    return text


def ids_of(text: str, template: ChatTemplate) -> list[int]:
    """Through the chat template."""
    return template.encode_prompt([{"role": "user", "content": text}])


def figures(results: Results, name: str, title: str) -> list[float]:
    """New tokens a second of all repetitions of all runs, or seconds of the prefill."""
    seconds = [value for run in results.of(key(name, title)) for value in run["seconds"]]
    column, new_tokens = COLUMNS[title], results.header["settings"]["new_tokens"]
    return seconds if column.prefill else [column.prompts * new_tokens / value for value in seconds]


def cell(results: Results, name: str, title: str) -> str:
    """The median, with the lowest and highest."""
    found = figures(results, name, title)
    return with_range(found, 3 if COLUMNS[title].prefill else 1) if found else ""


def summary(results: Results) -> str:
    """New tokens a second and seconds of prefill; ratios to the best peer; how far the first answers agree."""
    names = [name for name in CONTENDERS if any(results.of(key(name, title)) for title in COLUMNS)]
    titles = [title if title != "prefill" else f"{PREFILLED}-token prefill, s" for title in COLUMNS]
    rates = [[label(results, name), *(cell(results, name, title) for title in COLUMNS)] for name in names]
    ratios = [[name, *(ratio(results, name, title) for title in COLUMNS)] for name in names]
    return "\n\n".join(
        [
            table(["new tokens/s (lowest-highest)", *titles], rates),
            table(["times the best peer's speed", *titles], ratios),
            agreement(results, names),
        ]
    )


def label(results: Results, name: str) -> str:
    """The engine with its version, as it names itself, and the median of its peak memory."""
    runs = [run for title in COLUMNS for run in results.of(key(name, title))]
    return f"{runs[0]['engine']} ({statistics.median(run['peak_gb'] for run in runs):.1f} GB)"


def ratio(results: Results, name: str, title: str) -> str:
    """The contender's median speed in terms of the fastest peer's."""
    medians = {
        other: statistics.median(found) for other in CONTENDERS if (found := figures(results, other, title))
    }
    peers = [median for other, median in medians.items() if not other.startswith("Handspun")]
    if name not in medians or not peers:
        return ""
    if COLUMNS[title].prefill:
        return f"{min(peers) / medians[name]:.2f}"
    return f"{medians[name] / max(peers):.2f}"


def agreement(results: Results, names: list[str]) -> str:
    """In how many leading tokens each contender's first answer is that of transformers, for each column."""
    lines = [[name, *(agreeing(results, name, title) for title in COLUMNS)] for name in names]
    return table(["leading tokens as transformers'", *COLUMNS], lines)


def agreeing(results: Results, name: str, title: str) -> str:
    """Of the first row, in the last repetition of the first run."""
    theirs, ours = (first_answer(results.of(key(each, title))) for each in ("transformers", name))
    if not theirs or not ours:
        return ""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=True)))
    return f"{same} of {len(theirs)}"


def first_answer(runs: list[Run]) -> list[int]:
    """Empty without runs."""
    return list(runs[0]["ids"]) if runs else []


if __name__ == "__main__":
    main()
