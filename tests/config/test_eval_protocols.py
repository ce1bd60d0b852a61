"""Test protocols by name: what each fixes, what overrides it, and what is refused."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import get_args

import pytest

from pmm_fast.config import (
    EVAL_PROTOCOLS,
    Config,
    ConfigError,
    EvalConfig,
    EvalProtocol,
    forget_protocol,
    parse_command_line,
    resolve_protocol,
    validate,
)
from pmm_fast.config.eval_protocols import PROTOCOL_FIELDS, Method, describe_eval
from pmm_fast.config.load import field_types, option_types

# name: method, scales, flip, crop, overlap, height, resample, noise, mapillary
TABLE = {
    "whole": ("whole", (1.0,), False, 768, 1 / 3, 0, "bicubic", False, "native"),
    "sliding": ("sliding", (1.0,), False, 768, 1 / 3, 0, "bicubic", False, "native"),
    "pooling": ("pooling", (0.5, 1.0, 2.0), True, 768, 1 / 3, 0, "bicubic", False, "native"),
    # train.py, end of the run; eval_pinmem_DR50V3P.sh; the same (noflip); eval_custumfolder_pinmem_DR50V3P.sh
    "released-train": ("whole", (1.0,), False, 768, 1 / 3, 0, "bicubic", True, "released"),
    "released-sliding": ("sliding", (1.0,), True, 768, 1 / 3, 0, "bilinear", True, "released"),
    "released-pooling": ("pooling", (1.0,), False, 768, 1 / 3, 0, "bicubic", True, "released"),
    "released-folder": ("sliding", (1.5,), True, 640, 0.5, 0, "bilinear", True, "native"),
}


@pytest.mark.parametrize("name", [*TABLE, *(EVAL_PROTOCOLS.keys() - TABLE.keys())])
def test_the_table(name: str) -> None:
    assert astuple(resolve_protocol(EvalConfig(name))) == (name, *TABLE[name])
    assert EVAL_PROTOCOLS[name].method in get_args(Method)


def test_every_field_can_be_overridden() -> None:
    others = {
        "scales": [0.5, 2.0],
        "flip": False,
        "crop": 100,
        "overlap": 0.25,
        "height": 700,
        "resample": "bicubic",
        "noise": False,
        "mapillary": "half",
    }
    assert tuple(others) == PROTOCOL_FIELDS and {field.name for field in fields(EvalConfig)} > set(others)
    full = resolve_protocol(EvalConfig("released-sliding", **others))
    assert full == EvalProtocol(
        "released-sliding", "sliding", (0.5, 2.0), False, 100, 0.25, 700, "bicubic", False, "half"
    )
    named = EVAL_PROTOCOLS["released-sliding"]
    for name, value in others.items():
        changed = resolve_protocol(EvalConfig("released-sliding", **{name: value}))
        assert {key for key in PROTOCOL_FIELDS if getattr(changed, key) != getattr(named, key)} == {name}
    # the options say "as the protocol has it" by default, and are of the protocol's types
    assert all(getattr(EvalConfig(), name) is None for name in PROTOCOL_FIELDS)
    types = field_types(EvalProtocol)
    assert all(option_types()[f"eval.{name}"] == types[name] | None for name in PROTOCOL_FIELDS if name != "scales")


def test_a_named_protocol_leaves_nothing_of_a_stored_one() -> None:
    stored = EvalConfig("sliding", crop=64, flip=True, limit=5, tile_batch=2)
    assert forget_protocol(stored, {}) == forget_protocol(stored, {"crop": 9}) == stored
    assert forget_protocol(stored, {"protocol": "released-sliding"}) == EvalConfig(limit=5, tile_batch=2)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_command_line(["--protocol", "released-folder", "--eval.crop", "320", "--no-eval.flip"], "prog", "")
    assert (config.eval.protocol, config.eval.crop, config.eval.flip, config.eval.noise) == (
        "released-folder",
        320,
        False,
        None,
    )
    with pytest.raises(SystemExit):
        parse_command_line(["--protocol", "released-sliding", "--print-config"], "prog", "")
    words = "tiles of 768 x 768 of images at their own size, mirrored too, noise in the read, Mapillary released"
    assert f"# unseen streets/night: {words}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"),
    [("slidding", "; did you mean sliding?"), ("released_sliding", "; did you mean released-sliding?"), ("qqq", "")],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Config(eval=EvalConfig(name)))
    assert str(caught.value) == f"eval.protocol: expected one of {', '.join(TABLE)}, got {name!r}{hint}"


def test_in_words() -> None:
    assert describe_eval(EVAL_PROTOCOLS["whole"]) == "whole images at their own size"
    assert describe_eval(EVAL_PROTOCOLS["pooling"]) == (
        "whole images at their own size, scales 0.5 1 2, mirrored too, probabilities averaged"
    )
    assert describe_eval(EVAL_PROTOCOLS["released-folder"]) == (
        "tiles of 640 x 640, overlapping by 50%, of images at their own size, scales 1.5, mirrored too, "
        "noise in the read"
    )
    halved = resolve_protocol(EvalConfig(height=700, mapillary="half"))
    assert describe_eval(halved) == "whole images resized to height 700, Mapillary half"
