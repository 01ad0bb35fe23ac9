"""What ``moray bench kernels`` is asked to measure, read from the command line's words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import cast, get_args

from moray.runtime.errors import ConfigError
from moray.runtime.layout.packed import ENCODINGS, METAS, Encoding, Meta, Numerics, PackedSpec
from moray.runtime.planning.sizes import parse_bytes

DEFAULT_ENCODINGS = "q8,q4,q3,q2,q4:64:u8,q3:64:u8,q2:16:u8,bf16"
_DEFAULT_GROUPS: dict[Encoding, int] = {"q8": 64, "q4": 64, "q3": 64, "q2": 16, "fp4": 32}
_DEFAULT_METAS: dict[Encoding, Meta] = {"fp4": "e8m0"}

# What kernels should reach: of the memory's bandwidth at batch 1, and times dequantizing and torch's product.
BATCH_1_TARGETS: dict[Encoding, float] = {"q8": 0.85, "q4": 0.85, "q3": 0.70, "q2": 0.70}
PREFILL_TARGET = 2.5


@dataclass(frozen=True, slots=True)
class Coding:
    """How a matrix of any shape is stored."""

    encoding: Encoding
    group: int = 0
    meta: Meta = "f16"

    def __str__(self) -> str:
        if not self.group:
            return self.encoding
        return f"{self.encoding} g{self.group}" + (f" {self.meta}" if self.meta != "f16" else "")

    def spec(self, rows: int, columns: int) -> PackedSpec:
        """Raises ConfigError if such a matrix cannot be stored so."""
        try:
            return PackedSpec(rows, columns, self.encoding, self.group, self.meta)
        except ValueError as error:
            raise ConfigError(f"a {rows}x{columns} matrix cannot be {self}: {error}; give another --shape") from error


@dataclass(frozen=True, slots=True)
class Layer:
    """A MoE layer of SwiGLU experts."""

    name: str
    num_experts: int
    hidden: int
    width: int  # an expert's intermediate size
    top_k: int

    def specs(self, coding: Coding) -> tuple[PackedSpec, PackedSpec]:
        """An expert's matrices: gate and up, down."""
        return coding.spec(2 * self.width, self.hidden), coding.spec(self.hidden, self.width)

    def expert_bytes(self, coding: Coding) -> int:
        return sum(spec.num_bytes for spec in self.specs(coding))

    def num_copies(self, coding: Coding, working_set_bytes: int) -> int:
        """How many such layers fill the working set."""
        return -(-working_set_bytes // (self.num_experts * self.expert_bytes(coding)))


LAYERS = (
    Layer("Mixtral-8x7B", num_experts=8, hidden=4096, width=14336, top_k=2),
    Layer("fine-grained", num_experts=128, hidden=2048, width=768, top_k=8),
)
_QUICK_LAYERS = (
    Layer("Mixtral-8x7B / 16", num_experts=8, hidden=256, width=896, top_k=2),
    Layer("fine-grained / 8", num_experts=16, hidden=256, width=128, top_k=8),
)


@dataclass(frozen=True)
class KernelsOptions:
    """Everything ``moray bench kernels`` can be asked for."""

    codings: tuple[Coding, ...]
    rows: int
    columns: int
    threads: int
    working_set_bytes: int
    pairs: int
    numerics: Numerics
    quick: bool
    tokens: tuple[int, ...] = field(default=(16, 64, 256))
    layers: tuple[Layer, ...] = field(default=LAYERS)

    @property
    def needed_bytes(self) -> int:
        """The most memory held at once: one working set, and what dequantizing one matrix takes in torch."""
        matrices = [self.num_matrices(c) * c.spec(self.rows, self.columns).num_bytes for c in self.codings]
        layers = [
            layer.num_copies(c, self.working_set_bytes) * layer.num_experts * layer.expert_bytes(c)
            for layer in self.layers
            for c in self.codings
        ]
        return max(matrices + layers) + 20 * self.rows * self.columns

    def num_matrices(self, coding: Coding) -> int:
        """How many distinct matrices fill the working set."""
        return -(-self.working_set_bytes // coding.spec(self.rows, self.columns).num_bytes)


def make_options(
    encodings: str,
    shape: str | None,
    threads: int,
    working_set: str | None,
    pairs: int | None,
    numerics: str,
    quick: bool,
) -> KernelsOptions:
    """From the command line's words; None is the default of a full or a quick run. Raises ConfigError."""
    rows, columns = parse_shape(shape or ("512x1024" if quick else "14336x4096"))
    options = KernelsOptions(
        codings=parse_codings(encodings),
        rows=rows,
        columns=columns,
        threads=_at_least_1("--threads", threads),
        working_set_bytes=parse_bytes(working_set or ("4MB" if quick else "512MB"), option="--working-set"),
        pairs=_at_least_1("--pairs", (2 if quick else 5) if pairs is None else pairs),
        numerics=_parse_numerics(numerics),
        quick=quick,
        tokens=(4, 16) if quick else (16, 64, 256),
        layers=_QUICK_LAYERS if quick else LAYERS,
    )
    for coding in options.codings:
        coding.spec(rows, columns)
        for layer in options.layers:
            layer.specs(coding)
    return options


def parse_codings(text: str) -> tuple[Coding, ...]:
    """``q8,q4:64,q2:16:u8,bf16``: encoding, group, meta. Raises ConfigError."""
    found = [_parse_coding(part.strip()) for part in text.split(",")]
    return tuple(dict.fromkeys(found))


def parse_shape(text: str) -> tuple[int, int]:
    """``ROWSxCOLUMNS``. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip(), re.ASCII)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"--shape is {text!r}, expected ROWSxCOLUMNS, e.g. 14336x4096")
    return int(match[1]), int(match[2])


def _parse_coding(text: str) -> Coding:
    name, _, rest = text.partition(":")
    group_text, _, meta_text = rest.partition(":")
    encoding = next((encoding for encoding in ENCODINGS if encoding == name), None)
    if encoding is None:
        raise ConfigError(f"unknown encoding {name!r} in --encodings, expected some of {', '.join(ENCODINGS)}")
    meta = next((meta for meta in METAS if meta == (meta_text or _DEFAULT_METAS.get(encoding, "f16"))), None)
    if meta is None or (group_text and not group_text.isdecimal()):
        raise ConfigError(f"encoding {text!r} is not ENCODING:GROUP:META, e.g. q4:64 or q4:64:u8")
    return Coding(encoding, int(group_text) if group_text else _DEFAULT_GROUPS.get(encoding, 0), meta)


def _parse_numerics(text: str) -> Numerics:
    for numerics in get_args(Numerics):
        if numerics == text:
            return cast(Numerics, numerics)
    raise ConfigError(f"--numerics is {text!r}, expected {' or '.join(get_args(Numerics))}")


def _at_least_1(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} is {value}, expected at least 1")
    return value
