"""A value of an option arrives as what was typed, or is refused by name: in Python, on a command line, in YAML."""

import json
import re
from dataclasses import asdict, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handspun.cli import main
from handspun.cli.app import ModelOptions, app
from handspun.config import DataConfig, ExportConfig, GenerationOptions, TrainConfig
from handspun.config.foreign_names import FOREIGN_NAMES
from handspun.config.names import foreign_note, unknown_option
from handspun.config.ranges import option_name, type_hints
from handspun.config.spelling import in_python
from handspun.config.typed import load_json, read_texts
from handspun.errors import ConfigError, DataError

CONFIGS = {DataConfig: {}, TrainConfig: {}, GenerationOptions: {}, ExportConfig: {"model": "m", "push": "a/b"}}
NOT_WHOLE = [1.5, 7.9, "8", True, float("nan"), float("inf"), [1], None, b"1", 1 + 0j, np.float32(1.5), object()]


def problems(make: type, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    return caught.value.problems


def fields_of_type(hint: object) -> list[tuple[type, str]]:
    return [
        (config, name)
        for config in (DataConfig, TrainConfig, GenerationOptions)
        for name, own in type_hints(config).items()
        if own in (hint, hint | None)  # type: ignore[operator]
    ]


@pytest.mark.parametrize(("config", "name"), fields_of_type(int), ids=str)
def test_whole_numbers_are_whole_numbers(config: type, name: str) -> None:
    has_default = getattr(config(), name) is not None
    for value in NOT_WHOLE if has_default else [value for value in NOT_WHOLE if value is not None]:
        (problem,) = problems(config, **{name: value})
        assert problem.startswith(f"{name} is ")
        assert "expected a whole number" in problem
    others: dict[str, Any] = {"lora": True} if name.startswith("lora") else {}
    if name == "max_matching_ngram_size":
        others = {"prompt_lookup_num_tokens": 1}
    for value in (2, 2.0, np.int64(2), np.int8(2), torch.tensor(2), np.float32(2)):
        made = getattr(config(**{name: value}, **others), name)
        assert (made, type(made)) == (2, int)


@pytest.mark.parametrize(("config", "name"), fields_of_type(float), ids=str)
def test_numbers_are_finite_numbers(config: type, name: str) -> None:
    for value in ("0.5", True, float("nan"), float("inf"), -float("inf"), [0.5], b"1", 10**400):
        (problem,) = problems(config, **{name: value})
        assert problem.startswith(f"{name} is ")
        assert "number" in problem


@pytest.mark.parametrize(("config", "name"), fields_of_type(bool), ids=str)
def test_flags_are_true_or_false(config: type, name: str) -> None:
    values: list[Any] = [1, 0, "yes", "true", "no", [], np.int64(1)]
    for value in values:
        (problem,) = problems(config, **{name: value})
        assert problem.startswith(f"{name} is ")
        assert "true or false" in problem


@pytest.mark.parametrize(("config", "name"), fields_of_type(str), ids=str)
def test_texts_are_texts_that_a_file_can_hold(config: type, name: str) -> None:
    values = [b"text", 5, True, ["text"], "a\ud800b", {"a": 1}]
    for value in values if name in ("data", "eval_data") else [*values, "\udcff"]:  # a file may be called so
        found = problems(config, **{name: value})
        assert found[0].startswith(f"{name} is "), found
        assert "expected text" in found[0]


@pytest.mark.parametrize("name", ["choice", "stop_strings", "bad_words"])
def test_a_single_text_is_never_its_characters(name: str) -> None:
    options: Any = GenerationOptions
    assert getattr(options(**{name: "abc"}), name) == ("abc",)
    for several in (["abc", "d"], ("abc", "d"), np.array(["abc", "d"]), (text for text in ("abc", "d"))):
        assert getattr(options(**{name: several}), name) == ("abc", "d")
    for wrong in (5, [5], ["a", None], b"abc", {"a": 1}, ["a\ud800"]):
        (problem,) = problems(GenerationOptions, **{name: wrong})
        assert problem.startswith(f"{name} is ")
        assert "a list of texts" in problem


def test_lists_are_taken_where_a_tuple_is_typed() -> None:
    lists: dict[str, Any] = {"seed": [11, 12], "suppress_tokens": [5], "begin_suppress_tokens": {7}}
    lists["bad_words_ids"] = [[4, 2], [5]]
    options = GenerationOptions(**lists)
    assert (options.seed, options.suppress_tokens, options.begin_suppress_tokens) == ((11, 12), (5,), (7,))
    assert options.bad_words_ids == ((4, 2), (5,))
    lists = {"log_to": ["wandb"], "sample_prompts": ["a"]}
    assert TrainConfig(**lists).log_to == ("wandb",)
    assert problems(TrainConfig, seed=[11, 11]) == ["seed is [11, 11]: expected a whole number."]


def test_paths_are_taken_where_a_file_is_named(tmp_path: Path) -> None:
    paths: dict[str, Any] = {"model": tmp_path, "data": tmp_path / "a.csv", "eval_data": tmp_path}
    paths["output_dir"] = tmp_path / "o"
    config = TrainConfig(**paths)
    assert (config.data, config.output_dir) == (str(tmp_path / "a.csv"), str(tmp_path / "o"))
    schema: Any = tmp_path / "s.json"
    assert GenerationOptions(json_schema=schema).json_schema == str(schema)
    assert "expected text" in problems(TrainConfig, system_prompt=tmp_path)[0]


def test_data_takes_several_files_and_each_only_once(tmp_path: Path) -> None:
    several: Any = [tmp_path / "a.csv", "b.csv"]
    config = TrainConfig(data=several, eval_data=("c.csv",))
    assert config.data == config.sources == (str(tmp_path / "a.csv"), "b.csv")
    assert (config.eval_data, config.eval_sources) == ("c.csv", ("c.csv",))
    assert TrainConfig().sources == ("train.csv",)
    assert TrainConfig().eval_sources == ()
    assert "expected each file once" in problems(TrainConfig, data=["a.csv", "a.csv"])[0]
    assert "expected at least one row" in problems(TrainConfig, eval_data=[])[0]
    assert "expected text" in problems(TrainConfig, data=["a.csv", 3])[0]
    assert "expected text" in problems(TrainConfig, output_dir=["a", "b"])[0]


@pytest.mark.parametrize("name", ["model", "data", "eval_data", "output_dir"])
@pytest.mark.parametrize("path", ["", "a\0b", "a/" + "é" * 128, "a\ud800", b"a"])
def test_paths_that_no_file_system_has_are_refused(name: str, path: object) -> None:
    (problem,) = problems(TrainConfig, **{name: path})
    assert problem.startswith(f"{name} is ")


class Schedule(StrEnum):
    COSINE = "cosine"


def test_choices_are_exact() -> None:
    schedule: Any = Schedule.COSINE
    assert type(TrainConfig(lr_schedule=schedule).lr_schedule) is str
    for value in ("Cosine", "cos", True, 1, None, ["cosine"]):
        (problem,) = problems(TrainConfig, lr_schedule=value)
        assert 'expected one of "cosine", "linear", "constant"' in problem
    assert problems(GenerationOptions, num_beams=2, early_stopping=1)  # 1 is neither True nor "never"


def test_all_wrong_values_are_listed_at_once() -> None:
    found = problems(TrainConfig, num_epochs=1.5, batch_size="8", learning_rate=-1, dtype="fp16", lora="yes")
    assert [text.split()[0] for text in found] == [
        "num_epochs", "batch_size", "learning_rate", "lora", "dtype",
    ]  # fmt: skip


def test_numbers_that_would_overflow_are_refused_with_their_limits() -> None:
    found = problems(
        GenerationOptions, temperature=1e-300, repetition_penalty=1e300, length_penalty=1e300, num_beams=10**9,
        logit_bias={5: 1e300}, seed=2**64, max_new_tokens=10**5000,
    )  # fmt: skip
    assert [text.split()[0] for text in found] == [
        "max_new_tokens", "temperature", "repetition_penalty", "logit_bias", "num_beams",
        "length_penalty", "seed",
    ]  # fmt: skip
    assert "expected 0, or at least 1e-06" in found[1]
    assert "at most 1000" in found[4]


def test_a_negative_top_k_is_told_what_turns_it_off() -> None:
    (problem,) = problems(GenerationOptions, do_sample=True, top_k=-1)
    assert problem == "top_k is -1: expected at least 0. 0 turns it off."
    (problem,) = problems(GenerationOptions, max_new_tokens=-1)
    assert problem.startswith("max_new_tokens is -1: expected at least 1.")


_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from([10**400, -1, 0, 1, "never", "none", "1e3", "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_is_an_option_or_one_config_error(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(CONFIGS)))
    names = st.sampled_from([field.name for field in fields(config)])
    options = data.draw(st.dictionaries(names, _JUNK, min_size=1, max_size=4))
    try:
        made = config(**{**CONFIGS[config], **options})
    except ConfigError as error:
        assert error.problems  # noqa: PT017
        return
    except DataError as error:  # rows in memory
        assert re.match(r"(list|tuple) of \d+ rows?, row \d+", str(error))  # noqa: PT017
        return
    assert replace(made) == made
    json.dumps(asdict(made)).encode()  # what is recorded of a run


# Texts: the command line and YAML.


@pytest.mark.parametrize(
    ("hint", "texts", "value"),
    [
        (int, ["8"], 8),
        (int, ["1e3"], 1000),
        (int, ["8.0"], 8),
        (int, ["-0x10"], -16),
        (int, ["010"], 10),
        (int, ["1.5"], "1.5"),
        (int, ["1e999999999"], "1e999999999"),
        (int, ["nan"], "nan"),
        (int, ["1:30"], "1:30"),
        (int | None, ["none"], None),
        (float, ["1e-4"], 1e-4),
        (float, ["1,5"], "1,5"),
        (bool, ["on"], True),
        (bool, ["NO"], False),
        (bool, ["maybe"], "maybe"),
        (str, ["no"], "no"),
        (str | None, ["none"], "none"),
        (tuple[str, ...], ["no", "1.50"], ("no", "1.50")),
        (tuple[int, ...] | None, ["5", "7"], (5, 7)),
        (int | tuple[int, ...] | None, ["5"], 5),
        (int | tuple[int, ...] | None, ["5", "7"], (5, 7)),
        (tuple[tuple[int, ...], ...] | None, ["42 7", "5"], ((42, 7), (5,))),
        (tuple[tuple[int, ...], ...] | None, ["[[42, 7], [5]]"], ([42, 7], [5])),
        (dict[str, float] | None, ['{"42": -1}'], {"42": -1}),
        (dict[str, float] | None, ['{"42": -1, "42": 2}'], '{"42": -1, "42": 2}'),
        (str | dict[str, Any] | None, ['{"a": 1}'], '{"a": 1}'),
    ],
    ids=str,
)
def test_texts_are_read_as_what_they_spell(hint: object, texts: list[str], value: object) -> None:
    read = read_texts(hint, texts)
    assert (read, type(read)) == (value, type(value))


def test_json_without_what_json_has_not() -> None:
    assert load_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text in ("[NaN]", "[Infinity]", '{"a": 1, "a": 1}', "[", ""):
        with pytest.raises(ValueError):
            load_json(text)


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.removeprefix("error: ").splitlines()


def test_the_command_line_refuses_what_it_would_have_to_round(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "--num-epochs": "1.5", "--batch-size": "7.9", "--lora-rank": "8.6", "--eval-steps": "0.2",
        "--learning-rate": "fast", "--dtype": "fp16", "--seed": "nan",
    }  # fmt: skip
    printed = fail(capsys, "train", *(word for pair in options.items() for word in pair))
    assert {line.split()[0]: line.split()[2].strip("':") for line in printed} == options
    for command in (["demo", "--num-epochs", "0.5"], ["eval", "--batch-size", "1.5"]):
        assert f"'{command[-1]}' is invalid (expected a whole number" in fail(capsys, *command)[0]
    assert fail(capsys, "generate", "Hi", "--batch-size", "1.5") == [
        "--batch-size is '1.5': expected a whole number."
    ]
    assert "--batch-size is 0: expected at least 1." in fail(capsys, "generate", "Hi", "--batch-size", "0")[0]
    assert "--threads is 0" in fail(capsys, "generate", "Hi", "--threads", "0")[0]


def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, *arguments: str) -> Any:
    """The dataclass of options that `handspun train` or `generate` would get from a config file."""
    found: dict[str, Any] = {}
    monkeypatch.setattr("handspun.runs.train.train", lambda config: found.update(config=config))
    monkeypatch.setattr("handspun.cli.views.answers.show_answers", lambda *a, **_: found.update(config=a[2]))
    monkeypatch.setattr("handspun.cli.answering.load_model", lambda source, _, **__: source)
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    assert main([*arguments, "--config", str(tmp_path / "run.yaml")]) == 0
    return found["config"]


def test_words_of_a_config_file_are_taken_as_they_are_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = (
        "\ufeffchoice: [no, yes, NO, on, 1.50, 2026-01-31, 1:30, 010, true, ~x]\nmax-new-tokens: 1e2\n"
        "logit_bias: {5: -3.5, 7: 1}\nbad_words_ids: [[42, 7], [5]]\nseed: [11, 12]\nstop_strings: []\n"
        "do_sample: no\nsystem_prompt: null\n"
    )
    options = parsed(monkeypatch, tmp_path, content, "generate", "Hi")
    texts = ("no", "yes", "NO", "on", "1.50", "2026-01-31", "1:30", "010", "true", "~x")
    assert options.choice == texts
    assert (options.max_new_tokens, options.do_sample, options.seed) == (100, False, (11, 12))
    assert (options.logit_bias, options.bad_words_ids) == ({"5": -3.5, "7": 1.0}, ((42, 7), (5,)))
    assert options.stop_strings == ()


def test_a_schema_in_a_config_file_has_the_types_of_yaml_1_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = (
        "base: &base {type: string}\n"
        "json_schema:\n  enum: [no, off, true, 7, 1e-4, null, 2026-01-31, 1:30]\n  <<: {title: t}\n"
    ).removeprefix("base: &base {type: string}\n")
    schema = parsed(monkeypatch, tmp_path, content, "generate", "Hi").json_schema
    enum = ["no", "off", True, 7, 1e-4, None, "2026-01-31", "1:30"]
    assert json.loads(schema) == {"enum": enum, "title": "t"}


def test_numbers_and_flags_of_a_config_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = (
        "data: rows.csv\nlearning_rate: 1e-4\nlora: on\ncache_examples: No\nlog_to: wandb\nsample_prompts: [yes]\n"
    )
    config = parsed(monkeypatch, tmp_path, content, "train")
    assert (config.learning_rate, config.lora, config.cache_examples) == (1e-4, True, False)
    assert (config.log_to, config.sample_prompts) == (("wandb",), ("yes",))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("num_epochs: 1.5\n", ["--num-epochs is '1.5': expected a whole number."]),
        ("batch_size: 2\nbatch-size: 3\n", ["lines 1 and 2: --batch-size is given 2 times"]),
        ("sample_prompts: [a, null]\n", ["line 1: --sample-prompts has an item that is null"]),
        ("lora: maybe\nseed: 1:30\n", ["--lora is 'maybe'", "--seed is '1:30'"]),
        ("lr: 3\nepochs: 4\n", ["no option --lr. Here it is --learning-rate", "--num-epochs"]),
        ("num_epochs: {a: 1}\n", ["num-epochs"]),
        ("a: &a [&b [1, 1], *b]\nc: [*a, *a]\nseed: !!python/object:os.system 1\n", []),
        ("", ["contains nothing"]),
        ("just text", ["contains a single value"]),
        ("seed: [1, 2]\n", ["seed"]),
        ("seed: &a [*a]\n", []),
    ],
)
def test_config_files_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, expected: list[str]
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    printed = "\n".join(fail(capsys, "train", "--config", str(tmp_path / "run.yaml")))
    for part in expected:
        assert part in printed


def test_a_schema_of_aliases_of_aliases_does_not_fill_the_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = ["  a0: &a0 {b: [x, x, x, x, x, x, x, x, x]}"]
    lines += [f"  a{n}: &a{n} {{b: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    (tmp_path / "run.yaml").write_text("json_schema:\n" + "\n".join(lines) + "\n")
    printed = fail(capsys, "generate", "Hi", "--config", str(tmp_path / "run.yaml"))
    assert "has more than 100,000 values" in printed[0]


@pytest.mark.parametrize("name", ["stop_strings", "bad_words", "suppress_tokens"])
def test_a_list_can_be_emptied_on_the_command_line(name: str) -> None:
    arguments = ["generate", "Hi", f"--no-{name.replace('_', '-')}"]
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert getattr(bound.arguments["options"], name) == ()


# Names of other tools' options.

OPTIONS = {field.name for config in (*CONFIGS, ModelOptions) for field in fields(config)} | {
    "chat", "explain", "json", "logprobs", "prompts_file",
}  # fmt: skip


@pytest.mark.parametrize(("names", "note"), FOREIGN_NAMES, ids=lambda text: text[:30])
def test_every_note_on_another_tool_s_option_names_options_that_there_are(names: str, note: str) -> None:
    assert set(re.findall(r"\{(\w+)\}", note)) <= OPTIONS
    assert names.split()
    typed = re.findall(r"(?<!\w)--([a-z-]+)", note)
    assert {name.removeprefix("no-").replace("-", "_") for name in typed} <= OPTIONS


@pytest.mark.parametrize(
    ("config", "foreign", "here"),
    [
        (TrainConfig, "lr", "--learning-rate"),
        (TrainConfig, "packing", "--batching packed"),
        (TrainConfig, "gradient_accumulation_steps", "--batch-size"),
        (TrainConfig, "per_device_train_batch_size", "--batch-size"),
        (TrainConfig, "fp16", "--dtype"),
        (TrainConfig, "bf16", "--dtype"),
        (TrainConfig, "load_in_4bit", "--base-weights int8"),
        (TrainConfig, "target_modules", "--lora-target-modules"),
        (TrainConfig, "max_seq_length", "--max-length"),
        (TrainConfig, "num_train_epochs", "--num-epochs"),
        (TrainConfig, "total_steps", "--max-steps"),
        (TrainConfig, "warmup_steps", "--warmup-ratio"),
        (TrainConfig, "lora_r", "--lora-rank"),
        (TrainConfig, "model_name_or_path", "--model"),
        (TrainConfig, "dataset", "--data"),
        (TrainConfig, "output", "--output-dir"),
        (GenerationOptions, "max_tokens", "--max-new-tokens"),
        (GenerationOptions, "max_length", "--max-new-tokens"),
        (GenerationOptions, "temp", "--temperature"),
        (GenerationOptions, "repeat_penalty", "--repetition-penalty"),
        (GenerationOptions, "n_predict", "--max-new-tokens"),
        (GenerationOptions, "stop", "--stop-strings"),
        (GenerationOptions, "output", "standard output"),
        (ExportConfig, "outtype", "--gguf"),
    ],
)
def test_another_tool_s_option_is_told_its_name_here(config: type, foreign: str, here: str) -> None:
    known = {field.name for field in fields(config)}
    assert here in unknown_option(foreign, known, option_name)
    assert foreign_note(foreign, known, option_name)
    typed = {"model": "m"} if config is ExportConfig else {}
    problem, *_ = problems(config, **{foreign: 1}, **typed)
    assert problem.startswith(f"there is no option {foreign}. ")
    assert in_python(str(foreign_note(foreign, known, str))) in problem


def test_all_options_that_there_are_not_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    printed = fail(capsys, "train", "--peak-lr", "1e-4", "--packing", "--bach-size=4", "--num-epochs", "2")
    assert printed == [
        "there is no option --peak-lr. Here it is --learning-rate.",
        "there is no option --packing. --batching packed is the default: rows are laid end to end without "
        "padding, and do not see each other.",
        "there is no option --bach-size. Did you mean --batch-size?",
        "See handspun train --help for all options.",
    ]


def test_options_are_given_by_name() -> None:
    (problem,) = problems(lambda: TrainConfig("train.csv"))  # type: ignore[arg-type, call-arg]
    assert problem == "TrainConfig takes options by name, but 'train.csv' has no name."
    assert problems(ExportConfig) == ["model is missing."]
