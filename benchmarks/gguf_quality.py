"""What llama.cpp's quantizations cost in quality, beside moray's recipes: the same checkpoint, the same tokens.

    python benchmarks/gguf_quality.py --checkpoint /path/to/tiny-mixtral --peer-python /tmp/peer/venv/bin/python

The checkpoint (a Mixtral in the hub's original layout, with a tokenizer) is written as GGUF in F16 here, and quantized
by llama.cpp's own quantizer, without an importance matrix. Where rows are not whole blocks of 256, as K-quants need, it
takes other types: the table names those in each file. moray's recipes are converted from the same checkpoint; *none*
keeps its 16 bits. The peer's interpreter is as in peer.py.

Perplexity, agreement and windows are those of benchmarks/perplexity.py and moray/runtime/evaluation.py, over token ids
of the checkpoint's tokenizer; llama.cpp computes each window on its own, too, and gives its logits, from which all
numbers are computed here. The reference of *KL divergence* and *same top token* is moray's *none* in numerics class
float, which is within 1e-5 of transformers. *F16* should hardly differ from it: that checks the file written here.

*bits* are with scales, zeros and padding: of the routed experts, and of the whole model. *bytes* are the GGUF file's,
or those of the store's experts and trunk. *tokens/s* are 1 / the median time of a decode step, in process on both
sides: a forward pass of one token and its largest logit, 64 of them after the first 32 tokens of each of 5 windows. A
model as small as this one is read from the cache: the numbers say more about the cost of a step than about weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, get_args
from uuid import uuid4

import numpy as np
import torch
from common import describe_machine, in_process, print_table, working_directory
from gguf_file import Buffers, GgufTensor, write_gguf
from gguf_model import class_of, group_tensors, metadata_of
from peer_client import Peer, add_peer_python, open_peer
from peer_sizes import CLASSES, gguf_sizes, total_bits
from perplexity import cut_texts, default_texts

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.convert.converter import convert
from moray.runtime.convert.recipe import PRESETS
from moray.runtime.evaluation import Evaluation, TokenScores
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.scoring import score_logits
from moray.runtime.generation.text import require_tokenizer
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store

RECIPES = ["hqq8", "hqq4", "hqq3", "hqq2", *PRESETS]
#: llama_ftype of what is compared.
FTYPES = {"F16": 1, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}

Window = list[int]
PROMPT, PROMPTS, STEPS = 32, 5, 64


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    num_bytes: int
    bits_of_experts: float
    bits: float
    perplexity: float
    mean_kl: float | None
    same_top_share: float | None
    decode_tokens_per_s: float
    types: dict[str, str]  # class of tensors -> GGUF types


# ------------------------------------------------------------------------------------------- GGUF


def write_f16(checkpoint: Path, target: Path) -> Path:
    """A Mixtral or Qwen3-MoE checkpoint as GGUF: matrices F16, routers and norms F32. Returns the file."""
    config = json.loads((checkpoint / "config.json").read_text())
    source = Checkpoint.open(checkpoint)
    groups = group_tensors(source.tensors)
    tensors = []
    for name, parts in groups.items():
        shape = source.describe(parts[0])[0]
        kind = "F32" if class_of(name) == "norms, routers" else "F16"
        tensors.append(GgufTensor(name, (len(parts), *shape) if class_of(name) == "experts" else shape, kind))

    def data_of(tensor: GgufTensor) -> Buffers:
        for part in groups[tensor.name]:
            matrix = _reorder(tensor.name, source.read(part), config)
            wanted = torch.float16 if tensor.type == "F16" else torch.float32
            yield matrix.to(wanted).contiguous().numpy().data.cast("B")

    write_gguf(target, metadata_of(config), tensors, data_of)
    return target


def _reorder(name: str, matrix: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rows of queries and keys as architecture llama wants them: it rotates neighbours, transformers rotates halves."""
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }.get(name.split(".", 2)[-1])
    if heads is None or config["model_type"] != "mixtral":
        return matrix
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def quantize(peer: Peer, source: Path, name: str) -> Path:
    """The file in another type, beside it."""
    if name == "F16":
        return source
    target = source.with_name(f"{name}.gguf")
    threads = len(os.sched_getaffinity(0))
    peer.request("quantize", source=str(source), target=str(target), ftype=FTYPES[name], threads=threads)
    return target


# --------------------------------------------------------------------------------------- measuring


def score_store(path: Path, numerics: Numerics, windows: Sequence[Window]) -> list[TokenScores]:
    with in_process(path, numerics) as runner:
        return [runner.score(window) for window in windows]


def evaluate_store(
    name: str, path: Path, numerics: Numerics, windows: Sequence[Window], reference: Sequence[TokenScores]
) -> Row:
    evaluation = Evaluation()
    with in_process(path, numerics) as runner:
        speed = decode_speed([decode_steps(runner, window[:PROMPT]) for window in windows[:PROMPTS]])
        for window, expected in zip(windows, reference, strict=True):
            evaluation.add(runner.score(window, expected.top_ids), expected)
    with Store.open(path) as store:
        manifest = store.manifest
    size = manifest.expert_bytes + manifest.trunk_bytes
    bits = (manifest.bits_per_expert_weight, manifest.bits_per_weight)
    return _row(f"moray {name}, {numerics}", size, bits, evaluation, speed, {})


def decode_steps(runner: Runner, prompt: Window) -> list[float]:
    """Seconds of each; fewer if the text ends."""
    times = [perf_counter() for _ in runner.stream(GenerationRequest(uuid4().hex, tuple(prompt), STEPS + 1))]
    return [after - before for before, after in pairwise(times)]


def decode_speed(steps: Sequence[Sequence[float]]) -> float:
    found = list(chain.from_iterable(steps))
    assert len(found) > PROMPTS * STEPS // 2, f"the texts ended after {len(found)} steps together"
    return 1 / statistics.median(found)


def evaluate_gguf(
    peer: Peer, path: Path, name: str, windows: Sequence[Window], reference: Sequence[TokenScores]
) -> Row:
    longest = max(len(window) for window in windows)
    peer.load(path, threads=len(os.sched_getaffinity(0)), context=longest, batch=longest)
    evaluation, file = Evaluation(), path.with_suffix(".npy")
    prompts = [window[:PROMPT] for window in windows[:PROMPTS]]
    speed = decode_speed([peer.request("generate", ids=ids, count=STEPS + 1)["seconds"][1:] for ids in prompts])
    for window, expected in zip(windows, reference, strict=True):
        peer.request("logits", ids=window, file=str(file))
        logits = torch.from_numpy(np.load(file)[:-1])
        scores = score_logits(logits, np.array(window[1:], dtype=np.int32), expected.top_ids)
        evaluation.add(scores, expected)
    sizes = gguf_sizes(path)
    types = {kind: sizes[kind].types for kind in CLASSES if sizes[kind].count}
    bits = (sizes["experts"].bits, total_bits(sizes))
    return _row(f"llama.cpp {name}", path.stat().st_size, bits, evaluation, speed, types)


def _row(
    name: str, num_bytes: int, bits: tuple[float, float], evaluation: Evaluation, speed: float, types: dict[str, str]
) -> Row:
    agreement = (evaluation.mean_kl, evaluation.same_top_share)
    return Row(name, num_bytes, *bits, evaluation.perplexity, *agreement, speed, types)


def measure(arguments: argparse.Namespace, root: Path) -> Iterator[Row]:
    stores = {recipe: root / recipe.replace(":", "-") for recipe in dict.fromkeys(["none", *arguments.recipes])}
    for recipe, path in stores.items():
        convert(arguments.checkpoint, path, recipe)
    tokenizer = require_tokenizer(stores["none"])
    files = arguments.text or default_texts(tokenizer, arguments.files, arguments.tokens_per_file)
    _, windows = cut_texts(tokenizer, files, arguments.window, arguments.tokens_per_file)
    predicted = sum(len(window) - 1 for window in windows)
    print(f"{len(windows)} windows of at most {arguments.window} tokens, {predicted:,} tokens predicted\n")
    reference = score_store(stores["none"], "float", windows)
    for recipe, path in stores.items():
        for numerics in arguments.numerics:
            yield evaluate_store(recipe, path, numerics, windows, reference)
    with open_peer(arguments.peer_python) as peer:
        f16 = write_f16(arguments.checkpoint, root / "F16.gguf")
        for name in arguments.types:
            yield evaluate_gguf(peer, quantize(peer, f16, name), name, windows, reference)


# -------------------------------------------------------------------------------------------- main


def print_rows(rows: Sequence[Row]) -> None:
    cells = []
    for row in rows:
        agreement = ("-", "-") if row.mean_kl is None else (f"{row.mean_kl:.5f}", f"{row.same_top_share:.2%}")
        change = f"{100 * (row.perplexity / rows[0].perplexity - 1):+.2f} %"
        bits = (f"{row.bits_of_experts:.2f}", f"{row.bits:.2f}")
        speed = f"{row.decode_tokens_per_s:.0f}"
        cells.append((row.name, *bits, f"{row.num_bytes:,}", f"{row.perplexity:.3f}", change, *agreement, speed))
    header = ("", "bits, experts", "all", "bytes", "perplexity", "vs first", "KL divergence", "same top", "tokens/s")
    print_table(header, cells)
    print("\nGGUF types by class of tensors (without a head, it is the embedding):")
    for row in rows:
        if row.types:
            print(f"- {row.name}: " + "; ".join(f"{kind}: {types}" for kind, types in row.types.items()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer_python(parser)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--types", nargs="+", choices=FTYPES, default=list(FTYPES), help="GGUF types (all)")
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="beside none")
    parser.add_argument("--numerics", nargs="+", choices=get_args(Numerics), default=["float", "int8"])
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files; without it, as perplexity.py")
    parser.add_argument("--files", type=int, default=20, help="of the default text (20)")
    parser.add_argument("--tokens-per-file", type=int, default=1024, help="at most (1024)")
    parser.add_argument("--window", type=int, default=512, help="tokens (512)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    print(describe_machine())
    size = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
    with working_directory(size * (len(arguments.recipes) + len(arguments.types) + 2)) as root:
        rows = list(measure(arguments, root))
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
