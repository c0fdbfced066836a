from __future__ import annotations

import pytest

from mpq.errors import UsageError
from mpq.train.recipe import Recipe


def test_shipped_recipes_load():
    assert Recipe.names() == ["fast", "plain", "qat", "strong"]
    fast, plain, qat, strong = (Recipe.load(name) for name in Recipe.names())
    assert (plain.lr, plain.weight_decay, plain.trivial) == (0.1, 5e-4, False)
    assert qat.lr < plain.lr / 5
    assert qat.temperature <= 2  # higher ones are known to break low-bit students
    assert fast.whiten
    assert fast.alternate
    assert strong.trivial
    assert strong.ema > 0.99
    assert strong.cutmix > 0


def test_a_file_sets_what_it_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 3\nlr: 1e-2\n")  # YAML reads 1e-2 as text; it is a number all the same
    recipe = Recipe.load(path)
    assert (recipe.epochs, recipe.lr, recipe.batch) == (3, 0.01, Recipe().batch)


def test_override_converts_text_and_leaves_the_original():
    recipe = Recipe()
    other = recipe.override({"lr": "0.02", "flip": "false", "epochs": 7})
    assert (other.lr, other.flip, other.epochs) == (0.02, False, 7)
    assert recipe.flip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("momentun: 0.9", r"momentun is not a known key; did you mean momentum"),
        ("lr: fast", r"lr: .*number.* Got 'fast' instead"),
        ("lr: .nan", r"lr: .*finite"),
        ("temperature: 0", r"temperature: .*0\.1.* Got 0 instead"),
        ("weighting: average", r"weighting: .*'dynamic'.* Got 'average' instead"),
        ("batch: 10\naccumulate: 3", r"batch must be a multiple of accumulate \(3\)"),
        ("label_weight: 0\ndistill_weight: 0", r"one of label_weight and distill_weight"),
        ("- 1\n- 2", r"must be a YAML mapping.* Got list"),
        ("a: [", r"is not valid YAML"),
    ],
)
def test_bad_recipes_say_why(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        Recipe.load(path)
    assert "bad.yaml" in str(error.value)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"one of fast, plain, qat, strong .*did you mean strong"):
        Recipe.load("strongg")


def test_override_refuses_unknown_keys():
    with pytest.raises(UsageError, match=r"learning_rate is not a known key"):
        Recipe().override({"learning_rate": 1})


def test_every_key_is_explained():
    unexplained = [k for k, field in Recipe.model_fields.items() if not field.description]
    assert unexplained == []
