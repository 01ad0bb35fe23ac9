"""The recipe: how many bits each component of a model gets.

A scheme is ``none``, ``keep`` or ``hqqBITS[:GROUP[:s8]]``; ``s8`` means second-level scales of 8 bits
(layout/second_level.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moray.runtime.errors import RecipeError
from moray.runtime.layout.packed import SECOND_LEVEL_ENCODINGS, Encoding, Meta, is_legal_group
from moray.runtime.model.components import COMPONENTS, Component

_DEFAULTS: dict[int, tuple[int, Meta]] = {8: (64, "f16"), 4: (64, "f16"), 3: (64, "f16"), 2: (16, "u8")}
_ENCODINGS: dict[int, Encoding] = {8: "q8", 4: "q4", 3: "q3", 2: "q2"}
_MAX_GROUP = 256
_CHOSEN: tuple[Component, ...] = ("experts", "attention")  # what a recipe of one scheme is about
_SECOND_LEVEL = "s8"
_KEEP = "keep"

DEFAULT_RECIPE = "hqq4"

#: Whole recipes by name: those of mixtral-offloading (arXiv 2312.17238).
PRESETS = {
    "paper-4bit": "experts=hqq4:64:s8,attention=hqq4:64:s8",
    "paper-3bit": "experts=hqq3:64:s8,attention=hqq4:64:s8",
    "paper-2bit": "experts=hqq2:16:s8,attention=hqq4:64:s8",
}
_ALLOWED = (
    "none, keep, hqq8, hqq4, hqq3, hqq2, each hqq optionally with :GROUP, all but hqq8 with :GROUP:s8; "
    f"or, as the whole recipe, {', '.join(PRESETS)}"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """HQQ with ``bits`` bits a weight and one scale and zero per ``group`` columns; bits None: as stored.

    ``meta`` says how scales and zeros are stored (layout/packed.py). ``keep``: codes of a pre-quantized checkpoint
    stay what they are; without it, its weights are dequantized first.
    """

    bits: int | None = None
    group: int = 0
    meta: Meta = "f16"
    keep: bool = False

    def __str__(self) -> str:
        if self.bits is None:
            return _KEEP if self.keep else "none"
        return f"hqq{self.bits}:{self.group}" + (f":{_SECOND_LEVEL}" if self.meta == "u8" else "")

    @property
    def encoding(self) -> Encoding:
        assert self.bits is not None
        return _ENCODINGS[self.bits]


NONE = Scheme()
KEEP = Scheme(keep=True)
_OTHERS = Scheme(8, *_DEFAULTS[8])


@dataclass(frozen=True, slots=True)
class Recipe:
    """A scheme for every component; components left out keep the checkpoint's own type."""

    schemes: dict[Component, Scheme] = field(default_factory=dict)

    def __getitem__(self, component: Component) -> Scheme:
        return self.schemes.get(component, NONE)

    def __str__(self) -> str:
        stated = [f"{c}={self[c]}" for c in COMPONENTS if self[c] != NONE]
        return ",".join(stated) or "none"

    def to_dict(self) -> dict[str, str]:
        """Component -> scheme, for all components, as manifests hold it."""
        return {component: str(self[component]) for component in COMPONENTS}

    @classmethod
    def parse(cls, text: str = DEFAULT_RECIPE) -> Recipe:
        """Read ``SCHEME``, ``COMPONENT=SCHEME,...`` or a preset's name.

        One scheme is for experts and attention, and the others get 8 bits: few weights that every token reads.
        ``none`` and ``keep`` are for all. Raises RecipeError naming what is unknown and what is allowed.
        """
        text = PRESETS.get(text.strip(), text)
        if "=" not in text:
            scheme = _parse_scheme(text)
            is_for_all = scheme in (NONE, KEEP)
            return cls({c: scheme if is_for_all or c in _CHOSEN else _OTHERS for c in COMPONENTS})
        schemes: dict[Component, Scheme] = {}
        for part in text.split(","):
            name, equals, scheme_text = part.partition("=")
            component = _parse_component(name.strip(), part)
            if not equals:
                raise RecipeError(f"recipe part {part!r} has no scheme; expected {component}=SCHEME")
            if component in schemes:
                raise RecipeError(f"recipe {text!r} names {component} twice; state each component once")
            schemes[component] = _parse_scheme(scheme_text)
        return cls(schemes)


def _parse_component(name: str, part: str) -> Component:
    for component in COMPONENTS:
        if component == name:
            return component
    raise RecipeError(f"unknown component {name!r} in recipe part {part!r}; allowed: {', '.join(COMPONENTS)}")


def _parse_scheme(text: str) -> Scheme:
    name, *options = text.strip().split(":")
    if name == "none" and not options:
        return NONE
    if name == _KEEP and not options:
        return KEEP
    bits = {f"hqq{bits}": bits for bits in _DEFAULTS}.get(name)
    if bits is None:
        raise RecipeError(f"unknown scheme {text.strip()!r}; allowed: {_ALLOWED}")
    if not options:
        return Scheme(bits, *_DEFAULTS[bits])
    return Scheme(bits, _parse_group(options[0], bits, text), _parse_meta(options[1:], bits, text))


def _parse_group(group_text: str, bits: int, text: str) -> int:
    allowed = [group for group in range(16, _MAX_GROUP + 1, 16) if is_legal_group(group, group, bits)]
    if not group_text.isascii() or not group_text.isdigit() or int(group_text) not in allowed:
        raise RecipeError(
            f"group {group_text!r} in scheme {text.strip()!r} is not possible with {bits} bits; "
            f"allowed: multiples of {allowed[0]} from {allowed[0]} to {allowed[-1]}"
            + (f", before :{_SECOND_LEVEL}" if group_text == _SECOND_LEVEL else "")
        )
    return int(group_text)


def _parse_meta(options: list[str], bits: int, text: str) -> Meta:
    if not options:
        return "f16"
    if options != [_SECOND_LEVEL]:
        raise RecipeError(
            f"unknown option {':'.join(options)!r} in scheme {text.strip()!r}; "
            f"allowed after the group: {_SECOND_LEVEL} (second-level scales of 8 bits)"
        )
    if _ENCODINGS[bits] not in SECOND_LEVEL_ENCODINGS:
        raise RecipeError(
            f"scheme {text.strip()!r}: weights of {bits} bits cannot have second-level scales; "
            f"leave out :{_SECOND_LEVEL}, or take hqq4, hqq3 or hqq2"
        )
    return "u8"
