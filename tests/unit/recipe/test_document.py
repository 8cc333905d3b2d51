from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmg.core.errors import UsageError
from fmg.recipe.document import Plain, Source, node_of, parse_value, read_document, render

SET = Source("set", "--set x")
Write = Callable[[str | bytes], Path]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-3", -3),
        ("0o17", 15),
        ("017", 17),
        ("true", True),
        ("yes", "yes"),
        ("on", "on"),
        ("null", None),
        ("", None),
        ("~", None),
        ("2020-01-01", "2020-01-01"),
        ("12:30:45", "12:30:45"),
        ("'1e-4'", "1e-4"),
        ("python:my.mod:fn", "python:my.mod:fn"),
        ("[1, a, {b: 2.5}]", [1, "a", {"b": 2.5}]),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: Plain) -> None:
    got = parse_value(text, SET).plain()
    assert got == value
    assert type(got) is type(value)


def test_every_value_knows_its_line(write: Write) -> None:
    path = write("# a comment\ntrain:\n  seed: 1\n  iterations:\n    2\nrewards:\n  - a\n  - name: b\n    weight: 2\n")
    root = read_document(path, "file", "r.yaml")
    lines = {
        ("train",): 2,
        ("train", "seed"): 3,
        ("train", "iterations"): 4,
        ("rewards", 0): 7,
        ("rewards", 1, "name"): 8,
        ("rewards", 1, "weight"): 9,
        ("rewards", 1, "missing", "deeper"): 8,
    }
    assert {key: root.find(key).source.text for key in lines} == {key: f"r.yaml:{n}" for key, n in lines.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml is empty."),
        ("# only a comment\n", "r.yaml is empty."),
        ("just words\n", "r.yaml:1: a recipe must be a mapping of sections."),
        ("- a\n- b\n", "r.yaml:1: a recipe must be a mapping of sections."),
        ("a: 1\nb: [1, 2\n", "r.yaml:3: this is not YAML:"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: this is not YAML:"),
        ("a: b: c\n", "r.yaml:1: this is not YAML:"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: this is not YAML:"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: the key 'a' is given twice (first on line 1)."),
        ("a: &x [1]\nb: *x\n", "r.yaml:2: the alias '*x' is not allowed."),
        ("a: &x [*x]\n", "r.yaml:1: the alias '*x' is not allowed."),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "r.yaml:3: a key must be a plain word."),
        ("? [a, b]\n: 1\n", "r.yaml:1: a key must be a plain word."),
        ("a: *nowhere\n", "r.yaml:1: this is not YAML: found undefined alias"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1: the tag"),
        ("a: !thing 1\n", "r.yaml:1: the tag '!thing' is not allowed."),
        ("a: !!int word\n", "r.yaml:1: 'word' is not a whole number"),
        (b"a: 1\nb: \xff\xfe\n", "r.yaml:2: the file is not UTF-8 text."),
        (b"a: 1\nb: \x00\n", "r.yaml: this is not YAML:"),
        ("a: " + "[" * 400, "this is not YAML"),
    ],
)
def test_broken_files_give_one_line_that_says_where(write: Write, text: str | bytes, message: str) -> None:
    path = write(text)
    with pytest.raises(UsageError) as caught:
        read_document(path, "file", "r.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_not_part_of_the_first_key(write: Write) -> None:
    assert read_document(write(b"\xef\xbb\xbfa: 1\n"), "file", "r.yaml").plain() == {"a": 1}


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no file x\.yaml"):
        read_document(tmp_path / "x.yaml", "file", "x.yaml")
    with pytest.raises(UsageError, match=r"is a folder\. Give the path of a YAML file"):
        read_document(tmp_path, "file", "here")
    (tmp_path / "recipe.yaml").write_text("a: 1")
    with pytest.raises(UsageError, match=r"Name the file inside it: .*recipe\.yaml"):
        read_document(tmp_path, "file", "here")


def test_too_large_a_file_is_refused_before_it_is_parsed(write: Write) -> None:
    path = write("a: 1\n" + "#" * 1_000_001)
    with pytest.raises(UsageError, match="too many for a recipe"):
        read_document(path, "file", "r.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: !!bool x", "'x' is not true or false"),
        ('seed: !!int ""', "'' is not a whole number"),
        ('seed: !!float ""', "'' is not a number"),
        ("seed: !!int {a: 1}", "is not allowed"),
        ("seed: " + "9" * 5000, "is not a whole number"),
        ("a: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("a: " * 3000, "is not YAML"),
        ("a: &a [1]\nb: [*a, *a]", "alias"),
        (r'seed: "\ud800"', "unpaired surrogate"),
        (r'"\0": 1', "NUL"),
        (r'seed: "\U00110000"', "is not YAML"),
    ],
    ids=lambda value: value[:24],
)
def test_what_yaml_allows_and_a_recipe_does_not(text: str, says: str, write: Write) -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml") as refused:
        read_document(write(text), "file", "r.yaml")
    assert says in str(refused.value)


def test_values_that_a_recipe_cannot_hold() -> None:
    for text in ("a\0b", "\ud800"):
        with pytest.raises(UsageError, match="NUL or an unpaired"):
            node_of({"a": text}, SET)
    with pytest.raises(UsageError, match="cannot contain a value of type object"):
        node_of({"a": [object()]}, SET)
    assert node_of({"a": (Path("x/y"), {"b": None})}, SET).plain() == {"a": ["x/y", {"b": None}]}


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
)
keys = st.from_regex(r"[a-z_][a-z_0-9-]{0,8}", fullmatch=True)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@pytest.mark.slow
@given(st.dictionaries(keys, values, min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_what_is_rendered_reads_back_exactly(tree: dict[str, Plain]) -> None:
    comments = {".".join(key): "a # comment\nof two lines" for key in [(k,) for k in tree]}
    for text in (render(tree, {}), render(tree, comments)):
        got = parse_value(text, SET).plain()
        assert got == tree
        assert repr(got) == repr(tree)


def test_rendered_exponents_are_numbers_for_yaml_1_1_readers_too() -> None:
    assert render({"lr": 1e-5, "big": 1e16, "half": 2.5e-7}, {}) == "lr: 1.0e-05\nbig: 1.0e+16\nhalf: 2.5e-07\n"
