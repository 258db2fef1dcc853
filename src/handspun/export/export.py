"""Exports of a checkpoint, put together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from handspun.config import ExportConfig
from handspun.errors import OutputError
from handspun.export.gguf_file import write_gguf
from handspun.export.hub import hub, push_folder, refuse_local_base
from handspun.models.load import ChatModel, load
from handspun.report.model_card import license_of, model_card
from handspun.report.whole_file import whole_file
from handspun.training.checkpoint import MANIFEST, save_checkpoint


def export(wanted: ExportConfig, *, notice: Callable[[str], None]) -> None:
    """Makes what is wanted, and tells what was made. Raises a HandspunError before anything is done in vain."""
    api = hub(wanted.token) if wanted.push else None
    folder = wanted.folder
    if wanted.push and not wanted.makes:
        refuse_local_base(folder)
    if wanted.makes:
        _refuse_to_replace(wanted, folder)
        chat = load(wanted.model, weights="float32", device="cpu", notice=notice)
        if wanted.merge:
            _merge(chat, wanted, folder, notice)
        if wanted.gguf:
            file = gguf_file(wanted, folder)
            with whole_file(file, option="--output-dir") as partial:
                write_gguf(chat, partial, wanted.gguf, notice=notice)
            notice(f"{wanted.gguf} GGUF: {file} ({file.stat().st_size / 1e6:.0f} MB)")
    if wanted.push and api is not None:
        kind = "private, if it is new" if wanted.private else "public, if it is new"
        address = push_folder(folder, wanted.push, api, private=wanted.private)
        notice(f"pushed to {address} ({kind})")


def gguf_file(wanted: ExportConfig, folder: Path) -> Path:
    """`checkpoint-best-f16.gguf`."""
    return folder / f"{Path(wanted.model).name.removesuffix('.gguf')}-{wanted.gguf}.gguf"


def _refuse_to_replace(wanted: ExportConfig, folder: Path) -> None:
    if wanted.merge and Path(wanted.model).resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{folder} holds the model that is to be merged: choose another --output-dir.")
    if wanted.overwrite:
        return
    if wanted.merge and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder} is there already: choose another --output-dir, or replace all of it with --overwrite."
        )
    if wanted.gguf and gguf_file(wanted, folder).exists():
        raise OutputError(
            f"{gguf_file(wanted, folder)} is there already: choose another --output-dir, or replace it with "
            "--overwrite."
        )


def _merge(chat: ChatModel, wanted: ExportConfig, folder: Path, notice: Callable[[str], None]) -> None:
    dtype = torch.bfloat16 if wanted.save_dtype == "bfloat16" else torch.float32
    card = _merged_card(Path(wanted.model))
    facts = {"merged_from": Path(wanted.model).name}
    save_checkpoint(chat.model, chat.tokenizer, folder, dtype=dtype, facts=facts, card=card)
    notice(f"merged: {folder} ({wanted.save_dtype})")
    if card is None:
        notice(f"no model card: {wanted.model} is not a checkpoint beside its run's run.json")


def _merged_card(checkpoint: Path) -> str | None:
    """The card that the checkpoint's run would write; None where its records are not there."""
    try:
        facts: dict[str, Any] = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return model_card(
            facts,
            checkpoint=manifest,
            evaluations=[e for e in facts["evaluations"] if e["step"] <= manifest["step"]],
            license=license_of(facts["config"]["model"]),
            merged=True,
        )
    except (OSError, ValueError, KeyError):
        return None
