"""The recipe: how many bits each component of a model gets."""

from __future__ import annotations

from dataclasses import dataclass, field

from moray.runtime.errors import RecipeError
from moray.runtime.layout.packed import Encoding, is_legal_group
from moray.runtime.model.components import COMPONENTS, Component

_DEFAULT_GROUPS = {8: 64, 4: 64, 3: 64, 2: 16}
_ENCODINGS: dict[int, Encoding] = {8: "q8", 4: "q4", 3: "q3", 2: "q2"}
_MAX_GROUP = 256
_DEFAULT_COMPONENTS: tuple[Component, ...] = ("experts", "attention")
_ALLOWED = "none, hqq8, hqq4, hqq3, hqq2, each hqq optionally with :GROUP"

DEFAULT_RECIPE = "experts=hqq4:64,attention=hqq4:64"


@dataclass(frozen=True, slots=True)
class Scheme:
    """HQQ with ``bits`` bits a weight and one scale and zero per ``group`` columns; bits None: as stored."""

    bits: int | None = None
    group: int = 0

    def __str__(self) -> str:
        return "none" if self.bits is None else f"hqq{self.bits}:{self.group}"

    @property
    def encoding(self) -> Encoding:
        assert self.bits is not None
        return _ENCODINGS[self.bits]


NONE = Scheme()


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
        """Read ``SCHEME`` (for experts and attention) or ``COMPONENT=SCHEME,...``.

        Raises RecipeError naming what is unknown and what is allowed.
        """
        if "=" not in text:
            scheme = _parse_scheme(text)
            return cls({component: scheme for component in _DEFAULT_COMPONENTS})
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
    name, colon, group_text = text.strip().partition(":")
    if name == "none" and not colon:
        return NONE
    bits = {f"hqq{bits}": bits for bits in _DEFAULT_GROUPS}.get(name)
    if bits is None:
        raise RecipeError(f"unknown scheme {text.strip()!r}; allowed: {_ALLOWED}")
    group = _parse_group(group_text, bits, text) if colon else _DEFAULT_GROUPS[bits]
    return Scheme(bits, group)


def _parse_group(group_text: str, bits: int, text: str) -> int:
    allowed = [group for group in range(16, _MAX_GROUP + 1, 16) if is_legal_group(group, group, bits)]
    if not group_text.isascii() or not group_text.isdigit() or int(group_text) not in allowed:
        raise RecipeError(
            f"group {group_text!r} in scheme {text.strip()!r} is not possible with {bits} bits; "
            f"allowed: multiples of {allowed[0]} from {allowed[0]} to {allowed[-1]}"
        )
    return int(group_text)
