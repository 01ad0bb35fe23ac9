from __future__ import annotations

import pytest

from moray.runtime.convert.recipe import KEEP, NONE, PRESETS, Recipe, Scheme
from moray.runtime.errors import RecipeError
from moray.runtime.model.components import COMPONENTS

OTHERS = [Scheme(8, 64)] * 3  # shared, dense, embeddings


def test_the_default_has_4_bits_and_8_for_the_few_weights_that_every_token_reads() -> None:
    recipe = Recipe.parse()
    assert [recipe[c] for c in COMPONENTS] == [Scheme(4, 64), Scheme(4, 64), *OTHERS]
    assert str(recipe) == "experts=hqq4:64,attention=hqq4:64,shared=hqq8:64,dense=hqq8:64,embeddings=hqq8:64"


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("hqq8", Scheme(8, 64)),
        ("hqq3", Scheme(3, 64)),
        ("hqq2", Scheme(2, 16, "u8")),
        ("hqq2:16", Scheme(2, 16)),
        ("hqq4:32:s8", Scheme(4, 32, "u8")),
    ],
)
def test_one_scheme_is_for_experts_and_attention(text: str, scheme: Scheme) -> None:
    recipe = Recipe.parse(text)
    assert [recipe[c] for c in COMPONENTS] == [scheme, scheme, *OTHERS]


@pytest.mark.parametrize(("name", "experts"), [("4bit", (4, 64)), ("3bit", (3, 64)), ("2bit", (2, 16))])
def test_presets_are_the_papers_recipes(name: str, experts: tuple[int, int]) -> None:
    recipe = Recipe.parse(f"paper-{name}")
    assert [recipe[c] for c in COMPONENTS] == [Scheme(*experts, "u8"), Scheme(4, 64, "u8"), NONE, NONE, NONE]


def test_none_keeps_everything() -> None:
    assert all(Recipe.parse("none")[component] == NONE for component in COMPONENTS)


def test_keep_is_for_all_components_and_none_is_not_keep() -> None:
    assert {Recipe.parse("keep")[component] for component in COMPONENTS} == {KEEP} != {NONE}
    mixed = Recipe.parse("experts=keep,attention=hqq8")
    assert [mixed[c] for c in COMPONENTS] == [KEEP, Scheme(8, 64), NONE, NONE, NONE]
    assert Recipe.parse(str(mixed)) == mixed


def test_components_are_independent() -> None:
    recipe = Recipe.parse("experts=hqq2:32, shared=hqq8,embeddings=none")
    assert recipe.to_dict() == {
        "experts": "hqq2:32",
        "attention": "none",
        "shared": "hqq8:64",
        "dense": "none",
        "embeddings": "none",
    }


@pytest.mark.parametrize(
    "text", ["none", "hqq4:64", "experts=hqq3:32:s8,dense=hqq8:128", "embeddings=hqq8", "hqq2", *PRESETS]
)
def test_a_recipe_is_read_back_from_its_text(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)).to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hqq5", "allowed: none, keep, hqq8, hqq4, hqq3, hqq2"),
        ("", "unknown scheme"),
        ("none:64", "unknown scheme"),
        ("router=hqq4", "allowed: experts, attention, shared, dense, embeddings"),
        ("experts=hqq4,hqq8", "unknown component 'hqq8'"),
        ("experts=", "unknown scheme ''"),
        ("experts=hqq4,attention", "expected attention=SCHEME"),
        ("experts=hqq4,experts=hqq8", "names experts twice"),
        ("hqq4:8", "multiples of 16 from 16 to 256"),
        ("hqq3:48", "multiples of 32 from 32 to 256"),
        ("hqq4:", "group ''"),
        ("hqq4:-64", "group '-64'"),
        ("hqq4:100000", "from 16 to 256"),
        ("paper-5bit", "or, as the whole recipe, paper-4bit, paper-3bit, paper-2bit"),
        ("experts=paper-2bit", "unknown scheme 'paper-2bit'"),
        ("hqq4:s8", "group 's8' in scheme 'hqq4:s8' is not possible with 4 bits; allowed: multiples of 16 from 16 "),
        ("hqq4:64:s4", "unknown option 's4' in scheme 'hqq4:64:s4'; allowed after the group: s8"),
        ("hqq4:64:s8:s8", "unknown option 's8:s8'"),
        ("hqq4:64:", "unknown option ''"),
        ("hqq8:64:s8", "'hqq8:64:s8': weights of 8 bits cannot have second-level scales; leave out :s8"),
        ("none:64:s8", "unknown scheme"),
    ],
)
def test_a_wrong_recipe_says_what_is_allowed(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
