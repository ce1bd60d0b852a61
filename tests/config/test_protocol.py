"""Leaving a source out, and what a configuration says about its protocol."""

from __future__ import annotations

import pytest

from pmm_fast import meta
from pmm_fast.config import (
    ConfigError,
    describe_protocol,
    from_dict,
    leave_one_out,
    load_preset,
    parse_command_line,
    validate,
)
from pmm_fast.config.protocol import META_MODES


def config(**data: object):
    return from_dict({"data": {"sources": ["a", "b", "c"], "unseen": ["d"], **data}}, "test")


@pytest.mark.parametrize(
    ("strong", "left", "expected"),
    [
        ([], "b", []),
        ([0, 2], "b", [0, 1]),
        ([1], "b", []),
        ([0, 1], "a", [0]),
        ([7], "a", [7]),
        ([-1], "a", [-1]),
        ([0], "b/", [0]),
    ],
)
def test_leave_one_out(strong: list[int], left: str, expected: list[int]) -> None:
    before = config(leave_out=left, strong_domains=strong)
    after = leave_one_out(before)
    assert after.data.sources == [name for name in "abc" if name != left[0]] and after.data.unseen == [left]
    assert after.data.strong_domains == expected and after.data.leave_out == ""
    # what was given is as it was; what is resolved stays so
    assert before.data.leave_out == left and leave_one_out(after) is after


def test_what_cannot_be_left_out() -> None:
    with pytest.raises(ConfigError, match=r"^data\.leave_out: expected one of data\.sources \(a, b, c\), got 'd'"):
        leave_one_out(config(leave_out="d"))
    with pytest.raises(ConfigError, match=r"a is the only source; nothing would be left"):
        leave_one_out(config(sources=["a"], leave_out="a"))
    # twice the same is one domain
    with pytest.raises(ConfigError, match=r"a is the only source"):
        leave_one_out(config(sources=["a", "a"], leave_out="a"))


def test_what_nobody_carried_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.leave_out: only training and verify.* carry it out; .* still 'a'"):
        validate(config(leave_out="a"))


def test_modes_with_meta_learning_are_those_of_the_step() -> None:
    # two lines of imports that must not meet
    assert META_MODES == meta.META_MODES


def test_leave_one_out_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "gsi_r50", "--data.leave_out", "synthia", "--print-config"]
    with pytest.raises(SystemExit):
        parse_command_line(arguments, "prog", "about")
    printed = capsys.readouterr().out
    assert "  sources: [gtav, idd]\n  unseen: [synthia]\n  leave_out: ''\n" in printed
    assert "# source gtav (gtav:released): strong jitter" in printed and "# source idd: jitter" in printed


def test_the_published_protocols_say_what_they_are() -> None:
    lines = describe_protocol(load_preset("gs_r50"))
    assert lines == [
        "pinmem, order 2 (exact); deeplabv3plus_resnet50",
        "4 images of each source: crop 768 x 768, scale 0.5 to 2, mirrored 50%, blurred",
        "source gtav (gtav:released): strong jitter (0.8, 0.8, 0.8, 0.3), always",
        "source synthia: jitter (0.4, 0.4, 0.4, 0.1) of 50%",
        *(f"unseen {name}: whole images at their own size" for name in ("cityscapes", "bdd100k", "mapillary")),
    ]
    assert describe_protocol(load_preset("released_gs_r50"))[0].startswith("pinmem, order 1 (as released)")
    assert describe_protocol(load_preset("gs_r101v2"))[0].endswith("deeplabv2_resnet101")
    alone = describe_protocol(load_preset("gg_r50"))[2:4]
    assert ["strong" in line for line in alone] == [True, False]
    # every source and every unseen domain has its line
    assert sum(line.startswith(("source", "unseen")) for line in describe_protocol(load_preset("gsi_r50"))) == 6


def test_other_protocols_in_words() -> None:
    tiles = from_dict(
        {
            "meta": {"mode": "agg"},
            "data": {"sources": ["a"], "unseen": ["b"], "blur": False, "strong_meta_test": True},
            "eval": {"protocol": "sliding", "crop": 512, "scales": [0.5, 1.0], "flip": True, "height": 600},
        },
        "test",
    )
    first, second, source, unseen = describe_protocol(tiles)
    assert first.startswith("agg, no meta-learning") and second.endswith("no blur")
    assert source.endswith("of 50%; in meta-test strong jitter (0.8, 0.8, 0.8, 0.3)")
    assert unseen == ("unseen b: tiles of 512 x 512 of images resized to height 600, scales 0.5 1, mirrored too")
