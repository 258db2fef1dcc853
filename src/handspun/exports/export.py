"""`handspun export`: merge, write GGUF, push."""

import glob
import os
import re
import shlex
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch

from handspun.config import ExportConfig
from handspun.display import join_names, logger
from handspun.errors import OutputError
from handspun.exports.hub import check_base_on_hub, hub, push_folder
from handspun.exports.modelfile import modelfile
from handspun.files import is_partial, locked, output_errors, whole_file, write_text
from handspun.models.load import ChatModel, ModelSource, checkpoint_of_run, load, model_source
from handspun.runs.model_card import base_name, license_of, model_card
from handspun.runs.record import read_record
from handspun.runs.replacing import check_inputs_outside
from handspun.training.checkpoint import edited_files, read_manifest, save_checkpoint, unknown_files

_WRITTEN_BY = "# Written by Handspun. The sha256 of the lines below: "


def export(wanted: ExportConfig) -> None:
    """Make the requested exports and report each one.

    Existing output is replaced only if Handspun wrote it, and only once the new output is complete. Raises a
    HandspunError, before any work that would be in vain.
    """
    api = hub(wanted.token) if wanted.push else None
    folder = Path(os.path.realpath(wanted.folder))  # keeps a symbolic link in place, and gives `.` a name
    if wanted.push and not wanted.makes:
        check_base_on_hub(folder)
    if wanted.makes:
        level = logger.level
        logger.setLevel("WARNING")  # loading says the rest again; that the hub does not answer is said once
        try:
            source = model_source(wanted.model)
        finally:
            logger.setLevel(level)
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
        more=(lambda new: _write_gguf_folder(chat, wanted, new)) if wanted.gguf else None,
    )
    logger.info(f"the merged model is in {wanted.folder} ({wanted.save_dtype})")
    if card is None:
        logger.info(f"no model card: {wanted.model} is not a checkpoint next to its run's run.json")
    if wanted.gguf:
        _say_how_to_run(wanted)


def _write_gguf_folder(chat: ChatModel, wanted: ExportConfig, folder: Path) -> None:
    _write_gguf(chat, wanted, gguf_file(wanted, folder))
    _write_modelfile(chat, gguf_file(wanted, folder))


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
        described = _modelfile_of(file)
        if os.path.lexists(described) and not _is_our_modelfile(described):
            raise OutputError(
                f"{described} was not written by Handspun, or has changed since, so it is not replaced. Move it "
                "away, or choose another --output-dir."
            )
        chat = _load(wanted)
        for leftover in file.parent.glob(f".{glob.escape(file.name)}.*"):
            if is_partial(leftover):
                leftover.unlink()
        with whole_file(file, option="--output-dir") as partial:
            _write_gguf(chat, wanted, partial)
        with output_errors(described):
            _write_modelfile(chat, file)
    _say_how_to_run(wanted)


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


def _modelfile_of(gguf: Path) -> Path:
    return gguf.with_name(f"{gguf.stem}.Modelfile")


def _write_modelfile(chat: ChatModel, gguf: Path) -> None:
    text = modelfile(chat, gguf)
    write_text(_modelfile_of(gguf), f"{_WRITTEN_BY}{sha256(text.encode()).hexdigest()}\n{text}")


def _is_our_modelfile(path: Path) -> bool:
    """Return whether a Modelfile is as it was written, by the checksum in its first line."""
    if path.is_symlink() or not path.is_file():
        return False
    first, _, rest = path.read_bytes().partition(b"\n")
    return first == f"{_WRITTEN_BY}{sha256(rest).hexdigest()}".encode()


def _say_how_to_run(wanted: ExportConfig) -> None:
    """Log what was written, and the commands that run it."""
    file = gguf_file(wanted, wanted.folder)
    path, described = shlex.quote(str(file)), shlex.quote(str(_modelfile_of(file)))
    name = shlex.quote(file.stem.lower())
    logger.info(f"the GGUF file is {file} ({wanted.gguf}, {file.stat().st_size / 1e6:.0f} MB); to run it:")
    logger.info(f"  ollama create {name} -f {described} && ollama run {name}")
    logger.info(f"  llama-cli -m {path} --jinja --temp 0    # llama.cpp")
    logger.info(f"  lms import {path}    # LM Studio")


def _load(wanted: ExportConfig) -> ChatModel:
    return load(wanted.model, weights="float32", device="cpu")


def gguf_file(wanted: ExportConfig, folder: Path) -> Path:
    """Return the path of the GGUF file, such as `smollm2-135m-output-q8_0.gguf`: base, run, type.

    A checkpoint other than the best one is named too. Models that are no checkpoints keep their names.
    """
    model = Path(os.path.realpath(os.path.expanduser(wanted.model)))
    model = checkpoint_of_run(model) or model
    name = Path(wanted.model).name.removesuffix(".gguf")
    if model.name.startswith("checkpoint-"):
        record = read_record(model.parent)
        base = [] if isinstance(record, str) else [base_name(record.config["model"]).rpartition("/")[2]]
        kind = model.name.removeprefix("checkpoint-")
        name = "-".join([*base, model.parent.name, *([] if kind == "best" else [kind])])
        name = re.sub(r"[^\w.-]+", "-", name.lower())
    return folder / f"{name}-{wanted.gguf}.gguf"


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
