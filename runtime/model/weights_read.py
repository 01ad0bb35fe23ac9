"""How many bytes the weights of a trunk take as loaded, and how many of them one forward pass of one token reads.

``model`` is one as ``build_model`` makes it, for example on the meta device. Packed weights count as they lie in
memory, everything else in the model's types; a tied weight counts once. ``device`` is a type of torch devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from moray.runtime.model.packed_modules import is_unpacked
from moray.runtime.store.manifest import Manifest


def trunk_bytes(model: PreTrainedModel, manifest: Manifest, device: str) -> int:
    """Everything but the experts, with buffers."""
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return buffers + sum(size for _, size in _weights(model, manifest, device))


def trunk_bytes_read(model: PreTrainedModel, manifest: Manifest, device: str) -> int:
    """Of an input embedding one row is read, which is not counted; one that is the output head too is read whole."""
    rows_only = None if _is_tied(model) else model.get_input_embeddings().weight
    return sum(size for weight, size in _weights(model, manifest, device) if weight is not rows_only)


def dequantized_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """The largest matrix that a device makes of a packed one for a moment, to multiply a prompt by it."""
    specs = [tensor.spec for layer in manifest.layers for tensor in layer.layout.tensors]
    specs += [spec for spec in manifest.packed_trunk.values() if not is_unpacked(spec)]
    return dtype.itemsize * max(spec.rows * spec.columns for spec in specs if spec is not None)


def _weights(model: PreTrainedModel, manifest: Manifest, device: str) -> Iterator[tuple[nn.Parameter, int]]:
    looked_up = None if _is_tied(model) else model.get_input_embeddings().weight
    for name, weight in model.named_parameters():  # a tied weight comes once
        path, _, kind = name.rpartition(".")
        spec = manifest.packed_trunk.get(path) if kind == "weight" else None
        if spec is not None and device != "cpu" and weight is not looked_up and is_unpacked(spec):
            spec = None
        yield weight, weight.nbytes if spec is None else spec.num_bytes


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
