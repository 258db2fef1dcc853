"""`handspun export`: merge, write GGUF, push."""

import glob
import os
from importlib.util import find_spec
from pathlib import Path

import torch

from handspun.config import ExportConfig
from handspun.display import captured_log, join_names, logger
from handspun.errors import OutputError, check_installed
from handspun.exports.hub import check_base_on_hub, hub, push_folder
from handspun.files import is_partial, locked, whole_file
from handspun.models.load import ChatModel, ModelSource, load, model_source
from handspun.runs.model_card import license_of, model_card
from handspun.runs.record import read_record
from handspun.runs.replacing import check_inputs_outside
from handspun.training.checkpoint import edited_files, read_manifest, save_checkpoint, unknown_files


def export(wanted: ExportConfig) -> None:
    """Make the requested exports and report each one.

    Existing output is replaced only if Handspun wrote it, and only once the new output is complete. Raises a
    HandspunError, before any work that would be in vain.
    """
    if wanted.gguf:
        check_installed("gguf", "gguf", "--gguf")
    api = hub(wanted.token) if wanted.push else None
    folder = Path(os.path.realpath(wanted.folder))  # keeps a symbolic link in place, and gives `.` a name
    if wanted.push and not wanted.makes:
        check_base_on_hub(folder)
    if wanted.makes:
        with captured_log():  # loading logs the same
            source = model_source(wanted.model)
        _check_inputs_outside(wanted, folder, source)
        if wanted.merge:
            with locked(folder, busy=lambda owner: _busy(folder, owner)):
                _check_replaceable(wanted, folder)
                _write_folder(wanted, folder)
        else:
            _write_file(wanted, folder)
    if wanted.push and api is not None:
        kind = "private if new" if wanted.private else "public if new"
        address = push_folder(folder, wanted.push, api, private=wanted.private)
        logger.info(f"pushed to {address} ({kind})")


def _busy(folder: Path, owner: str) -> str:
    return f"another export is writing {folder}{owner}. Wait until it finishes, or choose another --output-dir."


def _write_folder(wanted: ExportConfig, folder: Path) -> None:
    """Write the merged model, and a GGUF file in the same folder if requested."""
    chat = _load(wanted)
    card = _merged_card(Path(wanted.model))
    save_checkpoint(
        chat,
        folder,
        dtype=torch.bfloat16 if wanted.save_dtype == "bfloat16" else torch.float32,
        facts={"merged_from": Path(wanted.model).name},
        card=card,
        more=(lambda new: _write_gguf(chat, wanted, gguf_file(wanted, new))) if wanted.gguf else None,
    )
    logger.info(f"merged: {wanted.folder} ({wanted.save_dtype})")
    if card is None:
        logger.info(f"no model card: {wanted.model} is not a checkpoint next to its run's run.json")
    if wanted.gguf:
        _report_gguf(wanted)


def _write_file(wanted: ExportConfig, folder: Path) -> None:
    file = gguf_file(wanted, folder)
    with locked(file, busy=lambda owner: _busy(file, owner)):
        if file.exists() and not wanted.overwrite:
            raise OutputError(
                f"{file} already exists. Choose another --output-dir, or replace it with --overwrite."
            )
        if os.path.lexists(file) and not _is_our_gguf(file):
            raise OutputError(
                f"{file} was not written by Handspun, so it is not replaced. Move it away, or choose another "
                "--output-dir."
            )
        chat = _load(wanted)
        for leftover in file.parent.glob(f".{glob.escape(file.name)}.*"):
            if is_partial(leftover):
                leftover.unlink()
        with whole_file(file, option="--output-dir") as partial:
            _write_gguf(chat, wanted, partial)
    _report_gguf(wanted)


def _write_gguf(chat: ChatModel, wanted: ExportConfig, path: Path) -> None:
    from handspun.exports.gguf_file import write_gguf  # here: it needs an extra

    assert wanted.gguf is not None
    write_gguf(chat, path, wanted.gguf)


def _is_our_gguf(path: Path) -> bool:
    """Return whether `write_gguf` wrote a file. Without the package that reads it, no file counts as ours."""
    if find_spec("gguf") is None:
        return False
    from handspun.exports.gguf_file import is_written_here

    return is_written_here(path)


def _report_gguf(wanted: ExportConfig) -> None:
    file = gguf_file(wanted, wanted.folder)
    logger.info(f"{wanted.gguf} GGUF: {file} ({file.stat().st_size / 1e6:.0f} MB)")


def _load(wanted: ExportConfig) -> ChatModel:
    return load(wanted.model, weights="float32", device="cpu")


def gguf_file(wanted: ExportConfig, folder: Path) -> Path:
    """Return the path of the GGUF file, such as `checkpoint-best-f16.gguf` in the folder."""
    return folder / f"{Path(wanted.model).name.removesuffix('.gguf')}-{wanted.gguf}.gguf"


def _check_inputs_outside(wanted: ExportConfig, folder: Path, source: ModelSource) -> None:
    doomed = folder if wanted.merge else gguf_file(wanted, folder)
    models = [wanted.model, source.location, source.adapter or wanted.model]
    if source.gguf_file:
        models[1] = Path(source.location) / source.gguf_file
    check_inputs_outside(models, [], [doomed], "Choose another --output-dir.")


def _check_replaceable(wanted: ExportConfig, folder: Path) -> None:
    """Raise OutputError if the folder exists and may not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not wanted.overwrite:
        raise OutputError(
            f"{wanted.folder} already exists. Choose another --output-dir, or replace all of it with --overwrite."
        )
    files = [*unknown_files(folder), *edited_files(folder)]
    if strangers := [str(path.relative_to(folder)) for path in files if not _is_our_gguf(path)]:
        raise OutputError(
            f"{wanted.folder} contains files that Handspun did not write, or that have changed since: "
            f"{join_names(strangers)}. Move them away, or choose another --output-dir."
        )


def _merged_card(checkpoint: Path) -> str | None:
    """Return the model card for the merged checkpoint, or None if its run's records are missing."""
    record, manifest = read_record(checkpoint.parent), read_manifest(checkpoint)
    if isinstance(record, str) or record.plan is None or manifest is None:
        return None
    try:
        record.evaluations = [one for one in record.evaluations if one.step <= manifest["step"]]
        return model_card(record, checkpoint=manifest, license=license_of(record.config["model"]), merged=True)
    except KeyError:
        return None
