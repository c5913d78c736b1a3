"""Recipes: TOML in, a plan out, and one sentence for every mistake."""

from importlib.resources import files
from pathlib import Path

import pytest
from conftest import make_tiny_whisper

from dqw.errors import UserError
from dqw.recipe import Override, QuantConfig, QuantSpec, Recipe

SHIPPED = sorted(p.name for p in (files("dqw") / "recipes").iterdir() if p.name.endswith(".toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_read(name: str) -> None:
    Recipe.from_toml(str(files("dqw") / "recipes" / name))


def test_reads_every_table(tmp_path: Path) -> None:
    recipe = Recipe.from_toml(
        write(
            tmp_path,
            "[quant]\nbits = 3\n[[quant.override]]\nmatch = '*.fc1'\nbits = 5\n"
            "[distill]\nkl = 0.5\n[guidance]\nmode = 'mutual'\n[train]\nsteps = 7\n",
        )
    )
    assert (recipe.quant.bits, recipe.quant.override[0].bits) == (3, 5)
    assert (recipe.distill.kl, recipe.guidance.mode, recipe.train.steps) == (0.5, "mutual", 7)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[quant]\nbit = 3\n", "unknown key 'bit'"),
        ("[quantization]\nbits = 3\n", r"unknown table \[quantization\]"),
        ("[quant]\nbits = 'four'\n", "bits is 'four', but an integer is needed, like 4"),
        ("[quant]\nbits = true\n", "an integer is needed"),
        ("quant = 4\n", r"\[quant\] is 4, no table: give bits, grid"),
        ("[quant]\noverride = 'all'\n", r"write \[\[quant.override\]\]"),
        ("[quant.override]\nmatch = '*'\n", r"write \[\[quant.override\]\]"),
        ("[quant]\noverride = ['*']\n", r"\[\[quant.override\]\] is '\*', no table: give match"),
        ("[[quant.override]]\nbits = 3\n", "lacks match: add it"),
        ("[[quant.override]]\nmatch = 3\n", "match is 3, but text is needed."),
        ("[[quant.override]]\nmatch = '*'\nbits = 'four'\n", "an integer is needed."),
        ("[quant]\nskip = '*'\n", "skip is '.', but a list is needed."),
        ("[train]\nbetas = 0.9\n", "a list is needed"),
        ("[train]\nbetas = ['a', 'b']\n", "a list is needed"),
        ("[train]\nlr = 'low'\n", "a number is needed, like 1e-05"),
        ("[train]\nlanguage = 5\n", "text is needed"),
        ("[distill.augment]\nnoise_snr = 10\n", "distill.augment: noise_snr is 10, but a list"),
        ("[distill.augment]\nnoises = 10\n", "unknown key 'noises'"),
        ("[quant\n", "not valid TOML"),
        ("[[quant.override]]\nmatch = '*'\nbit = 3\n", "unknown key 'bit'"),
        ("[distill]\nmatching = 'best'\n", "matching"),
    ],
)
def test_mistakes_name_file_and_cure(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe.from_toml(write(tmp_path, text))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="existing TOML file"):
        Recipe.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "bad", [{"bits": 1}, {"bits": 9}, {"grid": "log"}, {"group_size": 48}, {"activations": "int4"}]
)
def test_specs_refuse_what_no_kernel_serves(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match="choose"):
        QuantSpec.from_dict(bad)


def test_spec_survives_json() -> None:
    for spec in (QuantSpec(), QuantSpec(group_size=None), QuantSpec(8, "pot", None, True)):
        assert QuantSpec.from_dict(spec.to_dict()) == spec


def test_layers_wider_than_the_lloyd_grid_are_uniform() -> None:
    quant = QuantConfig(
        bits=4, grid="lloyd", embedding_bits=8, override=[Override("*.fc1", bits=6)]
    )
    plan = Recipe(quant=quant).plan(make_tiny_whisper())
    found = {(s.grid, s.bits) for n, s in plan.items() if "conv" not in n}
    assert found == {("lloyd", 4), ("uniform", 6), ("uniform", 8)}
    assert QuantConfig(bits=7, grid="lloyd").linear_spec().grid == "uniform"
    with pytest.raises(UserError, match="not known"):
        QuantConfig(bits=7, grid="loyd")


def test_the_embedding_follows_bits_where_the_recipe_has_it_so(tmp_path) -> None:
    from dqw.cli_compress import load_recipe

    own = tmp_path / "own.toml"
    own.write_text("[quant]\nbits = 3\nembedding_bits = 8\n")
    for name, given, wanted in (
        ("default", {}, 5), (str(own), {}, 8), (str(own), {"embedding_bits": 6}, 6)
    ):  # fmt: skip
        quant = load_recipe(name, quant={"bits": 5, **given}).quant
        assert (quant.bits, quant.embedding_bits) == (5, wanted)


@pytest.mark.parametrize(("option", "value"), [("grid", "apot"), ("group_size", 64)])
def test_a_grid_that_is_asked_for_is_not_replaced_by_steps(option: str, value: object) -> None:
    from dqw.cli_compress import load_recipe

    assert load_recipe("default", quant={"bits": 3}).quant.allocate == "steps"
    found = load_recipe("default", quant={option: value}).quant
    assert found.allocate == "bits" and getattr(found, option) == value


def test_none_turns_off_what_0_does() -> None:
    """As a QuantConfig made in Python may have it; TOML has no word for it."""
    recipe = Recipe(quant=QuantConfig(group_size=None))  # type: ignore[arg-type]
    assert Recipe.from_dict(recipe.to_dict()).quant.linear_spec().group_size is None


def test_a_file_may_start_from_a_recipe_that_ships(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('base = "default"\n[quant]\nbits = 3\n[distill.augment]\nnoise = 0.5\n')
    found, default = Recipe.from_toml(path), Recipe.shipped("default")
    wanted = default.to_dict()
    wanted["quant"]["bits"] = 3
    wanted["distill"]["augment"]["noise"] = 0.5
    assert found.to_dict() == wanted
    for text, words in (('base = "best"\n', "'best' is not known"), ("base = 3\n", "is no name")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            Recipe.from_toml(path)


def test_a_dict_stays_as_it_is() -> None:
    data = {"quant": {"bits": 3, "override": [{"match": "*.fc1", "bits": 8}]}}
    assert Recipe.from_dict(data).quant == Recipe.from_dict(data).quant
    assert data == {"quant": {"bits": 3, "override": [{"match": "*.fc1", "bits": 8}]}}
