"""The whole job in one file gives what the package gives, and its notebook is that file, executed."""

import argparse
import ast
import csv
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import handspun
import train_inference as script
from documents import ROOT
from handspun.config import NEXT_USER, TrainConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import DEFAULT_MAX_LENGTH, load_splits
from handspun.decoding.options import SamplingParams
from handspun.decoding.processors import History, make_processors, process
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import ChatModel
from handspun.training.batching import collate
from handspun.training.optim import lr_at
from small_runs import quiet_console
from tiny import qwen_tokenizer, tiny_model, tiny_tokenizer

GENERAL_ROWS = Path(handspun.__file__).parent / "demo" / "demo.csv"
SCRIPT = ROOT / "train_inference.py"
PROMPTS = ["Give me a brief introduction to the city.", "Red?", "What is the sum of the first numbers? Answer."]
ROWS = [
    *({"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(9)),
    {"instruction": "List three colours.", "input": "as a list", "output": "\nred, green, blue\n"},
    {"instruction": "Say nothing.", "input": "", "output": " "},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A csv file with one row too many: it has no answer."""
    file = tmp_path / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(ROWS)
    return file


@pytest.fixture
def chat() -> ChatModel:
    """A model that writes many kinds of tokens, an eos among them, with the eos ids of one that was trained."""
    tokenizer = tiny_tokenizer()
    eos = [tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>")]
    return ChatModel(tiny_model("qwen2", seed=1, eos_token_id=eos), tokenizer, "tiny")


def generate(chat: ChatModel, **how: Any) -> list[script.Answer]:
    return script.generate(chat.model, chat.tokenizer, PROMPTS, script.Decoding(max_new_tokens=24, **how))


def answers_of_the_package(chat: ChatModel, **how: Any) -> list[handspun.GenerationResult]:
    return handspun.generate(chat, PROMPTS, max_new_tokens=24, **how)


def steps_and_held_out(output: Path) -> tuple[list[float], list[float]]:
    """The losses that the package wrote."""
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, held_out = (
        [event["loss"] for event in events if event["event"] == kind] for kind in ("step", "evaluation")
    )
    return steps, held_out


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), qwen_tokenizer()], ids=["tiny", "Qwen2.5"])
@pytest.mark.parametrize("file", ["rows", "demo"])
def test_examples_and_batches_equal_the_packages(tokenizer: Any, file: str, rows: Path) -> None:
    data = rows if file == "rows" else GENERAL_ROWS
    training, _ = load_splits(
        TrainConfig(data=str(data)), ChatTemplate(tokenizer), max_length=DEFAULT_MAX_LENGTH, cache=None
    )
    examples = script.read_examples(str(data), tokenizer)
    assert len(examples) == len(training.examples) > 5
    own, expected = script.collate_fn(examples), collate(list(training.examples), pad_token_id=0)
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_train_has_the_packages_losses(
    lora: bool, tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {
        "model": str(tiny_folder),
        "data": str(rows),
        "eval_data": str(rows),
        "num_epochs": 2,
        "lora": lora,
    }
    options = argparse.Namespace(**common, output_dir=str(tmp_path / "own"), learning_rate=1e-3)
    model, tokenizer = script.load(options.model, lora=lora)
    examples = script.read_examples(options.data, tokenizer)
    losses = script.train(model, tokenizer, examples, examples, options)
    printed = capsys.readouterr().out

    config = handspun.TrainConfig(
        **common, output_dir=str(tmp_path / "package"), learning_rate=1e-3, dtype="float32", sample_answers=False
    )
    handspun.train(config, console=quiet_console())
    steps, held_out = steps_and_held_out(tmp_path / "package")
    assert losses == pytest.approx(steps, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    for when, loss in zip(("before training", "after epoch 1", "after epoch 2"), held_out, strict=True):
        assert f"held-out loss {when}: {loss:.4f}" in printed

    own, package = (handspun.load(str(tmp_path / name / "checkpoint-epoch-2")) for name in ("own", "package"))
    expected = package.model.state_dict()
    for name, weight in own.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    assert own.model.generation_config is not None
    assert package.model.generation_config is not None
    assert own.model.generation_config.eos_token_id == package.model.generation_config.eos_token_id
    assert own.tokenizer.eos_token == package.tokenizer.eos_token


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_generate_greedy_gives_the_packages_tokens(chat: ChatModel, penalty: float) -> None:
    answers = generate(chat, repetition_penalty=penalty)
    expected = answers_of_the_package(chat, repetition_penalty=penalty)
    assert [answer.token_ids for answer in answers] == [result.token_ids for result in expected]
    assert [answer.text for answer in answers] == [result.text for result in expected]
    assert [answer.finish_reason for answer in answers] == [result.finish_reason for result in expected]


@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_generate_with_beams_gives_the_packages_tokens(
    chat: ChatModel, num_beams: int, length_penalty: float, penalty: float
) -> None:
    how = {"num_beams": num_beams, "length_penalty": length_penalty, "repetition_penalty": penalty}
    answers, expected = generate(chat, **how), answers_of_the_package(chat, **how)
    assert [answer.token_ids for answer in answers] == [result.token_ids for result in expected]
    assert [answer.text for answer in answers] == [result.text for result in expected]
    assert [answer.finish_reason for answer in answers] == [result.finish_reason for result in expected]


def test_beam_scores_are_log_probabilities_over_length(chat: ChatModel) -> None:
    answers = generate(chat, num_beams=4, length_penalty=2.0)
    expected = answers_of_the_package(chat, num_beams=4, length_penalty=2.0)
    assert len(answers) > 1
    for answer, result in zip(answers, expected, strict=True):
        ids = torch.tensor([result.prompt_token_ids + answer.token_ids])
        logprobs = chat.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        length = len(answer.token_ids)
        assert answer.score == pytest.approx(logprobs[-length:].sum().item() / length**2, rel=1e-4)


def test_some_answers_end_and_some_do_not(chat: ChatModel) -> None:
    """Otherwise the comparisons above would not see how an answer ends."""
    results = [*generate(chat), *generate(chat, num_beams=5), *generate(chat, num_beams=2, length_penalty=3.0)]
    assert {"eos", "length"} <= {answer.finish_reason for answer in results}


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "length_penalty": 0.0}], ids=["greedy", "beams"])
def test_generate_cuts_at_a_stop_string(
    chat: ChatModel, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(chat, **how)[0].text
    stop = next(whole[i : i + 2] for i in range(len(whole)) if whole[i : i + 2].isascii())  # no half characters
    monkeypatch.setattr(script, "STOP_STRINGS", (stop,))
    answers, expected = generate(chat, **how), answers_of_the_package(chat, **how, stop_strings=(stop,))
    assert "stop" in [answer.finish_reason for answer in answers]
    assert not any(stop in answer.text for answer in answers)
    assert [answer.token_ids for answer in answers] == [result.token_ids for result in expected]
    assert [answer.text for answer in answers] == [result.text for result in expected]


def test_generate_sampled_depends_on_the_seed(chat: ChatModel) -> None:
    first, again, other = (generate(chat, do_sample=True, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [answer.token_ids for answer in generate(chat, do_sample=True, top_k=1)] == [
        answer.token_ids for answer in generate(chat)
    ]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.7},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8, "temperature": 1.7, "top_k": 20, "top_p": 0.4},
    ],
    ids=str,
)
def test_filters_equal_the_packages(how: dict[str, Any]) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    histories = [[1, 2, 2, 49], [7], [0, 30]]
    own = script.apply_filters(logits, histories, script.Decoding(do_sample=True, **how))
    processors = make_processors(SamplingParams(do_sample=True, **how))
    expected = process(logits, [History(history) for history in histories], processors)
    assert processors
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


def test_every_default_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.csv").touch()
    monkeypatch.chdir(tmp_path)
    package = {field.name: field.default for field in fields(TrainConfig)}
    options = vars(script.parse_options([]))
    assert options.pop("demo") is False
    assert options
    assert options == {name: package[name] for name in options}
    constants = ("BATCH_SIZE", "WARMUP_RATIO", "MAX_GRAD_NORM", "LORA_RANK", "LORA_ALPHA", "SEED")
    for name in constants:
        assert getattr(script, name) == package[name.lower()], name
    assert package["lr_schedule"] == "linear"
    assert package["weight_decay"] == package["lora_dropout"] == 0
    assert script.MAX_LENGTH == DEFAULT_MAX_LENGTH
    assert script.STOP_STRINGS == ("<|im_end|>", NEXT_USER)
    decoding = SamplingParams()
    for field in fields(script.Decoding):
        assert field.default == getattr(decoding, field.name), field.name


def test_the_demo_is_the_embedded_model_and_rows(tmp_path: Path) -> None:
    options = script.parse_options(["--demo", "--output-dir", str(tmp_path)])
    assert options.model == EMBEDDED_NAME
    assert [Path(file) for file in (options.data, options.eval_data)] == [
        GENERAL_ROWS,
        GENERAL_ROWS.with_name("held_out.csv"),
    ]
    assert GENERAL_ROWS.is_file()


@pytest.mark.parametrize("step", range(10))
def test_learning_rate_at_equals_the_packages(step: int) -> None:
    assert script.learning_rate_at(step, 10, 5e-5) == pytest.approx(lr_at(step, 10, TrainConfig()), rel=1e-12)


def test_an_earlier_run_is_replaced_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-epoch-1").mkdir()
    command = ["--demo", "--output-dir", str(tmp_path)]
    assert refusal(command, capsys).endswith("holds an earlier run. Choose another folder, or add --overwrite.\n")
    assert script.parse_options([*command, "--overwrite"]).overwrite
    assert (tmp_path / "checkpoint-epoch-1").exists()


def test_a_missing_file_is_an_error_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no.csv: there is no such file. Name a csv" in refusal(["--data", str(tmp_path / "no.csv")], capsys)


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says when it ends the program."""
    with pytest.raises(SystemExit) as caught:
        script.parse_options(command)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_missing_columns_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,output\nHi,Hello\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="there is no column input, instruction"):
        script.read_examples(str(file), tiny_tokenizer())


def test_another_template_is_an_error(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    tiny_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="its chat template is not ChatML"):
        script.load(str(tmp_path))


def test_the_script_uses_nothing_of_the_package_but_the_demo() -> None:
    imports = list(ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))))
    modules = [node.module for node in imports if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    assert [name for name in modules if name and name.startswith("handspun")] == [
        "handspun.models.embedded",
        "handspun",
    ]


@pytest.mark.slow
def test_the_script_runs(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(SCRIPT), "--model", str(tiny_folder), "--data", str(rows)]
    command += ["--num-epochs", "1", "--output-dir", str(tmp_path / "output")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "output" / "checkpoint-epoch-1" / "model.safetensors").exists()
    for text in ("11 rows, 10 with an answer", "step 2 of 2: loss", "Greedy", "Sampling", "Beam search", "score"):
        assert text in done.stdout, done.stdout
    assert done.stdout.count("> Tell me a joke") == 1
    assert done.stdout.count(" tokens, ended by ") == 5


def test_the_notebook_is_the_script_executed() -> None:
    """`make notebook` makes it again."""
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(ROOT / "train_inference.ipynb")
    own, expected = (
        [(cell.cell_type, cell.source) for cell in read.cells]
        for read in (notebook, jupytext.read(SCRIPT, fmt="py:percent"))
    )
    assert own == expected
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} == {"stream"}
    printed = "".join(output.text for output in outputs if output.name == "stdout")
    for text in ("step 126 of 126", "held-out loss after epoch 3", "> Give me", "> Tell me", "> What is", "score"):
        assert text in printed
    assert not [output.text for output in outputs if output.name == "stderr"]
