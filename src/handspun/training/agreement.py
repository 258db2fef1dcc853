"""Checks before the first step that all ranks have the same options, rows, and weights.

Ranks that differ would hang in different collectives, or silently diverge. Every rank takes part in each check,
whatever its options are, and all of them raise the same error.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import PreTrainedModel

from handspun import __version__
from handspun.config import TrainConfig
from handspun.config.ranges import option_name
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import Dataset
from handspun.data.examples import TokenDataset
from handspun.errors import ConfigError
from handspun.training.distributed import Distributed

_MAY_DIFFER = {"data", "eval_data", "model", "chat_template", "output_dir", "threads", "cache_examples"}
"""Options with paths or numbers of this machine. The contents of the paths are compared instead."""

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy")
_SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "HANDSPUN_KERNELS",
)
"""Environment variables that change the results."""


def check_same_options(config: TrainConfig, processes: Distributed) -> None:
    """Raise ConfigError on all ranks if their options, versions, or environment variables differ."""
    options = {option_name(name): value for name, value in asdict(config).items() if name not in _MAY_DIFFER}
    facts = {name: "nothing" if value is None else str(value) for name, value in options.items()}
    facts |= {"Python": platform.python_version(), "handspun": __version__, **dict(_versions())}
    facts |= {name: os.environ.get(name, "nothing") for name in _SWITCHES}
    facts["device type"] = processes.device.type
    _check_same(facts, processes, "Start all ranks with the same options, versions, and environment.")


def check_same_rows(
    training: Dataset,
    held_out: Dataset | None,
    template: ChatTemplate,
    max_length: int,
    processes: Distributed,
) -> None:
    """Raise ConfigError on all ranks if their rows, template, tokenizer, or tokens differ.

    Args:
        training: this rank's training rows.
        held_out: this rank's held-out rows, if any.
        template: this rank's chat template, with its tokenizer.
        max_length: longest example in tokens.
        processes: the ranks; all of them must call it together.
    """
    facts = {"the longest example (--max-length)": str(max_length)}
    for name, some in (("the training rows (--data)", training), ("the held-out rows (--eval-data)", held_out)):
        facts[name] = f"{some.account.rows} rows of sha256 {some.fingerprint[:12]}" if some else "none"
    facts["the chat template"] = _digest(str(template.tokenizer.chat_template))
    facts["the tokenizer"] = _digest(template.tokenizer.backend_tokenizer.to_str())
    facts["the tokens of the training rows"] = _digest_of(training.examples)
    facts["the tokens of the held-out rows"] = _digest_of(held_out.examples) if held_out else "none"
    _check_same(facts, processes, "Give all ranks the same data files and the same model.")


def check_same_weights(model: PreTrainedModel, processes: Distributed) -> None:
    """Raise ConfigError on all ranks if their weights differ."""
    digest = hashlib.sha256()
    if processes.count > 1:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum_of_bits(tensor)}\n".encode())
    facts = {"the model's weights (--model)": f"sha256 {digest.hexdigest()[:12]}"}
    _check_same(facts, processes, "Give all ranks the same model.")


def _check_same(facts: Mapping[str, str], processes: Distributed, remedy: str) -> None:
    first, *others = processes.gathered(dict(facts))
    problems = list(_differences(first, dict(enumerate(others, 1))))
    if problems:
        raise ConfigError(["the ranks do not agree on the run.", *problems, remedy])


def _differences(first: Mapping[str, str], others: Mapping[int, Mapping[str, str]]) -> Iterator[str]:
    """Yield one line per fact that differs between ranks."""
    # Ranks of different versions may have different facts.
    for name in dict.fromkeys([*first, *(name for facts in others.values() for name in facts)]):
        expected = first.get(name, "unknown")
        ranks = [rank for rank, facts in others.items() if facts.get(name, "unknown") != expected]
        if ranks:
            more = f" (and {len(ranks) - 1} more differ)" if len(ranks) > 1 else ""
            found = others[ranks[0]].get(name, "unknown")
            yield f"  {name}: rank 0 has {expected}, rank {ranks[0]} has {found}{more}"


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "nothing"


def _digest(text: str) -> str:
    return f"sha256 {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def _digest_of(examples: TokenDataset) -> str:
    digest = hashlib.sha256()
    for array in (examples.input_ids, examples.loss_mask, examples.starts):
        digest.update(array.tobytes())
    return f"sha256 {digest.hexdigest()[:12]}"


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """Return the sum of the tensor's bits as integers."""
    # Unlike sha256, it runs at memory speed.
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.contiguous().view(sizes[tensor.element_size()]).sum(dtype=torch.int64))
