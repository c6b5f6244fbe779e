"""A recipe that cannot be used is refused in a sentence of ours, in bounded time, whatever it holds."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from grace_plugin import GraceModifier
from grace_plugin.run.inputs import grace_modifier, read_recipe
from grace_plugin.schemes import check_patterns
from integration.mutated_recipes import COMPLETE, LONGEST, check, mutant
from tests.pairs import Pair, modifier_of, recipe_text

COUNT = 20_000


def refusal(given: Any) -> str:
    """The message of a refused recipe, which is checked for length and for words that are not ours."""
    found = check(given)
    assert found.startswith("refused"), found
    with pytest.raises(ValueError, match=r".") as refused:
        read_recipe(given)
    return str(refused.value)


def inside(**fields: Any) -> str:
    """A recipe's text with these fields of the GraceModifier."""
    return yaml.safe_dump({"s_stage": {"s_modifiers": {"GraceModifier": {"scheme": "W4A16", **fields}}}})


@pytest.mark.slow
def test_recipe_from__mutated_recipes__read_or_refused_in_our_words() -> None:
    outcomes: dict[str, int] = {}
    for number in range(COUNT):
        found = check(mutant(number))
        assert not found.startswith("FAULT"), f"{found}; python -m integration.mutated_recipes --show {number}"
        outcomes[found] = outcomes.get(found, 0) + 1
    assert all(outcomes[kind] > COUNT / 100 for kind in ("read", "refused", "refused, a list")), outcomes


def test_mutant__same_number__same_recipe() -> None:
    assert mutant(17) == mutant(17)
    assert len({mutant(number) for number in range(50)}) > 45


def test_mutated_recipe__any__holds_every_field() -> None:
    modifier = grace_modifier(read_recipe(COMPLETE))
    (given,) = yaml.safe_load(COMPLETE)["grace_stage"]["grace_modifiers"].values()
    blocks = {name: type(getattr(modifier, name)) for name in GraceModifier.model_fields if name in given}
    blocks = {name: kind for name, kind in blocks.items() if kind.__name__.endswith("Recipe")}
    assert len(blocks) == 8
    assert not [name for name, kind in blocks.items() if set(kind.model_fields) != set(given[name])]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe: empty; write grace_stage: "),
        ("# nothing\n", "recipe: empty; write grace_stage: "),
        ("---\n", "recipe: empty; write grace_stage: "),
        ("{}\n", "recipe: empty; write grace_stage: "),
        ("- GraceModifier\n- b\n", "recipe: the recipe must be a mapping, got a list; write grace_stage"),
        ("a word\nand more\n", "recipe: the recipe must be a mapping, got 'a word and more'; write grace_stage"),
        ("a: [1, 2\nb: 3\n", "recipe: no YAML: line 2, column "),
        ("a:\n\tb: 1\n", "recipe: no YAML: line 2, column 1: found character that cannot start any token"),
        ("a: *b\n", "recipe: no YAML: line 1, column 4: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "recipe: no YAML: line 2, column 1: but found another document"),
        ("a: \x07\n", "recipe: no YAML: line 1: a character that is not allowed; is it another file?"),
        ("a: 1\nb: 2\na: 3\n", "recipe: line 3, column 1: the key 'a' is given twice; keep one of them"),
        ('{"a": 1, "a": 2}\n', "recipe: the key 'a' is given twice; keep one of them"),
        ("true: 1\n", "recipe: line 1, column 1: the key 'true' must be a name; put it in quotes if it is one"),
        ("[a, b]: 1\n", "recipe: line 1, column 1: the key a list must be a name; put it in quotes if it is one"),
        ("a: 2026-01-01\n", "recipe: line 1, column 4: '2026-01-01' is read as a date; put it in quotes"),
        ("a: !!python/object:os.system x\n", "recipe: line 1, column 4: the tag 'tag:yaml.org,2002:python/object:os.sys"),
        ("a: !!binary aGk=\n", "recipe: line 1, column 4: the tag 'tag:yaml.org,2002:binary'; a recipe holds mappings"),
        ("a: &x [*x]\n", "recipe: line 1, column 4: an alias contains itself"),
        ("a: 1" + "0" * 5000 + "\n", "recipe: a value that cannot be read: Exceeds the limit"),
        ('{"a": 1' + "0" * 5000 + "}", "recipe: an integer of too many digits"),
        ("a: \ud800\n", "recipe: half a character (a lone surrogate)"),
        ("a:\n" + "x" * 300_000, "recipe: 300,003 characters, where a recipe has at most 262,144"),
        ("[" * 100_000, "recipe: line 1: nested deeper than 32 levels"),
        ('{"a":' * 40_000, "recipe: nested deeper than 32 levels"),
        ("- a\n" * 60_000, "recipe: more than 20,000 values"),
        ("GraceModifier:\n  scheme: W4A16\n", "unknown key 'GraceModifier' in the recipe, whose keys end in _stage; write"),
        ("args: {x: 1}\ns_stage: {}\n", "recipe: unknown key 'args' in the recipe, whose keys end in _stage"),
        ("s_stage:\n  run_type: oneshot\n", "recipe: unknown key 'run_type' in s_stage, whose keys end in _modifiers"),
        ("s_stage: !!int ''\n", "recipe: a value that cannot be read"),
        ("s_stage:\n", "recipe: s_stage must be a mapping, got nothing (null)"),
        ("s_stage: {s_modifiers: [GraceModifier]}\n", "recipe: s_stage.s_modifiers must be a mapping, got a list"),
        ("s_stage: {s_modifiers: {GraceModifier: }}\n", "s_stage.s_modifiers.GraceModifier must be a mapping, for instance"),
        ("s_stage: {s_modifiers: {GraceModifer: {}}}\n", "'GraceModifer' is no name of a modifier; did you mean 'Gra"),
        ("s_stage: {s_modifiers: {OtherModifier: {}}}\n", "'OtherModifier' is no name of a modifier"),
        ("s_stage: {s_modifiers: {GraceModifier: {self: 1}}}\n", "unknown key 'self' in GraceModifier"),
        ("s_stage: {s_modifiers: {GraceModifier: {type_: 1}}}\n", "unknown key 'type_' in GraceModifier"),
        ("s_stage: {s_modifiers: {GraceModifier: {group: [1]}}}\n", "GraceModifier.group must be a name, got a list"),
        (inside(initialized_=True), "unknown key 'initialized_' in GraceModifier"),
        (inside(start=3), "start has no effect on a GraceModifier; remove it from the recipe"),
        (inside(weight_observer="mse"), "weight_observer has no effect on a GraceModifier"),
    ],
)  # fmt: skip
def test_recipe_from__no_recipe__named(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distill": {"temperature": True}}, "distill.temperature must be a number, got 'true'"),
        ({"distill": {"temperature": "warm"}}, "distill.temperature must be a number, got 'warm'"),
        ({"distill": {"temperature": float("nan")}}, "distill.temperature must be a finite number, got nan"),
        ({"relational": {"warmup_share": float("nan")}}, "relational.warmup_share must be a finite number, got nan"),
        ({"distill": {"alpha": 1e300}}, "distill.alpha must be less than or equal to 1000000000, got 1e+300"),
        ({"distill": {"chunk": 10**400}}, "distill.chunk must be"),
        ({"training": {"method": "lora", "lora": {"rank": 1.5}}}, "training.lora.rank must be a whole number, got 1.5"),
        ({"oneshot": {"seed": -1}}, "oneshot.seed must be greater than or equal to 0, got -1"),
        ({"oneshot": {"seed": 2**32}}, "oneshot.seed must be less than or equal to 4294967295, got 4294967296"),
        ({"controller": {"tau": "none"}}, "controller.tau must be a number, got 'none'"),
        ({"training": {"method": "lorra"}}, "training.method must be 'full', 'scales' or 'lora', got 'lorra'; did you mean"),
        ({"distill": None}, "distill must be a mapping, got nothing (null)"),
        ({"distill": [1]}, "distill must be a mapping, got a list"),
        ({"teacher": {"model": 5}}, "teacher.model must be a string, got 5"),
        ({"teacher": {"model": "x", "cache": "y" * 5000}}, "teacher.cache is read by kind: cached alone"),
        ({"ignore": "lm_head"}, "ignore must be a list, got 'lm_head'"),
        ({"ignore": [1]}, "ignore[0] must be a string, got 1"),
        ({"quantize": "perhaps"}, "quantize must be true or false, got 'perhaps'"),
        ({"scheme": "W4A61"}, "scheme 'W4A61' is no preset of compressed-tensors; did you mean 'W4A16'? learned: "),
        ({"scheme": 4}, "scheme must be the name of a preset, for instance W4A16, got 4"),
        ({"scheme": {}}, "scheme must be the name of a preset, for instance W4A16, got an empty mapping"),
        ({"scheme": {"W4A16": 5}}, "scheme.W4A16 must be a list of layer names or classes, got 5"),
        ({"config_groups": {"g": {"weights": {}}}}, "config_groups.g has no targets"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": {"group_size": "128"}}}},
         "config_groups.g.weights.group_size must be a whole number, got '128'"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": True}}}},
         "config_groups.g.weights.num_bits must be a whole number, got true"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weigths": {}}}}, "unknown key config_groups.g.weigths"),
        ({"targets": ["re:("]}, "targets must hold regular expressions, and 're:(' is none: missing ), untermi"),
        ({"ignore": ["re:["]}, "ignore must hold regular expressions, and 're:[' is none: unterminated character set"),
        ({"ignore": ["re:"]}, "ignore must not hold an empty name"),
        ({"ignore": [""]}, "ignore must not hold an empty name"),
        ({"ignore": ["x" * 1001]}, "ignore must hold names of at most 1,000 characters"),
        ({"training": {"freeze": ["re:*"]}}, "training.freeze[0] must hold regular expressions, and 're:*' is none: nothing"),
        ({"training": {"method": "lora", "lora": {"targets": ["re:)"]}}}, "training.lora.targets[0] must hold regular"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": {}}}}, "config_groups.g.targets must hold regular"),
    ],
)  # fmt: skip
def test_recipe_from__bad_value__named_with_its_key(fields: dict[str, Any], said: str) -> None:
    text = refusal(inside(**fields))
    assert said in text
    assert "\n" not in text


def test_recipe_from__several_bad_values__listed() -> None:
    asked = {"distill": {"temperature": 0, "alpha": "x", "beta": -1}, "scales": {"candidates": 1}}
    assert refusal(inside(**asked)).split("\n") == [
        "4 values cannot be used:",
        "  distill.temperature must be greater than 0, got 0",
        "  distill.alpha must be a number, got 'x'",
        "  distill.beta must be greater than 0, got -1",
        "  scales.candidates must be greater than or equal to 2, got 1",
    ]


def test_recipe_from__many_bad_values__list_cut() -> None:
    lines = refusal(inside(ignore=list(range(500)))).split("\n")
    assert lines[0] == "500 values cannot be used:" and lines[-1] == "  and 492 more"
    assert len(lines) == 10


def test_modifier__bad_value_in_python__same_message() -> None:
    with pytest.raises(ValueError, match=r"^distill.temperature must be greater than 0, got -1$"):
        GraceModifier(scheme="W4A16", distill={"temperature": -1})  # type: ignore[arg-type]


def test_recipe_from__bad_value_of_another_modifier__named_with_it() -> None:
    text = "s_stage: {s_modifiers: {GPTQModifier: {scheme: W4A16, blok_size: 1}, GraceModifier: {scheme: W4A16}}}"
    assert refusal(text) == "GPTQModifier: unknown key blok_size"


def test_recipe_from__nested_aliases__counted_without_expansion() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefghijk", "bcdefghijkl")
    ]
    start = time.perf_counter()
    assert "aliases that stand for more than 20,000 values" in refusal("\n".join(lines))
    assert time.perf_counter() - start < LONGEST


def test_recipe_from__alias__taken() -> None:
    text = (
        "s_stage: {s_modifiers: {GraceModifier: {scheme: W4A16, ignore: &names [lm_head], training: {freeze: *names}}}}"
    )
    assert modifier_of(text).training.freeze == ("lm_head",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.yaml", b"", "empty; write grace_stage"),
        ("r.yaml", b"\x89PNG\r\n\x1a\n\x00\x00\xff", "no UTF-8 text (at byte 0)"),
        ("r.yaml", "a: 1".encode("utf-16"), "no UTF-8 text (at byte 0)"),
        ("r.yaml", b"a: [1", "no YAML: line "),
        ("r.json", b'{"a": 1,}', "no JSON: line 1, column 9"),
        ("r.safetensors", b"a: 1", "the name ends in '.safetensors', a recipe's in .yaml, .yml, .json"),
        ("r", b"a: 1", "the name ends in '', a recipe's in .yaml, .yml, .json"),
        ("r.yaml", b"#" * (2**18 + 1), "262,145 bytes, where a recipe has at most 262,144"),
        ("r.yaml", b"s_stage: {s_modifiers: {GraceModifier: {sheme: W4A16}}}", "unknown key 'sheme' in GraceModifier"),
        ("[bold].yaml", b"a: 1", "unknown key 'a' in the recipe"),
    ],
)  # fmt: skip
def test_recipe_from__file_that_is_no_recipe__named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    for given in (file, str(file)):
        text = refusal(given)
        assert text.startswith(f"recipe {file}: ") and said in text


def test_recipe_from__no_regular_file__not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    assert refusal(tmp_path / "fifo.yaml").endswith("fifo.yaml: no regular file; name a YAML file")
    assert refusal(tmp_path).endswith(f"{tmp_path}: a folder; name a YAML file")
    assert refusal(Path("/dev/zero")) == "recipe /dev/zero: no regular file; name a YAML file"
    assert refusal(str(tmp_path / "missing.yaml")) == f"no recipe at {tmp_path}/missing.yaml"
    assert refusal("missing") == "no recipe at missing"
    assert refusal(tmp_path / ("x" * 300 + ".yaml")).endswith("cannot be read: File name too long")


@pytest.mark.parametrize("given", [None, 5, {"s_stage": {}}, b"a: 1"])
def test_recipe_from__other_type__refused(given: Any) -> None:
    assert refusal(given).startswith("a recipe is a path, a YAML text, a GraceModifier or a Recipe; got ")


def test_recipe_from__json_and_byte_order_mark__read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(
        '{"s_stage": {"s_modifiers": {"GraceModifier": {"scheme": "W4A16", "teacher": "t"}}}}'
    )
    (tmp_path / "r.yml").write_bytes(b"\xef\xbb\xbf" + inside(teacher="t").encode())
    found = [grace_modifier(read_recipe(tmp_path / name)).teacher.model for name in ("r.json", "r.yml")]
    assert found == ["t", "t"]


@pytest.mark.parametrize("key", ["targets", "ignore", "training.freeze", "training.lora.targets"])
def test_check_patterns__slow_pattern__ended_and_named(llava: Pair, key: str) -> None:
    """With the names of a real model; ended after five seconds, so it is tried once for each place it may come from."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.float32)
    slow = r"re:(\w+\.?)+$x"
    assert re.compile(slow[3:])
    start = time.perf_counter()
    said = rf"^{re.escape(key)} {re.escape(repr(slow))} takes more than 1 s to match with the layers' names"
    with pytest.raises(ValueError, match=said):
        check_patterns({"other": ["re:.*"], key: ["Linear", "re:.*mlp.*", slow, "re:.*"]}, model, seconds=1.0)
    assert time.perf_counter() - start < 3.0


@pytest.mark.slow
def test_initialize__slow_pattern__refused_before_the_teacher_is_loaded(llava: Pair) -> None:
    from tests.test_modifier import start as begin
    from tests.test_modifier import student_of

    text = recipe_text("no/teacher", training={"freeze": [r"re:(\w+\.?)+$x"]})
    with pytest.raises(ValueError, match=r"^training.freeze 're:.*takes more than 5 s to match"):
        begin(modifier_of(text), student_of(llava))


def test_check_patterns__plain_names__no_process_started() -> None:
    start = time.perf_counter()
    for _ in range(100):
        check_patterns({"targets": ["Linear"], "ignore": ["lm_head"]}, nn.Linear(2, 2))
    assert time.perf_counter() - start < 1.0
