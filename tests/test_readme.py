"""What the documentation says exists: commands, options, presets, files, targets; and its examples run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex

import pytest

from pmm_fast.config import Config, ConfigError, Parser, from_dict, leave_one_out, preset_names, validate
from tests import repository

DOCUMENTS = [*sorted(repository.ROOT.glob("*.md")), *repository.files(("docs",), (".md",))]
README = (repository.ROOT / "README.md").read_text()

COMMAND = re.compile(r"python -m (pmm_fast(?:\.\w+)+)([^\n`|]*)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# a file of the repository that is named without a link
PATH = re.compile(r"(?:pmm_fast|kernels|csrc|tests|bench|docs)/[\w./-]+|Makefile|\.ci/run|[A-Z]+\.md")


class ParsedError(Exception):
    """Instead of running: the command line was understood."""


def text_of(path):
    """A document without its HTML comments."""
    return re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.S)


def commands(text):
    """(module, arguments) of every command of the package, lines that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(module, shlex.split(rest, comments=True)) for module, rest in COMMAND.findall(joined)]


def code(text):
    """Everything set as code: fenced blocks line by line, and spans."""
    blocks = FENCE.findall(text)
    lines = [line for _, block in blocks for line in block.splitlines()]
    return lines + CODE_SPAN.findall(FENCE.sub("", text))


def make_targets(text):
    found = set()
    for piece in code(text):
        # targets, not the variables after them
        if match := re.match(r"make ((?:[\w-]+(?![\w=-]) ?)+)", piece.strip()):
            found |= set(match.group(1).split("#")[0].split())
    return found


def missing_files(path, text):
    """Links and paths of a document that lead nowhere."""
    wrong = [
        target
        for target in LINK.findall(text)
        if "://" not in target and not (path.parent / target.split("#")[0]).exists() and not target.startswith("#")
    ]
    wrong += [
        piece for piece in code(text) if PATH.fullmatch(piece) and not (repository.ROOT / piece.rstrip("/")).exists()
    ]
    return wrong


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """A function that gives a command to its own program, which stops once it has parsed it."""
    parse_options = Parser.parse_options

    def stop(self, arguments=None):
        own, options = parse_options(self, arguments)
        config, training = from_dict(options, "command line", self._base or Config()), self._base is not None
        validate(leave_one_out(config) if training else config, training=training)
        raise ParsedError(own)

    monkeypatch.setattr(Parser, "parse_options", stop)
    monkeypatch.chdir(tmp_path)
    # the configuration files that the README shows, by the name in their first line
    for language, block in FENCE.findall(README):
        if language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", block)):
            (tmp_path / named.group(1)).write_text(block)

    def run(module, arguments):
        main = importlib.import_module(module).main
        try:
            main(arguments)
        except ParsedError:
            return
        except SystemExit as stopped:
            assert not stopped.code and "--help" in arguments
            return
        pytest.fail(f"{module} ran instead of parsing; this test does not know how it reads its command line")

    return run


ALL_COMMANDS = [(path, *found) for path in DOCUMENTS for found in commands(text_of(path))]


@pytest.mark.parametrize(
    ("path", "module", "arguments"),
    ALL_COMMANDS,
    ids=[f"{repository.name(path)}: {module} {' '.join(words)}" for path, module, words in ALL_COMMANDS],
)
def test_command(parse, path, module, arguments):
    # `[RUN ...]` as in a usage line
    arguments = [word for word in arguments if word.strip("[].")]
    if not arguments:
        assert importlib.util.find_spec(module)
        return
    parse(module, [word.strip("[]") for word in arguments])


def test_there_are_commands():
    assert len(ALL_COMMANDS) > 10


@pytest.mark.parametrize(
    "command",
    [
        "python -m pmm_fast.train --config gs_r51",
        "python -m pmm_fast.train --meta.order 3",
        "python -m pmm_fast.evaluate r --lr 1",
    ],
)
def test_a_wrong_command_is_refused(parse, command):
    with pytest.raises(ConfigError):
        parse(*commands(command)[0])


@pytest.mark.parametrize("path", DOCUMENTS, ids=repository.name)
def test_files_exist(path):
    assert missing_files(path, text_of(path)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=repository.name)
def test_make_targets_exist(path):
    rules = re.findall(r"^([a-z-]+):", (repository.ROOT / "Makefile").read_text(), re.M)
    assert make_targets(text_of(path)) <= set(rules)


def test_the_checks_see_what_they_look_for():
    readme = repository.ROOT / "README.md"
    assert missing_files(readme, "[a](docs/none.md) [b](LICENSE) `pmm_fast/none.py` `pmm_fast/ops/`") == [
        "docs/none.md",
        "pmm_fast/none.py",
    ]
    assert make_targets("`make demo`, make nothing\n```sh\nmake test   # make it\n```\n") == {"demo", "test"}


def test_every_preset_has_its_row():
    table = README.split("## Presets")[1].split("##")[0]
    named = [re.findall(r"`(\w+)`", cell) for cell in re.findall(r"^\|([^|]+)\|", table, re.M)]
    assert sorted(name for names in named for name in names) == preset_names()


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in FENCE.findall(README) if language == "python"]
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].logits.shape == (2, 19, 64, 128)
    assert set(names["result"].grads) == set(names["params"])
    assert names["memory"] is names["model"].memory.slots and float(names["memory"].abs().sum()) > 0
