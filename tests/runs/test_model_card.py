"""The card says what run.json says, in the hub's format, and nothing of the machine's folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from handspun.runs.model_card import hub_id, license_of, model_card
from handspun.runs.record import RunRecord
from records import record_of


def record(**config: Any) -> RunRecord:
    given = {
        "model": "Qwen/Qwen2.5-0.5B",
        "data": "/home/me/private/train.csv",
        "output_dir": "/home/me/private/output",
        "eval_data": None,
        "eval_ratio": 0.2,
        "lora": False,
        "lora_rank": 16,
        "lora_alpha": 32,
        "num_epochs": 3,
        "system_prompt": "Be brief.",
        **config,
    }
    return record_of(**given)


def card_of(record: RunRecord, **options: Any) -> str:
    return model_card(record, checkpoint={"step": 4, "epoch": 1}, **options)


def test_the_front_matter_is_the_hubs() -> None:
    card = ModelCard(card_of(record(), license="apache-2.0"))
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["handspun", "full-fine-tuning", "sft"],
    }


@pytest.mark.parametrize(
    ("merged", "library", "relation"), [(False, "peft", "adapter"), (True, "transformers", "finetune")]
)
def test_an_adapter_is_one_until_it_is_merged(merged: bool, library: str, relation: str) -> None:
    text = card_of(record(lora=True), merged=merged)
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == (library, relation)
    assert "license" not in data
    assert ("AutoPeftModelForCausalLM" in text) == (library == "peft")
    assert "LoRA, rank 16, alpha 32" in text


def test_a_base_that_is_a_folder_is_no_id_and_no_address(tmp_path: Path) -> None:
    text = card_of(record(model=str(tmp_path / "my-base")))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "`my-base`" in text
    assert str(tmp_path) not in text


def test_nothing_of_the_machines_folders_is_in_it() -> None:
    text = card_of(record())
    assert "/home/me" not in text
    assert "train.csv: 10 of 12 rows, 2 dropped; 500 tokens, 200 of them target tokens; sha256 `abab" in text


def test_it_tells_checkpoint_losses_and_options() -> None:
    text = card_of(record())
    assert "| this checkpoint | step 4 of 12, epoch 1 |" in text
    assert "| 0 | 0 | 2.0000 | 7.39 |" in text
    assert "| 4 (this checkpoint) | 1 | 1.0000 | 2.72 |" in text
    options = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert options["num_epochs"] == 3
    assert options["system_prompt"] == "Be brief."
    assert "output_dir" not in options
    assert "## Held-out loss" not in card_of(replace(record(), evaluations=[]))


@pytest.mark.parametrize("end", ["|", "---", "```"])
def test_names_do_not_break_the_page(end: str) -> None:
    text = card_of(record(data=f"/data/a{end}b.csv"))
    assert ModelCard(text).data.to_dict()["library_name"] == "transformers"
    line = next(line for line in text.splitlines() if line.startswith("| training rows"))
    assert line.replace("\\|", "").count("|") == 3


def test_datasets_of_the_hub_are_named() -> None:
    assert ModelCard(card_of(record(data="tatsu-lab/alpaca"))).data.to_dict()["datasets"] == ["tatsu-lab/alpaca"]
    assert "datasets" not in ModelCard(card_of(record())).data.to_dict()


def test_what_is_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id("/models/qwen") is None
    assert hub_id("models/qwen.gguf") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    assert hub_id("models/qwen") is None  # a folder is read before the hub is asked


def test_the_license_is_the_base_models_own(tmp_path: Path) -> None:
    assert license_of("smollm2-135m") == "apache-2.0"
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    assert license_of(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("no front matter")
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(str(tmp_path)) is None
