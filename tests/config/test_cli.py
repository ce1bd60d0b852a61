"""The command line: every option in every spelling, strict, and errors as one line with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from pmm_fast.config import Config, ConfigError, Parser, load_file, load_preset, parse_command_line, run_main
from pmm_fast.config.cli import TRACEBACK, default_out
from pmm_fast.config.load import option_types, optional_type
from pmm_fast.config.validate import get_option


def parse(*argv: str) -> Config:
    return parse_command_line(list(argv), "prog", "About.")


def another_value(kind: Any, value: Any) -> tuple[list[str], Any]:
    """Some text for an option and the value it means, other than ``value``."""
    inner, _ = optional_type(kind)
    members = get_args(inner)
    if get_origin(inner) is list:
        texts, values = zip(*(another_value(members[0], None) for _ in range(2)), strict=True)
        return [text for (text,) in texts], list(values)
    if members:
        other = next(member for member in members if member != value)
        return [str(other)], other
    return {int: (["7"], 7), float: (["0.125"], 0.125), str: (["text"], "text")}[inner]


@pytest.mark.parametrize("key", sorted(option_types().keys() - {"data.domains"}))
def test_every_option_is_heard(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # ranges, contradictions and what an option does to others have their own tests
    monkeypatch.setattr("pmm_fast.config.cli.validate", lambda config: None)
    monkeypatch.setattr("pmm_fast.config.cli.leave_one_out", lambda config: config)
    kind, before = option_types()[key], get_option(load_preset("demo"), key)
    if optional_type(kind)[0] is bool:
        assert get_option(parse(f"--{key}"), key) is True
        assert get_option(parse(f"--no-{key.replace('.', '-')}"), key) is False
        return
    texts, value = another_value(kind, before)
    assert value != before
    assert get_option(parse(f"--{key}", *texts), key) == value
    assert get_option(parse("--" + key.replace(".", "-").replace("_", "-"), *texts), key) == value


@pytest.mark.parametrize(
    "spelling", ["--meta.inner_lr_ratio", "--meta.inner-lr-ratio", "--meta-inner-lr-ratio", "--meta_inner_lr_ratio"]
)
def test_dots_dashes_and_underscores_are_interchangeable(spelling: str) -> None:
    assert parse(spelling, "0.5").meta.inner_lr_ratio == 0.5
    assert parse(f"{spelling}=0.5").meta.inner_lr_ratio == 0.5


def test_no_two_options_share_a_spelling() -> None:
    squashed = [key.replace(".", "-").replace("_", "-") for key in option_types()]
    assert len(set(squashed)) == len(squashed)


def test_shortcuts_booleans_lists_and_literals() -> None:
    config = parse("--mode", "agg", "--iterations", "5", "--amp", "--no-memory.gumbel", "--meta.order", "1")
    assert (config.meta.mode, config.optim.iterations, config.amp, config.memory.gumbel) == ("agg", 5, True, False)
    assert config.meta.order == 1 and isinstance(config.meta.order, int)
    config = parse("--data.sources", "a", "b", "--data.unseen", "--data.scale", "1", "2", "--optim.lr", "5e-4")
    assert (config.data.sources, config.data.unseen, config.data.scale) == (["a", "b"], [], [1.0, 2.0])
    assert config.optim.lr == 5e-4
    assert parse("--amp", "--no-amp").amp is False


def test_file_then_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo\nseed: 1\noptim: {lr: 0.5}\n")
    config = parse("--config", str(tmp_path / "mine.yaml"), "--seed", "2")
    assert (config.seed, config.optim.lr, config.model.channels) == (2, 0.5, load_preset("demo").model.channels)


def test_out_defaults_to_preset_and_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: demo\n")
    assert parse().out == "runs/demo/pinmem"
    assert parse("--mode", "agg", "--config", "gs_r50").out == "runs/gs_r50/agg"
    assert parse("--config", str(tmp_path / "mine.yaml")).out == "runs/mine/pinmem"
    assert parse("--out", "here").out == "here"


def test_a_taken_folder_is_numbered_and_resume_takes_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_out("demo", "agg", resume=True) == "runs/demo/agg"
    for expected in ("runs/demo/agg", "runs/demo/agg-2", "runs/demo/agg-3"):
        assert default_out("demo", "agg") == expected
        (tmp_path / expected).mkdir(parents=True)
        # a folder without a checkpoint is no run: an attempt that failed at once does not count
        assert default_out("demo", "agg") == expected
        (tmp_path / expected / "checkpoint.pt").touch()
    assert default_out("demo", "agg", resume=True) == "runs/demo/agg-3"
    assert parse_command_line(["--mode", "agg", "--resume"], "train", "").out == "runs/demo/agg-3"
    assert parse_command_line(["--mode", "agg"], "train", "").out == "runs/demo/agg-4"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--meta.ordr", "1"], "command line: unknown option --meta.ordr; did you mean --meta.order? (see --help)"),
        (["--lr", "1"], "unknown option --lr; did you mean --optim.lr?"),
        (["--optim.order", "1"], "unknown option --optim.order; did you mean --meta.order?"),
        (["--inner-lr", "1"], "unknown option --inner-lr; did you mean --meta.inner_lr?"),
        (["--evl.flip"], "unknown option --evl.flip; did you mean --eval.flip?"),
        (["--qqq"], "command line: unknown option --qqq (see --help)"),
        (["--meta.ord", "1"], "unknown option --meta.ord;"),
        (["--data.domains", "x"], "--data.domains: domains are defined in a YAML file"),
        (["--data.domains.gtav.root", "x"], "--data.domains.gtav.root: domains are defined in a YAML file"),
        (["--optim.lr", "fast"], "command line: optim.lr: expected a number, got 'fast'"),
        (["--optim.lr", "nan"], "command line: optim.lr: expected a number, got nan"),
        (["--iterations", "1.5"], "command line: optim.iterations: expected a whole number, got '1.5'"),
        (["--meta.order", "3"], "command line: meta.order: expected one of 1, 2, got '3'"),
        (["--mode", "agc"], "command line: meta.mode: expected one of pinmem, memory-agg, mldg, agg, got 'agc'"),
        (["--data.crop", "1", "x"], "command line: data.crop: expected a whole number, got 'x'"),
        (["--seed"], "command line: argument --seed: expected one argument"),
        (["stray"], "command line: unrecognized arguments: stray"),
        (["--config"], "command line: argument --config: expected one argument (presets: demo, "),
        (["--config", "dmo"], "unknown preset 'dmo'; did you mean demo?"),
        (["--optim.lr", "-1"], "optim.lr: expected at least 0, got -1.0"),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert message in str(caught.value)


def test_printed_configuration_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--config", "kitti_to_idd_lite", "--data-root", "/x", "--mode", "mldg"]
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--print-config")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith("# preset: kitti_to_idd_lite\n")
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert load_file(path) == parse(*argv)


def test_help_lists_every_option_with_the_presets_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--config", "gg_r50", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for key in option_types().keys() - {"data.domains"}:
        assert f"--{key}" in text
    assert "--data.domains" not in text
    assert "training iterations [23033]" in text and "[gtav gtav]" in text
    assert "meta: One iteration (Algorithm 1): " in text


def test_parser_offers_the_sections_asked_for() -> None:
    parser = Parser("prog", "About.", sections=("eval", "device"))
    parser.add_argument("runs", nargs="+")
    own, options = parser.parse_options(["a", "b", "--eval-flip", "--device", "cpu"])
    assert own.runs == ["a", "b"] and options == {"eval": {"flip": True}, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"unknown option --optim\.lr"):
        parser.parse_options(["a", "--optim.lr", "1"])


@pytest.mark.parametrize("error", [ConfigError("bad value"), FileNotFoundError("bad value"), ImportError("bad value")])
def test_run_main_reports_errors_in_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main, [])
    assert caught.value.code == 2 and capsys.readouterr().err == "error: bad value\n"
    with pytest.raises(type(error)):
        run_main(main, ["--traceback"])


def test_run_main_traceback_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: list[str]) -> None:
        raise ValueError("bad value")

    monkeypatch.setenv(TRACEBACK, "0")
    with pytest.raises(SystemExit):
        run_main(main, [])
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="bad value"):
        run_main(main, [])


def test_run_main_lets_bugs_through_and_exits_0() -> None:
    def broken(argv: list[str]) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_main(broken, [])
    heard: list[list[str]] = []
    with pytest.raises(SystemExit) as caught:
        run_main(heard.append, ["x"])
    assert caught.value.code == 0 and heard == [["x"]]


def test_run_main_ends_quietly_when_its_reader_does() -> None:
    code = "from pmm_fast.config import run_main; run_main(lambda a: [print('x' * 99) for _ in range(9999)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(20), process.stderr.read()) == (0, b"")
    process.stderr.close()
