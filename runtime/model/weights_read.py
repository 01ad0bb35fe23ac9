"""How many bytes of the trunk one forward pass of one token reads."""

from __future__ import annotations

from transformers import PreTrainedModel

from moray.runtime.store.manifest import Manifest


def trunk_bytes_read(model: PreTrainedModel, manifest: Manifest) -> int:
    """Packed weights as they lie in memory, everything else in the model's types; each weight once.

    ``model``: as ``build_model`` makes it, for example on the meta device. Of an input embedding one row is read,
    which is not counted; one that is the output head too is read as a whole.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    total = 0
    for name, parameter in model.named_parameters():  # a tied weight comes once
        path, _, kind = name.rpartition(".")
        if parameter is embedding.weight and not is_tied:
            continue
        if kind == "weight" and path in manifest.packed_trunk:
            total += manifest.packed_trunk[path].num_bytes
        else:
            total += parameter.numel() * parameter.element_size()
    return total
