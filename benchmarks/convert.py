"""How fast `moray convert` quantizes: against hqq itself, and a Mixtral-8x7B extrapolated from one of its layers.

    python benchmarks/convert.py                        # both parts, about 6 minutes on 2 cores
    python benchmarks/convert.py --only hqq
    python benchmarks/convert.py --only checkpoint --recipe paper-2bit --json

Part *hqq*: one bfloat16 matrix of 4096 x 4096 Gaussian weights of std 0.02 becomes codes, scales and zeros; packing and
reading are not counted on either side.
- *hqq*: ``Quantizer.quantize(matrix, axis=1, optimize=True, bitpack=False)`` on the whole matrix, in this process, with
  a torch thread a core: what its users call. Its scales and zeros stay float32, also where ours have 8 bits.
- *moray*: ``quantize_rows`` in a process a core with one thread each, equal parts of the rows: what the converter does.
  Seconds from the call until the last process is done. Its scales and zeros are rounded as they are stored.
Pairs are interleaved: hqq, moray, hqq, moray, ... after a part of the matrix on each side that is not counted.
*ratio*: median seconds of hqq / median seconds of moray. *error*: norm(restored - matrix) / norm(matrix), from the
codes, scales and zeros of each. *error, moray / hqq*: below 1 is better than hqq. Goals, for the first scheme: ratio
of at least 6, errors no more than 0.5 % above hqq's.

Part *checkpoint*: `moray convert` (a worker a core, this process waits) of two random bfloat16 checkpoints in a
temporary directory, both with Mixtral-8x7B's sizes and vocabulary and one layer, one with 8 experts and one with 2.
*seconds*: from the command's start to its end, one run each.
*a layer*: the 8 experts and the attention, at the seconds a weight that the 6 experts between the two runs took.
*32 layers*: seconds of the run with 8 experts, which has start, embeddings and head, and 31 more layers.
Goal: less than 60 minutes on 2 cores. Files stay in the page cache, if memory allows: the disk's speed is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from common import describe_machine, print_table, working_directory
from geometry import PRESETS, Geometry
from hqq.core.quantize import Quantizer
from make_checkpoint import write_checkpoint

from moray.runtime.convert.quantize import dequantize_rows, quantize_rows
from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe, Scheme

SIZE = 4096
STD = 0.02
RATIO_GOAL, ERROR_GOAL, MINUTES_GOAL = 6.0, 1.005, 60.0


@dataclass(frozen=True)
class Comparison:
    """One scheme, quantized by hqq and by us."""

    scheme: str
    pairs: int
    hqq_s: float
    moray_s: float
    hqq_error: float
    moray_error: float

    @property
    def ratio(self) -> float:
        return self.hqq_s / self.moray_s

    @property
    def error_ratio(self) -> float:
        return self.moray_error / self.hqq_error


@dataclass(frozen=True)
class Conversion:
    """A layer of Mixtral-8x7B, converted."""

    recipe: str
    small_s: float  # 2 experts
    layer_s: float  # 8 experts: the whole run
    seconds_per_layer: float
    num_layers: int

    @property
    def total_minutes(self) -> float:
        return (self.layer_s + (self.num_layers - 1) * self.seconds_per_layer) / 60


def make_matrix(first: int = 0, rows: int = SIZE) -> torch.Tensor:
    """Some rows of the matrix: bfloat16 [rows, 4096]."""
    matrix = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * STD
    return matrix[first : first + rows].bfloat16()


# ----------------------------------------------------------------------------------------- hqq


class Workers:
    """Our side: processes of one thread, each with its part of the matrix."""

    def __init__(self, count: int) -> None:
        self._pools = [ProcessPoolExecutor(1, get_context("spawn"), _start, (i, count)) for i in range(count)]

    def quantize(self, scheme: Scheme) -> float:
        """Quantize all parts. Returns seconds."""
        start = perf_counter()
        for future in [pool.submit(_quantize, scheme) for pool in self._pools]:
            future.result()
        return perf_counter() - start

    def error(self, scheme: Scheme) -> float:
        sums = [future.result() for future in [pool.submit(_squares, scheme) for pool in self._pools]]
        return float((sum(error for error, _ in sums) / sum(norm for _, norm in sums)) ** 0.5)

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


_part = torch.empty(0)  # of the matrix, in a worker


def _start(index: int, count: int) -> None:
    global _part
    torch.set_num_threads(1)
    rows = SIZE // count
    _part = make_matrix(index * rows, rows).clone()


def _quantize(scheme: Scheme) -> None:
    assert scheme.bits is not None
    quantize_rows(_part, scheme.bits, scheme.group, scheme.meta)


def _squares(scheme: Scheme) -> tuple[float, float]:
    """Sums of squares of error and weights."""
    assert scheme.bits is not None
    restored = dequantize_rows(quantize_rows(_part, scheme.bits, scheme.group, scheme.meta))
    weights = _part.double()
    return float((restored.double() - weights).square().sum()), float(weights.square().sum())


def hqq_quantize(matrix: torch.Tensor, scheme: Scheme) -> tuple[float, torch.Tensor]:
    """hqq on the whole matrix. Returns seconds, and what its codes stand for."""
    start = perf_counter()
    codes, meta = Quantizer.quantize(
        matrix, nbits=scheme.bits, group_size=scheme.group, axis=1, optimize=True, bitpack=False, device="cpu"
    )
    seconds = perf_counter() - start
    return seconds, ((codes.float() - meta["zero"]) * meta["scale"]).reshape(matrix.shape)


def compare(text: str, pairs: int, matrix: torch.Tensor, workers: Workers) -> Comparison:
    scheme = Recipe.parse(text)["experts"]
    hqq_quantize(matrix[:64], scheme)
    workers.quantize(scheme)
    hqq_times, moray_times = [], []
    for _ in range(pairs):
        seconds, restored = hqq_quantize(matrix, scheme)
        hqq_times.append(seconds)
        moray_times.append(workers.quantize(scheme))
    hqq_error = float((restored.double() - matrix.double()).norm() / matrix.double().norm())
    return Comparison(str(scheme), pairs, median(hqq_times), median(moray_times), hqq_error, workers.error(scheme))


def compare_all(schemes: Sequence[str], pairs: int, other_pairs: int) -> list[Comparison]:
    """The first scheme with ``pairs``, the others with ``other_pairs``."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    workers = Workers(cores)
    try:
        matrix = make_matrix()
        return [compare(text, other_pairs if i else pairs, matrix, workers) for i, text in enumerate(schemes)]
    finally:
        workers.close()


# ---------------------------------------------------------------------------------- checkpoint


def convert_timed(root: Path, geometry: Geometry, recipe: str) -> float:
    """Write a checkpoint, convert it and remove both. Returns seconds of the conversion."""
    checkpoint = write_checkpoint(root / "checkpoint", geometry)
    command = [sys.executable, "-m", "moray.deploy.cli", "convert", str(checkpoint), str(root / "store")]
    start = perf_counter()
    subprocess.run([*command, "--recipe", recipe], check=True, stdout=subprocess.DEVNULL)
    seconds = perf_counter() - start
    shutil.rmtree(checkpoint)
    shutil.rmtree(root / "store")
    return seconds


def measure_conversion(geometry: Geometry, recipe: str) -> Conversion:
    """``geometry``: the whole model, of which one layer is converted."""
    layer = replace(geometry, layers=1)
    small = replace(layer, experts=2)
    with working_directory(2 * 2 * layer.num_parameters) as root:
        small_s, layer_s = convert_timed(root, small, recipe), convert_timed(root, layer, recipe)
    per_weight = (layer_s - small_s) / (layer.num_parameters - small.num_parameters)
    a_layer = replace(geometry, layers=2).num_parameters - layer.num_parameters
    return Conversion(str(Recipe.parse(recipe)), small_s, layer_s, a_layer * per_weight, geometry.layers)


# -------------------------------------------------------------------------------------- report


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{SIZE} x {SIZE}; hqq: whole matrix, {cores} threads; moray: {cores} processes of one thread\n")
    header = ("scheme", "pairs", "hqq, s", "moray, s", "ratio", "error, hqq", "error, moray", "moray / hqq")
    rows = [
        (
            c.scheme,
            str(c.pairs),
            f"{c.hqq_s:.2f}",
            f"{c.moray_s:.3f}",
            f"{c.ratio:.1f}",
            f"{c.hqq_error:.4f}",
            f"{c.moray_error:.4f}",
            f"{c.error_ratio:.3f}",
        )
        for c in comparisons
    ]
    print_table(header, rows)
    first = comparisons[0]
    met = first.ratio >= RATIO_GOAL and first.error_ratio <= ERROR_GOAL
    print(f"\ngoal, {first.scheme}: ratio >= {RATIO_GOAL:g}, error <= {ERROR_GOAL:g} x hqq's: {_verdict(met)}")


def print_conversion(conversion: Conversion) -> None:
    print(f"\nMixtral-8x7B, recipe {conversion.recipe}, {len(os.sched_getaffinity(0))} processes\n")
    print_table(
        ("", "seconds", "minutes"),
        [
            (name, f"{seconds:.1f}", f"{seconds / 60:.1f}")
            for name, seconds in (
                ("1 layer of 2 experts, embeddings and head", conversion.small_s),
                ("1 layer of 8 experts, embeddings and head", conversion.layer_s),
                ("a layer (from the two)", conversion.seconds_per_layer),
                (f"{conversion.num_layers} layers (extrapolated)", 60 * conversion.total_minutes),
            )
        ],
    )
    met = conversion.total_minutes < MINUTES_GOAL
    print(f"\ngoal: {conversion.num_layers} layers in less than {MINUTES_GOAL:g} minutes: {_verdict(met)}")


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("hqq", "checkpoint"))
    parser.add_argument("--schemes", nargs="+", default=["hqq4:64", "hqq4:64:s8", "hqq3:64:s8", "hqq2:16:s8"])
    parser.add_argument("--pairs", type=int, default=5, help="of the first scheme (5)")
    parser.add_argument("--other-pairs", type=int, default=3, help="of the other schemes (3)")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"of the checkpoint ({DEFAULT_RECIPE})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    comparisons, conversion = [], None
    if arguments.only != "checkpoint":
        comparisons = compare_all(arguments.schemes, arguments.pairs, arguments.other_pairs)
    if arguments.only != "hqq":
        conversion = measure_conversion(PRESETS["mixtral-8x7b"], arguments.recipe)
    if arguments.json:
        print(json.dumps(_document(comparisons, conversion), indent=2))
        return
    print(f"{describe_machine()}\n")
    if comparisons:
        print_comparisons(comparisons)
    if conversion:
        print_conversion(conversion)


def _document(comparisons: Sequence[Comparison], conversion: Conversion | None) -> dict[str, object]:
    found: dict[str, object] = {"machine": describe_machine()}
    found["hqq"] = [asdict(c) | {"ratio": c.ratio, "error_ratio": c.error_ratio} for c in comparisons]
    if conversion:
        found["checkpoint"] = asdict(conversion) | {"total_minutes": conversion.total_minutes}
    return found


if __name__ == "__main__":
    main()
