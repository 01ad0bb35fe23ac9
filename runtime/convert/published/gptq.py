"""GPTQ, as AutoGPTQ and GPTQModel write it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moray.runtime.convert.published.headers import FLOATS, Headers
from moray.runtime.convert.published.weight import Grid, OnGrid, Published, Read, fields, groups_of_columns


@dataclass(frozen=True, slots=True)
class GptqWeight(OnGrid):
    """codes int32 [C * bits / 32, R]; zeros int32 [G, R * bits / 32]; scales [G, R]; order [C]: each column's group."""

    is_older: bool = True  # checkpoint_format gptq: stores zero - 1

    def unpack(self, read: Read) -> Grid:
        codes_CR = fields(read("codes"), self.bits, dim=0)
        words = read("zeros")
        if self.is_older:  # whole words are counted down, with a borrow where a zero is 0: as GPTQModel has it
            words = words + sum(1 << shift for shift in range(0, 32, self.bits))
        zeros_GR = fields(words, self.bits, dim=1)
        order = read("order") if "order" in self.parts else None
        where = self.parts.get("order", self.parts["codes"])
        group_C = groups_of_columns(len(codes_CR), self.group, len(zeros_GR), order, where)
        return Grid(codes_CR.T.contiguous(), read("scales").T.contiguous(), zeros_GR.T.contiguous(), group_C)


def find(headers: Headers) -> Iterator[tuple[str, Published]]:
    """Name -> weight. Raises CheckpointError."""
    settings = headers.settings
    form = str(settings.get("checkpoint_format", "format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise headers.refusal("checkpoint_format", form if form != "gptq" else "marlin", "gptq or gptq_v2")
    bits = headers.bits(2, 4, 8)
    # With static groups the columns are quantized in another order, but grouped in their own.
    is_reordered = bool(settings.get("desc_act")) and not settings.get("static_groups")
    for base in headers.bases(".qweight"):
        parts = headers.parts(base, codes="qweight", zeros="qzeros", scales="scales")
        parts |= headers.optional(base, order="g_idx")
        words, rows = headers.matrix(parts["codes"], "I32")
        columns = words * 32 // bits
        group = headers.group(columns)
        groups = -(-columns // group)
        headers.expect(parts["scales"], FLOATS, groups, rows)
        headers.expect(parts["zeros"], ("I32",), groups, rows * bits // 32)
        if "order" in parts:
            headers.expect(parts["order"], ("I32",), columns)
        dtype = headers.scale_dtype(parts["scales"])
        reordered = is_reordered and "order" in parts and groups > 1
        yield f"{base}.weight", GptqWeight(parts, (rows, columns), dtype, bits, group, reordered, form == "gptq")
