"""A store's outline: its manifest and files of its sizes, without a weight. For plans of models that are not converted.

From a checkpoint its tensors' names, shapes and types are read; from a config.json alone it is taken that there is one
tensor of each parameter of the model. Files are sparse: an outline takes no room, and whatever reads it reads zeros.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moray.runtime.convert.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from moray.runtime.convert.plan import Plan, make_plan
from moray.runtime.convert.recipe import Recipe
from moray.runtime.convert.tensors import DTYPES, TensorEntry
from moray.runtime.model.families import build_model, expert_modules, expert_params, expert_shapes, load_config
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest, ShardEntry


def write_outline(source: Path, recipe: Recipe, directory: Path) -> None:
    """Fill an empty directory with the outline of what ``source`` would become: a checkpoint, or a folder with nothing
    but a config.json. Raises what a conversion raises before it begins."""
    config = load_config(source)
    if (source / INDEX_NAME).is_file() or (source / SINGLE_NAME).is_file():
        checkpoint = Checkpoint.open(source).reshaped(expert_shapes(config))
    else:
        checkpoint = _imagined(source, config)
    plan = make_plan(config, checkpoint, recipe)
    shutil.copy(source / "config.json", directory / "config.json")
    sizes = {TRUNK_NAME: plan.trunk.num_bytes}
    for piece in plan.shards.values():
        sizes[piece.file] = max(sizes.get(piece.file, 0), piece.offset + piece.num_bytes)
    for name, size in sizes.items():
        with (directory / name).open("wb") as file:
            file.truncate(size)
    (directory / MANIFEST_NAME).write_bytes(_manifest(config, recipe, plan).encode())


def _imagined(source: Path, config: PreTrainedConfig) -> Checkpoint:
    """A checkpoint with the model's own names and shapes, in the type that its config says."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    stated = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    model = build_model(config, torch.bfloat16, "meta")
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (tuple(tensor.shape), stated if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    for path, module in expert_modules(model):
        tensors |= {f"{path}.{name}": (shape, stated) for name, (shape, _) in expert_params(module).items()}
    entries = {
        name: TensorEntry("", names[dtype], shape, 0, math.prod(shape) * dtype.itemsize)
        for name, (shape, dtype) in tensors.items()
    }
    return Checkpoint(source, entries, "")


def _manifest(config: PreTrainedConfig, recipe: Recipe, plan: Plan) -> Manifest:
    return Manifest(
        family=config.model_type,
        recipe=recipe.to_dict(),
        layers=plan.layers,
        shards={key: ShardEntry(piece.file, piece.offset, piece.num_bytes, 0) for key, piece in plan.shards.items()},
        trunk_bytes=plan.trunk.num_bytes,
        trunk_checksum=0,
        packed_trunk=plan.trunk.packed,
        source={"outline": "no weights"},
        num_parameters=plan.num_parameters,
        notes=plan.notes,
    )
