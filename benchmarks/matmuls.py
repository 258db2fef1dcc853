"""The matrix matmuls of a decoding step, by the ways that there are: milliseconds for all layers and the head.

    python benchmarks/matmuls.py [--model FOLDER] [--rows 1 2 4 8 16 32] [--threads 2]

float32 by F.linear (MKL on x86), by oneDNN with the weights as they lie, and by oneDNN with the weights laid out
anew for it, which takes their memory again; int8 by the kernels of each instruction set that this CPU has. The
weights are random, of the shapes of the model. The ways take turns; medians of several rounds, the fastest and
the slowest beside them.
"""

import argparse
import os
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from handspun.kernels.allocator import disable_malloc_trim
from handspun.kernels.native import supported_sets
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.fused import FloatProduct, Int8Product
from handspun.models.load import load_config, model_source
from measurements import table, with_range

Way = Callable[[Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    disable_malloc_trim()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        weights = [torch.randn(shape) for shape in shapes(arguments.model)]
        seconds = measure(ways_of(weights), weights, arguments.rows, arguments.rounds)
    head = ["rows", *next(iter(seconds.values()))]
    print(
        table(head, [[str(n), *(with_range(some, 1) for some in found.values())] for n, found in seconds.items()])
    )


def shapes(model: str) -> list[tuple[int, int]]:
    """(out, in) of all fused matrices: q with k and v, o, gate with up, down, layer by layer, and the head."""
    config = load_config(model_source(model))
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * width, config.num_key_value_heads * width
    layer = [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]
    return [*(config.num_hidden_layers * layer), (config.vocab_size, hidden)]


def ways_of(weights: list[Tensor]) -> dict[str, list[Way]]:
    """Each a function a matrix."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    return {
        "F.linear": [lambda x, w=weight: F.linear(x, w) for weight in weights],
        "oneDNN": [FloatProduct(weight, None) for weight in weights],
        "oneDNN, laid out": [
            lambda x, w=weight: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for weight in packed
        ],
        **{f"int8, {name}": int8_with(name, weights) for name in supported_sets()},
    }


def int8_with(name: str, weights: list[Tensor]) -> list[Way]:
    """With the kernels of an instruction set."""
    with patch.dict(os.environ, {"HANDSPUN_KERNELS": name}):
        return [Int8Product(weight, None) for weight in weights]


def measure(
    ways: dict[str, list[Way]], weights: list[Tensor], rows: list[int], rounds: int
) -> dict[int, dict[str, list[float]]]:
    """Milliseconds of each round, by rows and way; the first round is not counted."""
    found: dict[int, dict[str, list[float]]] = {}
    for count in rows:
        inputs = {width: torch.randn(count, width) for width in {weight.shape[1] for weight in weights}}
        found[count] = {name: [] for name in ways}
        for round_ in range(rounds + 1):
            for name, matmuls in ways.items():
                began = time.perf_counter()
                for matmul, weight in zip(matmuls, weights, strict=True):
                    matmul(inputs[weight.shape[1]])
                if round_:
                    found[count][name].append(1000 * (time.perf_counter() - began))
    return found


if __name__ == "__main__":
    main()
