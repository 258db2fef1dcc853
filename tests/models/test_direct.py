"""int8 models read straight from their files: the same weights, ids and answers as through transformers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode as of_transformers

import handspun
from handspun.data.text_loss import bytes_to_unicode
from handspun.decoding.options import _UNSUPPORTED, SamplingParams
from handspun.errors import ModelError
from handspun.models import direct, load
from handspun.models.direct import FileTokenizer, load_int8_directly, read_tokenizer
from handspun.models.fused import FusedWeights
from handspun.models.load import ChatModel, load_int8, model_source
from tiny import qwen_tokenizer, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
NORM = "model.norm.weight"
MODELS = ("llama", "llama, bfloat16, a head of its own", "qwen2", "qwen3")


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        kept = {**json.loads(file.read_text(encoding="utf-8")), **values}
        kept = {name: value for name, value in kept.items() if value is not ...}
        file.write_text(json.dumps(kept), encoding="utf-8")

    return change


NAME_ROLES = change_json("tokenizer_config.json", bos_token=None, unk_token=None)
"""As the tokenizers of real models have it: all roles are named, if only with null."""


def make_model(kind: str) -> Any:
    if kind == "qwen3":
        shape: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "head_dim": 16,
        }
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(vocab_size=330, **shape, **heads)).eval()
    if kind == "qwen2":
        return tiny_model("qwen2", tie_word_embeddings=True)
    if kind == "llama":
        return tiny_model("llama", tie_word_embeddings=True)
    wide: Any = tiny_model("llama")
    return wide.to(torch.bfloat16)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / request.param.partition(",")[0]
    make_model(request.param).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    NAME_ROLES(path)
    return path


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    NAME_ROLES(folder)
    return folder


def read(folder: Path) -> ChatModel | None:
    return direct._read(model_source(str(folder)), CPU)


def tensors_of(fused: FusedWeights) -> list[Tensor]:
    products: list[Any] = [fused.head]
    found = [fused.norm, fused.frequencies]
    for layer in fused.layers:
        norms = (layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
        found += [torch.zeros(0) if norm is None else norm for norm in norms]
        products += [layer.qkv, layer.o, layer.gate_up, layer.down]
    for product in products:
        bias = product.bias
        found += [product.matrix.weight, product.scale, torch.zeros(0) if bias is None else bias]
    return found


def test_weights_settings_and_answers_are_those_of_transformers(folder: Path) -> None:
    found, expected = read(folder), load_int8(model_source(str(folder)), CPU)
    assert found is not None
    assert isinstance(found.tokenizer, FileTokenizer)
    ours, theirs = found.fused, expected.fused
    for name in ("heads", "kv_heads", "head_size", "norm_eps", "attention_scaling", "cache_dtype", "is_int8"):
        assert getattr(ours, name) == getattr(theirs, name)
    pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
    assert len(pairs) == 2 + 2 * 4 + 9 * 3
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
    of_model = (found.model.generation_config, expected.model.generation_config)
    names = {*SamplingParams.__dataclass_fields__, *_UNSUPPORTED, "eos_token_id", "pad_token_id"}
    settings = [{name: getattr(one, name, None) for name in names} for one in of_model]
    assert settings[0] == settings[1]
    for options in ({}, {"do_sample": True, "temperature": 2.0}, {"regex": "[a-z ]+"}, {"num_beams": 2}):
        answers = [
            handspun.generate(chat, ["Say 3.", "Why?"], max_new_tokens=6, **options) for chat in (found, expected)
        ]
        assert answers[0] == answers[1]
        assert answers[0][0].token_ids


def test_a_trained_checkpoint_is_read(copied: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(8)]
    run = handspun.train(rows, model=str(copied), num_epochs=1, output_dir=str(tmp_path / "output"))
    found = read(run.checkpoints[-1])
    assert found is not None
    expected = load_int8(model_source(str(run.checkpoints[-1])), CPU)
    assert handspun.generate(found, "Say 3.", max_new_tokens=6) == handspun.generate(
        expected, "Say 3.", max_new_tokens=6
    )


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


LEFT_TO_TRANSFORMERS: dict[str, Callable[[Path], object]] = {
    "another family": change_json("config.json", model_type="mistral"),
    "a number left to a default": change_json("config.json", num_key_value_heads=...),
    "a sliding window": change_json("config.json", use_sliding_window=True),
    "scaled positions": change_json(
        "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "quantized weights": change_json("config.json", quantization_config={"bits": 4}),
    "no generation_config": lambda folder: (folder / "generation_config.json").unlink(),
    "a nested generation setting": change_json("generation_config.json", watermarking_config={"bias": 2.0}),
    "several files of weights": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {NORM: "model.safetensors"}})
    ),
    "a weight too many": change_weights(lambda weights: weights.update(other=torch.ones(1))),
    "a weight of another shape": change_weights(lambda weights: weights.update({NORM: torch.ones(31)})),
    "a missing weight": change_weights(lambda weights: weights.pop(NORM)),
    "a damaged file": lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"),
    "a norm that is not finite": change_weights(lambda weights: weights[NORM].fill_(float("inf"))),
    "a weight that is not finite": change_weights(
        lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan"))
    ),
    "another class of tokenizers": change_json("tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
    "a role that is not named": change_json("tokenizer_config.json", unk_token=...),
    "a begin of text": change_json("tokenizer_config.json", add_bos_token=True, bos_token="<|im_start|>"),
    "a token that tokenizer.json lacks": change_json("tokenizer_config.json", bos_token="<new>"),
    "a token with spaces around it": change_json("tokenizer_config.json", bos_token={"content": "<|im_start|>"}),
    "special tokens in a file of their own": lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
    "a tokenizer that truncates": change_json(
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    ),
    "a tokenizer that is not of bytes": change_json("tokenizer.json", decoder=None),
    "two chat templates": change_json("tokenizer_config.json", chat_template="{{ messages }}"),
}


@pytest.mark.parametrize("change", LEFT_TO_TRANSFORMERS.values(), ids=LEFT_TO_TRANSFORMERS.keys())
def test_anything_else_is_left_to_transformers(copied: Path, change: Callable[[Path], object]) -> None:
    assert read(copied) is not None
    change(copied)
    assert read(copied) is None


def test_errors_are_worded_by_the_general_loader(copied: Path) -> None:
    LEFT_TO_TRANSFORMERS["a weight that is not finite"](copied)
    with pytest.raises(ModelError, match=r"NaN or infinity: model.layers.1.mlp.up_proj.weight \(32 of 2,048"):
        load.load(str(copied), weights="int8", int8_loader=load_int8_directly)


@pytest.mark.parametrize("make", [tiny_tokenizer, qwen_tokenizer])
def test_the_tokenizer_is_that_of_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    NAME_ROLES(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    source = model_source(str(tmp_path))
    found, expected = read_tokenizer(source), load.load_tokenizer(source)
    assert found is not None
    for name in ("chat_template", "special_tokens_map", "added_tokens_decoder", "bos_token_id", "eos_token_id"):
        assert getattr(found, name) == getattr(expected, name)
    assert (found.pad_token_id, found.unk_token_id, len(found)) == (
        expected.pad_token_id,
        expected.unk_token_id,
        len(expected),
    )
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    for text in ("", "The city. <|im_end|> 12 caf\u00e9", "<tool_call>\n\t"):
        for special in (True, False):
            ids = expected(text, add_special_tokens=special)["input_ids"]
            assert found(text, add_special_tokens=special)["input_ids"] == ids
    tools = [{"type": "function", "function": {"name": "weather", "description": "<b>\u00fc</b>"}}]
    turns = [{"role": "system", "content": "Be & brief."}, {"role": "user", "content": "Hi", "tool_calls": None}]
    for given in ({}, {"tools": tools}, {"add_generation_prompt": True}, {"messages": turns[1:]}):
        arguments: dict[str, Any] = {"messages": turns, "tools": None, "add_generation_prompt": False, **given}
        messages = arguments.pop("messages")
        rendered = expected.apply_chat_template(messages, tokenize=False, **arguments)
        assert found.apply_chat_template(messages, tokenize=False, **arguments) == rendered


SPECIAL_TEMPLATES = (
    "{% set ns = namespace(a=1) %}{{ ns.a }}{{ messages[0].content }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{{ dict(a=messages[0].content) }}",
    "{{ messages[0].thinking }}{{ messages[0].content }}",
)


@pytest.mark.parametrize("template", SPECIAL_TEMPLATES)
def test_templates_that_need_transformers_are_rendered_by_it(template: str, copied: Path) -> None:
    source = model_source(str(copied))
    found, expected = read_tokenizer(source), load.load_tokenizer(source)
    found.chat_template = expected.chat_template = template
    messages = [{"role": "user", "content": "Hi", "reasoning": "Hm"}]
    rendered = found.apply_chat_template(messages, tokenize=False)
    assert rendered == expected.apply_chat_template(messages, tokenize=False)
    assert "Hi" in rendered
    assert found.decode([258]) == expected.decode([258])


def test_a_template_raises_as_in_transformers(copied: Path) -> None:
    found = read_tokenizer(model_source(str(copied)))
    found.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(Exception, match=r"^no system role$"):
        found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_bytes_to_unicode_is_the_table_of_transformers() -> None:
    assert bytes_to_unicode() == of_transformers()


HEAVY = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "pandas",
    "peft",
    "pyarrow",
    "pydantic",
    "sklearn",
    "transformers",
)


def test_generate_in_int8_imports_nothing_heavy_but_torch(copied: Path) -> None:
    """And in float32, and for training all weights, neither peft nor what reads hub datasets."""
    options = f"'--model', {str(copied)!r}, '--max-new-tokens', '4'"
    code = (
        "import sys; from handspun.cli import main\n"
        f"heavy = {HEAVY}; loaded = lambda: [name for name in heavy if name in sys.modules]\n"
        f"assert main(['generate', 'Say 3.', '--weights', 'int8', {options}]) == 0\n"
        "print('int8', loaded())\n"
        f"assert main(['generate', 'Say 3.', {options}]) == 0\n"
        "import handspun.runs.train\n"
        "print('float32 and training', [name for name in ('datasets', 'peft') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "int8 []" in done.stdout.splitlines()
    assert "float32 and training []" in done.stdout.splitlines()


_PEAK = """
import re, sys
from pathlib import Path
import torch
from handspun.models.direct import load_int8_directly
from handspun.models.load import model_source

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

source = model_source(sys.argv[1])
before = megabytes("VmRSS")
chat = load_int8_directly(source, torch.device("cpu"))
print(type(chat.model).__name__, megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
def test_load_int8_directly_holds_no_second_copy_of_the_model(tmp_path: Path) -> None:
    """48 layers of 2.1 million weights are 192 MB of bfloat16 and 96 MB of int8; both at once would be 288."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 48}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=330, tie_word_embeddings=True, **sizes, **heads))
    model.to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[arg-type]
    tiny_tokenizer().save_pretrained(tmp_path)
    NAME_ROLES(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size / 1024**2
    assert 180 < file < 220
    done = subprocess.run([sys.executable, "-c", _PEAK, tmp_path], capture_output=True, text=True, check=True)
    kind, grown = done.stdout.split()
    assert kind == "DecodedModel"
    assert file / 2 < float(grown) < file * 0.85
