"""Decoding, Handspun against transformers, CTranslate2, llama.cpp and OpenVINO GenAI.

    python benchmarks/decode.py [--model FOLDER] [--gguf FILE] [--new-tokens 48] [--runs 2] [--fresh]
    python benchmarks/decode.py --only "Handspun, int8" "OpenVINO GenAI" --columns "1 row" "8 rows"

New tokens a second of rows and beams, and the seconds of a short prefill; the first token and the tokens after
it of a streamed answer, for prompts of up to 4,096 tokens; peak memory; and how near the decoding of one row
comes to what reading the weights allows: the machine's read bandwidth is measured in the same run, as the sum of
a large tensor.

All contenders get the same prompts and are asked for the same number of tokens: what would end an answer in one
of them is excluded in all (OpenVINO's beam search cannot exclude tokens: in it they end nothing). Where an
answer is shorter all the same, its cell is marked *, and only tokens that were made count. The prefill is in the
time. Every measurement is a process of its own with several repetitions, of which the first is not counted;
contenders take turns. No prompt comes twice in a process, since some engines keep what they have read. Figures
are saved in benchmarks/results/ as they are measured, and a benchmark that is run again goes on from them;
--fresh starts over. The peers run in environments of their own, which `make bench` makes, with models converted
into ~/.cache/handspun-benchmarks; what is not there is left out.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from converted_models import ctranslate2_int8, gguf_file, openvino_int8
from decode_prompts import Column, end_ids, prompts_of
from decode_tables import BANDWIDTH, COLUMNS, CONTENDERS, key, shown, summary
from handspun.data.chat_template import ChatTemplate
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import load_tokenizer, model_source
from measurements import Contender, Results, chosen, measure, model_folder, open_results
from memory_bandwidth import read_bandwidth

REPETITIONS_OF_PREFILL = 10


def main() -> None:
    arguments = parse()
    folder = Path(model_folder(arguments.model))
    template = ChatTemplate(load_tokenizer(model_source(str(folder))))
    settings = {key: getattr(arguments, key) for key in ("new_tokens", "threads")}
    settings["excluded"] = end_ids(template, folder)
    results = open_results(
        f"decode-{arguments.results or Path(arguments.model).name}", settings, fresh=arguments.fresh
    )
    contenders = with_models(chosen(CONTENDERS, arguments.only), arguments.model, folder, arguments.gguf)
    measure_all(results, contenders, arguments, folder, template)
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
    names = ", ".join(f'"{name}"' for name in COLUMNS)
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME", choices=COLUMNS, default=list(COLUMNS), help=f"of {names}"
    )
    parser.add_argument("--results", metavar="NAME", help="of the saved figures (default: the model's folder)")
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
    results: Results,
    contenders: dict[str, Contender],
    arguments: argparse.Namespace,
    folder: Path,
    template: ChatTemplate,
) -> None:
    """Every run of every contender in every column that is not there yet; contenders take turns."""
    with tempfile.TemporaryDirectory() as work:
        for turn in range(arguments.runs):
            if len(results.of(BANDWIDTH)) <= turn:
                results.add(BANDWIDTH, {"gb_a_second": read_bandwidth(arguments.threads)})
            for title, (name, contender) in product(arguments.columns, contenders.items()):
                if len(results.of(key(name, title))) <= turn and can_decode(name, COLUMNS[title]):
                    job = job_of(COLUMNS[title], template, arguments, results, Path(work))
                    results.add(key(name, title), measure(contender, model=str(folder), **job))
                    print(f"{name}, {title}: {shown(results, name, title)}", flush=True)


def can_decode(name: str, column: Column) -> bool:
    """llama.cpp has no beam search."""
    return name != "llama.cpp" or column.beams == 1


def job_of(
    column: Column, template: ChatTemplate, arguments: argparse.Namespace, results: Results, work: Path
) -> dict[str, Any]:
    """What all contenders are asked for (contenders/decoding.py); its batches are in a file of the work folder."""
    repetitions = REPETITIONS_OF_PREFILL if column.is_prefill else arguments.repetitions
    batches = list(prompts_of(column, template, 1 + repetitions))
    (work / "batches.json").write_text(json.dumps(batches), encoding="utf-8")
    return {
        "batches": str(work / "batches.json"),
        "new_tokens": 1 if column.is_prefill else arguments.new_tokens,
        "end_ids": results.header["settings"]["excluded"],
        "beams": column.beams,
        "streamed": column.streamed,
        "threads": arguments.threads,
    }


if __name__ == "__main__":
    main()
