"""A PEFT LoRA adapter on disk: what it adds to, or puts in the place of, which tensor.

PEFT's names are the names of the modules it was trained on, which are those of the hub's checkpoints (older
transformers) or of the fused modules (newer ones); here they stay as they are (merge.py finds the parameters).

Shapes: R rank, E experts; a matrix is [out, in] unless said otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from moray.runtime.convert.headers import read_file_header, read_into, read_tensor
from moray.runtime.convert.tensors import TensorEntry
from moray.runtime.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<role>A\.weight|B\.weight|B\.bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<role>A|B)")
_REPLACED = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.(?P<name>\w+)")
#: What these do to the weights that a model computes with is more than adding B @ A.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "arrow_config",
    "monteclora_config",
    "velora_config",
    "kasa_config",
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # they leave the model's own weights alone
_ADVICE = "merge it with PEFT (merge_and_unload) and convert the merged checkpoint"
_FLOATS = ("F32", "BF16", "F16")


class Change(Protocol):
    """One tensor of an adapter, for one tensor of the model. Picklable."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, expert: int | None) -> torch.Tensor:
        """In float32; with ``expert`` only that row of a tensor of all experts (with a leading dimension of 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of an adapter's file, times ``scale``."""

    file: Path
    key: str
    entry: TensorEntry
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self, expert: int | None) -> torch.Tensor:
        value = read_tensor(partial(read_into, self.file), self.entry, expert).float()
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{self.file}: {self.key} holds NaN or infinite values; the adapter is damaged, download it again"
            )
        return value if self.scale == 1.0 else value * self.scale


@dataclass(frozen=True, slots=True)
class Product:
    """scale * B @ A, or its transpose. ``experts`` > 0: A is [E * R, in], B is [out, R * E], a matrix for each."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        matrix = (self.b.shape[0], self.a.shape[1])
        matrix = matrix[::-1] if self.transposed else matrix
        return (self.experts, *matrix) if self.experts else matrix

    def read(self, expert: int | None) -> torch.Tensor:
        a, b = self.a.read(None), self.b.read(None)
        if not self.experts:
            return self._multiply(a, b)
        a_ERI, b_ORE = a.reshape(self.experts, -1, a.shape[1]), b.reshape(len(b), -1, self.experts)
        chosen = range(self.experts) if expert is None else [expert]
        return torch.stack([self._multiply(a_ERI[e], b_ORE[:, :, e]) for e in chosen])

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        delta = (b @ a) * self.scale
        return delta.T if self.transposed else delta


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor of which an adapter changes nothing, beside others that it changes. ``like``: of the same shape."""

    like: Change

    @property
    def shape(self) -> tuple[int, ...]:
        return self.like.shape

    def read(self, expert: int | None) -> torch.Tensor:
        return torch.zeros(self.shape if expert is None else (1, *self.shape[1:]))


@dataclass
class Factors:
    """A and B of one module (``depth``: how many wrappers inside the outermost one), by role."""

    module: str
    depth: int
    roles: dict[str, str] = field(default_factory=dict)  # A, B, bias -> key
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, opened. ``replaced``: the names of tensors that it holds whole."""

    path: Path
    config: Mapping[str, Any]
    tensors: dict[str, TensorEntry]
    factors: list[Factors]
    replaced: dict[str, str]  # name in the model -> key
    sha256: str  # of its weights' file
    fingerprint: str  # of both files

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read configuration and header. Raises CheckpointError: not a LoRA, damaged, or of a kind not merged."""
        root = Path(path)
        config, text = _read_config(root)
        if not (root / WEIGHTS_NAME).is_file():
            raise CheckpointError(_explain_no_weights(root))
        tensors, _ = read_file_header(root, WEIGHTS_NAME)
        factors, replaced = _sort_keys(root, tensors)
        if not factors and not replaced:
            raise CheckpointError(
                f"{root / WEIGHTS_NAME} holds no tensors, expected lora_A and lora_B; download it again"
            )
        sha256 = _hash(root / WEIGHTS_NAME)
        fingerprint = hashlib.sha256(f"{text}\0{sha256}".encode()).hexdigest()
        return cls(root, config, tensors, factors, replaced, sha256, fingerprint)

    def tensor(self, key: str, scale: float = 1.0) -> Tensor:
        """Raises CheckpointError unless it is floating point."""
        entry = self.tensors[key]
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.path / WEIGHTS_NAME}: {key} has dtype {entry.dtype}, expected {', '.join(_FLOATS)}; {_ADVICE}"
            )
        return Tensor(self.path / WEIGHTS_NAME, key, entry, scale)

    def product(self, factors: Factors, target: str, *, transposed: bool = False, experts: int = 0) -> Product:
        """What is added to the tensor ``target`` (by the name that PEFT's patterns are matched against)."""
        a, b = (self.tensor(factors.roles[role]) for role in ("A", "B"))
        rank, alpha = self._pattern("rank_pattern", "r", target), self._pattern("alpha_pattern", "lora_alpha", target)
        rows = (max(experts, 1) * rank,)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[:1] != rows or b.shape[1:] != rows:
            raise CheckpointError(
                f"{a.file}: {a.key} and {b.key} have shapes {list(a.shape)} and {list(b.shape)}, expected "
                f"[{rows[0]}, inputs] and [outputs, {rows[0]}] for rank {rank:g} of {target}; "
                f"the adapter does not fit its {CONFIG_NAME}, download it again"
            )
        return Product(a, b, self._scale(rank, alpha), transposed or factors.embedding, experts)

    def bias(self, factors: Factors, target: str) -> Tensor:
        """What is added to the bias of ``target``."""
        rank, alpha = self._pattern("rank_pattern", "r", target), self._pattern("alpha_pattern", "lora_alpha", target)
        return self.tensor(factors.roles["bias"], self._scale(rank, alpha))

    def targets(self, name: str) -> bool:
        """Whether ``target_parameters`` name this parameter."""
        return any(name == target or name.endswith(f".{target}") for target in self.config["target_parameters"])

    def _scale(self, rank: float, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _pattern(self, patterns: str, default: str, target: str) -> Any:
        for pattern, value in self.config[patterns].items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
        return self.config[default]


def _read_config(root: Path) -> tuple[dict[str, Any], str]:
    file = root / CONFIG_NAME
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{root} has no {CONFIG_NAME}; expected a directory that PEFT saved") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({' '.join(str(error).split())}); download it again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{root} is an adapter of type {kind!r}, expected 'LORA'; {_ADVICE}")
    for name in _REFUSED:
        if config.get(name):
            raise CheckpointError(f"{root} has {name}, expected plain LoRA weights; {_ADVICE}")
    init = config.get("init_lora_weights")
    if init not in _INITS:
        raise CheckpointError(
            f"{root} was trained with init_lora_weights {init!r}, which changes the model's own weights too, "
            f"expected one of {_INITS[1:]}; {_ADVICE}"
        )
    return _checked(file, config), text


def _checked(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are used, of the right types."""
    settings: dict[str, Any] = {"use_rslora": config.get("use_rslora") is True}
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = config.get(name) or {}
    settings["target_parameters"] = config.get("target_parameters") or []
    for name in ("r", "lora_alpha"):
        settings[name] = config.get(name, 8)
    patterns = [settings[name] for name in ("rank_pattern", "alpha_pattern")]
    try:
        numbers = [settings["r"], settings["lora_alpha"], *(n for pattern in patterns for n in pattern.values())]
        ranks = [settings["r"], *settings["rank_pattern"].values()]
        right = all(type(n) in (int, float) and math.isfinite(n) for n in numbers) and min(ranks) >= 1
        right = right and all(isinstance(name, str) for name in settings["target_parameters"])
        for pattern in (p for patterns_of in patterns for p in patterns_of):
            re.compile(pattern)
    except (AttributeError, TypeError, re.error):
        right = False
    if not right:
        raise CheckpointError(
            f"{file} has a wrong value of r, lora_alpha, rank_pattern, alpha_pattern or target_parameters, "
            "expected numbers of at least 1 and names; download it again"
        )
    return settings


def _sort_keys(root: Path, tensors: Mapping[str, TensorEntry]) -> tuple[list[Factors], dict[str, str]]:
    """Which keys are factors of a module, and which are tensors of the model."""
    found: dict[tuple[str, int], Factors] = {}
    replaced: dict[str, str] = {}
    strange = []
    for key in tensors:
        name = key.removeprefix(_PREFIX)
        factor, embedding = _FACTOR.fullmatch(name), _EMBEDDING.fullmatch(name)
        if match := factor or embedding:
            depth = match["depth"].count(".") if factor else 0
            role = "bias" if match["role"] == "B.bias" else match["role"][0]
            factors = found.setdefault((match["module"], depth), Factors(match["module"], depth))
            factors.roles[role] = key
            factors.embedding = embedding is not None
        elif name != key and "lora_" not in name and (whole := _REPLACED.fullmatch(name)):
            replaced[f"{whole['module']}.{whole['name']}"] = key
        else:
            strange.append(key)
    if strange:
        raise CheckpointError(
            f"{root / WEIGHTS_NAME} has {len(strange)} tensors that are not understood: {', '.join(strange[:4])}; "
            f"expected {_PREFIX}MODULE.lora_A.weight and the like; {_ADVICE}"
        )
    for factors in found.values():
        if not {"A", "B"} <= factors.roles.keys():
            raise CheckpointError(
                f"{root / WEIGHTS_NAME} has {', '.join(factors.roles.values())} alone, expected lora_A and lora_B of "
                f"{factors.module}; the adapter is incomplete, download it again"
            )
    return list(found.values()), replaced


def _explain_no_weights(root: Path) -> str:
    if (root / "adapter_model.bin").is_file():
        return f"{root} has its weights in adapter_model.bin, expected {WEIGHTS_NAME}; save it with a newer PEFT"
    return f"{root} has no {WEIGHTS_NAME}; download the adapter again"


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
