"""Nothing is executed that comes with a model, with data or with options."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import handspun
from handspun.cli import main
from handspun.config import DataConfig
from handspun.data import rendering
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import load_splits
from handspun.errors import HandspunError, ModelError, TemplateError
from handspun.models.load import load_config, model_source
from handspun.models.lora import add_lora
from handspun.models.save import save_model
from tiny import tiny_model, tiny_tokenizer

SOURCE = Path(handspun.__file__).parent


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there if anything was executed."""
    return tmp_path / "executed"


@pytest.fixture
def model_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    model = add_lora(
        tiny_model("qwen2", tie_word_embeddings=True), str(model_folder), rank=4, alpha=8, dropout=0.0
    )
    save_model(model, tiny_tokenizer(), tmp_path / "adapter", dtype=torch.float32)
    return tmp_path / "adapter"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path, marker: Path) -> str:
    with pytest.raises(ModelError) as caught:
        handspun.load(str(folder))
    assert not marker.exists()
    return str(caught.value)


def test_the_pickle_of_these_tests_does_execute(marker: Path) -> None:
    """Or they would prove nothing."""
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists()


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_alone_are_refused_with_the_remedy(model_folder: Path, marker: Path, name: str) -> None:
    (model_folder / "model.safetensors").unlink()
    (model_folder / name).write_bytes(pickle.dumps(Touch(marker)))
    message = refused(model_folder, marker)
    assert f"only as pickles ({name})" in message
    assert "convert them to safetensors: AutoModelForCausalLM" in message


def test_pickles_beside_weights_are_not_read(model_folder: Path, marker: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (model_folder / name).write_bytes(pickle.dumps(Touch(marker)))
    assert handspun.load(str(model_folder)).model is not None
    assert not marker.exists()


def test_a_pickle_by_the_name_of_safetensors_is_refused(model_folder: Path, marker: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(pickle.dumps(Touch(marker)))
    assert "cannot be read as a model" in refused(model_folder, marker)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd"])
def test_an_index_that_names_other_files_is_refused(model_folder: Path, marker: Path, file: str) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    (model_folder / "model.safetensors").rename(model_folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {file!r} (expected *.safetensors files in the same folder)" in refused(model_folder, marker)


def test_a_pickled_adapter_is_refused_with_the_remedy(adapter: Path, marker: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    message = refused(adapter, marker)
    assert "only as pickles (adapter_model.bin)" in message
    assert "to safetensors: PeftModel.from_pretrained(base, folder).save_pretrained(folder)" in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "not a LoRA adapter that can be merged"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "not a LoRA adapter that can be merged"),
        ({"base_model_name_or_path": None}, "and the name of a base model, found 'LORA' and None"),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    adapter: Path, marker: Path, values: dict[str, Any], expected: str
) -> None:
    change(adapter / "adapter_config.json", **values)
    assert expected in refused(adapter, marker)


def test_an_adapter_of_an_adapter_or_of_itself_is_refused(adapter: Path, marker: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "whose base" in refused(adapter, marker)


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000], ids=lambda content: content[:4]
)
def test_files_of_a_model_that_are_anything_are_one_clear_error(
    adapter: Path, model_folder: Path, name: str, content: bytes
) -> None:
    folder = adapter if name.startswith("adapter") else model_folder
    (folder / name).write_bytes(content)
    with pytest.raises(HandspunError):
        _ = handspun.load(str(folder)).template


def test_no_code_of_ours_reads_pickles() -> None:
    """torch.load with weights_only is none; numpy needs to be asked for them."""
    files = list(SOURCE.rglob("*.py"))
    assert len(files) > 100
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not any(word in text for word in ("import pickle", "import dill", "joblib", "allow_pickle=True"))
        assert text.count("torch.load(") == text.count("weights_only=True"), file
        assert "yaml.load(" not in text
        assert "trust_remote_code=True" not in text


# Code of a model's own


def with_own_code(folder: Path, marker: Path, file: str, value: dict[str, Any]) -> None:
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "own.py").write_text(code + "class Own:\n    pass\n")
    change(folder / file, **value)


OWN_MODEL = {
    "model_type": "own",
    "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]},
}


@pytest.mark.parametrize("answer", ["y\n", "", "n\n"])
def test_a_model_with_code_of_its_own_is_refused_and_nobody_is_asked(
    model_folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    with_own_code(model_folder, marker, "config.json", OWN_MODEL)
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert "needs its own Python code to be run" in refused(model_folder, marker)
    with pytest.raises(ModelError, match="its own Python code"):
        load_config(model_source(str(model_folder)))
    assert not marker.exists()


def test_a_tokenizer_is_loaded_without_the_code_beside_it(
    model_folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    with_own_code(model_folder, marker, "tokenizer_config.json", own)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert handspun.load(str(model_folder)).template.end_of_turn == "<|im_end|>"
    assert not marker.exists()


def test_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(
    model_folder: Path, marker: Path
) -> None:
    with_own_code(model_folder, marker, "config.json", {"auto_map": OWN_MODEL["auto_map"]})
    assert type(handspun.load(str(model_folder)).model).__name__ == "Qwen2ForCausalLM"
    assert not hasattr(load_config(model_source(str(model_folder))), "auto_map")
    assert not marker.exists()


# Options


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:pathlib.Path", "python/name:os.system"]
)
def test_yaml_makes_no_objects(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    (tmp_path / "run.yaml").write_text(f'model: !!{tag} ["touch {marker}"]\n')
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert f"has the tag 'tag:yaml.org,2002:{tag}', but tags are not supported" in capsys.readouterr().err
    assert not marker.exists()


def test_yaml_nested_without_end_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("model: " + "[" * 5000)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err


# Templates


def with_template(template: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + str(tokenizer.chat_template)
    return ChatTemplate(tokenizer)


UNUSABLE = {
    "a huge range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "a range beyond the sandbox": "{% for a in range(1000000000) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a division by zero": "{{ 1 / 0 }}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a function's globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "another file": "{% include '/etc/passwd' %}",
    "no end of a block": "{% if true %}",
    "brackets without end": "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
}


@pytest.mark.parametrize("template", UNUSABLE.values(), ids=UNUSABLE)
def test_a_template_that_fails_is_one_clear_error(template: str) -> None:
    with pytest.raises(TemplateError, match="the chat template"):
        with_template(template)


def test_a_template_that_writes_without_end_is_refused_by_its_length() -> None:
    with pytest.raises(TemplateError, match=r"writes 9,99\d,\d{3} characters around one conversation"):
        with_template("{% for i in range(99990) %}{{ 'x' * 100 }}{% endfor %}")


def test_a_long_conversation_is_not_refused_by_its_length() -> None:
    """White space around a text is rendered as it is, and so are a thousand turns."""
    template = with_template("")
    long = [{"role": "user", "content": "a" + "\n" * 6_000_000}, {"role": "assistant", "content": "b"}]
    assert len(rendering.render(template.tokenizer, long, None)) > rendering.MAX_CHARACTERS
    many = [{"role": role, "content": "a"} for _ in range(1000) for role in ("user", "assistant")]
    assert len(template.encode_prompt(many[:-1])) > 4000


def test_a_template_that_writes_one_text_again_and_again_is_refused() -> None:
    with pytest.raises(TemplateError, match="the same text of a message 5,001 times"):
        with_template("{% for i in range(5000) %}{{ messages[0].content }}{% endfor %}").encode_prompt(
            [{"role": "user", "content": "a" * 1_000_000}]
        )


def test_a_template_that_writes_without_end_for_some_rows_stops_the_run_at_the_first(tmp_path: Path) -> None:
    """It would take as long for every other row."""
    writes = "{% for i in range(99990) %}{{ 'x' * 100 }}{% endfor %}"
    template = with_template("{% if messages | length > 2 %}" + writes + "{% endif %}")
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 1000)
    with pytest.raises(TemplateError, match="characters around one conversation"):
        load_splits(DataConfig(data=str(tmp_path / "a.jsonl")), template, max_length=100)


def test_a_models_template_that_writes_without_end_ends_a_command(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "chat_template.jinja").write_text("{% for i in range(99990) %}{{ 'x' * 100 }}{% endfor %}")
    assert main(["generate", "--model", str(model_folder), "Hi"]) == 2
    assert "characters around one conversation" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rendering_leaves_the_interpreter_as_it_was() -> None:
    """With an asynchronous exception pending, Python 3.11 hangs at the next traced call of a function that holds a
    closure, so no debugger and no coverage tool could be used."""
    code = (
        "import sys\n"
        "from handspun.data.chat_template import ChatTemplate\n"
        "from tiny import tiny_tokenizer\n"
        "ChatTemplate(tiny_tokenizer())\n"
        "def outer():\n"
        "    def inner(): return outer\n"
        "    return inner\n"
        "sys.settrace(lambda *event: None)\n"
        "outer()()\n"
        "sys.settrace(None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1] / "helpers", timeout=100, check=False
    )
    assert done.returncode == 0
