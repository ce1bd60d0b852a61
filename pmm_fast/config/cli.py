"""The command line: every option of the schema, with the schema's help and checks.

``--meta.order 1``, ``--meta-order 1`` and ``--meta_order=1`` are the same option.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args, get_origin

from pmm_fast.config.load import (
    ConfigError,
    expectation,
    field_types,
    from_dict,
    load_config,
    nearest_key,
    optional_type,
    preset_names,
    to_yaml,
)
from pmm_fast.config.protocol import describe_protocol, leave_one_out
from pmm_fast.config.schema import Config
from pmm_fast.config.validate import get_option, validate

CHECKPOINT_FILE = "checkpoint.pt"
"""The file by which a folder is known to hold a run."""

SHORTCUTS = {
    "mode": "meta.mode",
    "iterations": "optim.iterations",
    "loader": "data.loader",
    "protocol": "eval.protocol",
}
"""Short names of the options that are used most."""

TRACEBACK = "PMM_FAST_TRACEBACK"
_DESTINATION = "option:"


class Parser(argparse.ArgumentParser):
    """An argument parser whose options are those of ``Config``, beside a program's own arguments.

    Args:
        prog: name of the program, as it is called.
        description: what it does, for ``--help``.
        base: configuration whose values ``--help`` shows as defaults; None shows none.
        sections: sections (``data``, ``eval``) and top-level options (``device``) to offer; None: all.
    """

    def __init__(
        self, prog: str, description: str, base: Config | None = None, sections: Collection[str] | None = None
    ) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_Formatter, add_help=False)
        self.own = self.add_argument_group("general")
        self.own.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.own.add_argument(
            "--traceback",
            action="store_true",
            help=f"show where an error arose (or {TRACEBACK}=1)",
        )
        self._base = base
        offered = [name for name in field_types(Config) if sections is None or name in sections]
        for name in offered:
            kind = field_types(Config)[name]
            if dataclasses.is_dataclass(kind):
                summary = (kind.__doc__ or "").strip().splitlines()[0].rstrip(".")
                group = self.add_argument_group(f"{name}: {summary}")
                for inner in dataclasses.fields(cast(type, kind)):
                    self._add_option(group, f"{name}.{inner.name}", inner, field_types(cast(type, kind))[inner.name])
        run = self.add_argument_group("run")
        for field in dataclasses.fields(Config):
            if field.name in offered and not dataclasses.is_dataclass(field_types(Config)[field.name]):
                self._add_option(run, field.name, field, field_types(Config)[field.name])

    def _add_option(self, group: argparse._ArgumentGroup, key: str, field: dataclasses.Field[Any], kind: Any) -> None:
        if not field.metadata.get("cli", True):
            return
        flags = [f"--{short}" for short, full in SHORTCUTS.items() if full == key] + [f"--{key}"]
        text = field.metadata["help"]
        if self._base is not None:
            text += f" [{_show(get_option(self._base, key))}]"
        settings: dict[str, Any] = {
            "dest": _DESTINATION + key,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        inner, _ = optional_type(kind)
        if inner is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
        elif get_origin(inner) is list:
            # "*": `--data.unseen` alone empties the list
            member = _metavar(get_args(inner)[0])
            group.add_argument(*flags, nargs="*", metavar=member, **settings)
        else:
            group.add_argument(*flags, metavar=_metavar(inner), **settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, so that every mistake is reported in the same way."""
        raise ConfigError(f"command line: {message} (see --help)")

    def parse_options(self, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Parse a command line.

        Args:
            arguments: the arguments; default: ``sys.argv[1:]``.

        Returns:
            The program's own arguments, and the given options as nested mappings for ``from_dict``.

        Raises:
            ConfigError: an unknown option (the nearest is suggested), a missing or a wrong value.
        """
        given = self.parse_args(self._spell(sys.argv[1:] if arguments is None else arguments))
        own, options = argparse.Namespace(), dict[str, Any]()
        for name, value in vars(given).items():
            if not name.startswith(_DESTINATION):
                setattr(own, name, value)
                continue
            key = name.removeprefix(_DESTINATION)
            section, _, field = key.rpartition(".")
            holder = options.setdefault(section, {}) if section else options
            holder[field] = _parse(value, _type_of(key), key)
        return own, options

    def _spell(self, arguments: Sequence[str]) -> list[str]:
        """Options as they were declared, whichever of ``. - _`` they were written with."""
        declared = {_squash(flag): flag for action in self._actions for flag in action.option_strings}
        spelled: list[str] = []
        for position, argument in enumerate(arguments):
            if argument == "--":
                return spelled + list(arguments[position:])
            name, equals, value = argument.partition("=")
            if name.startswith("--"):
                if _squash(name) not in declared:
                    self._refuse(name, declared)
                argument = declared[_squash(name)] + equals + value
            spelled.append(argument)
        return spelled

    def _refuse(self, name: str, declared: dict[str, str]) -> NoReturn:
        key = _squash(name).removeprefix("--")
        if key == "data-domains" or key.startswith("data-domains-"):
            raise ConfigError(f"command line: {name}: domains are defined in a YAML file (--config FILE)")
        # keys are compared as the schema writes them: dots between section and field, underscores within
        flags = {flag[2:].replace("-", "_"): flag for flag in declared.values() if flag.startswith("--")}
        near = nearest_key(name[2:].replace("-", "_"), list(flags))
        hint = f"; did you mean {flags[near]}?" if near else ""
        raise ConfigError(f"command line: unknown option {name}{hint} (see --help)")


class _Formatter(argparse.HelpFormatter):
    """Help in columns that leave room for long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        # sixty options in brackets help nobody
        positional = [action for action in actions if not action.option_strings]
        return super()._format_usage(usage, positional, [], prefix).rstrip("\n") + " [options]\n\n"


def _squash(flag: str) -> str:
    """``--meta.inner_lr`` and ``--meta-inner-lr`` alike."""
    return "--" + re.sub(r"[._]", "-", flag[2:]) if flag.startswith("--") else flag


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_show(item) for item in value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "as the protocol has it"
    return str(value) or "empty"


def _type_of(key: str) -> Any:
    kind: Any = Config
    for name in key.split("."):
        kind = field_types(kind)[name]
    return kind


def _parse(value: Any, kind: Any, key: str) -> Any:
    """Text of the command line as the type of its option; what does not parse is left to the error of that type."""
    inner, optional = optional_type(kind)
    if isinstance(value, list):
        return [_parse(item, get_args(inner)[0], key) for item in value]
    if optional and value in ("none", "null"):
        return None
    if get_origin(inner) is Literal:
        return next((item for item in get_args(inner) if str(item) == value), value)
    if inner in (int, float):
        try:
            return inner(value)
        except ValueError:
            raise ConfigError(f"command line: {key}: expected {expectation(inner)}, got {value!r}") from None
    return value


def default_out(name_or_file: str, mode: str, resume: bool = False) -> str:
    """The folder of a run that names none: ``runs/PRESET/MODE``, then ``MODE-2``, ``MODE-3``, ... while they hold runs.

    Args:
        name_or_file: preset or YAML file; a file counts by its stem.
        mode: training mode.
        resume: give the last folder that holds a run instead.
    """
    first = Path("runs") / Path(name_or_file).stem / mode
    folders = (first if number == 1 else first.with_name(f"{mode}-{number}") for number in itertools.count(1))
    taken = list(itertools.takewhile(lambda folder: (folder / CHECKPOINT_FILE).exists(), folders))
    if resume:
        return (taken or [first])[-1].as_posix()
    return (first if not taken else first.with_name(f"{mode}-{len(taken) + 1}")).as_posix()


def parse_command_line(argv: list[str] | None, prog: str, description: str, default_preset: str = "demo") -> Config:
    """The configuration of a run: preset or file, then the command line on top, checked.

    ``--print-config`` prints it as YAML and exits.  An empty ``out`` becomes a folder of its own (:func:`default_out`).

    Args:
        argv: arguments without the program's name; None: those of the process.
        prog: name of the program, as it is called.
        description: what it does, for ``--help``.
        default_preset: preset or file that is used without ``--config``.

    Raises:
        ConfigError: something in the file or on the command line is wrong.
        SystemExit: after ``--help`` or ``--print-config``, with code 0.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # looked for beforehand: the help shows the values of the chosen preset
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", default=default_preset)
    try:
        name = first.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error} (presets: {', '.join(preset_names())})") from None
    base = load_config(name)
    about = f"{description} Values in [brackets] are those of {name}; dots, dashes and underscores are interchangeable."
    parser = Parser(prog, about, base)
    parser.own.add_argument(
        "--config", metavar="NAME|FILE", help=f"preset or YAML file to start from [{name}]: {', '.join(preset_names())}"
    )
    parser.own.add_argument("--print-config", action="store_true", help="print the resulting configuration and exit")
    own, options = parser.parse_options(arguments)
    config = leave_one_out(from_dict(options, "command line", base))
    if not config.out:
        config.out = default_out(name, config.meta.mode, config.resume)
    validate(config)
    if own.print_config:
        print("\n".join(f"# {line}" for line in [f"preset: {name}", *describe_protocol(config)]))
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def refuse_several_processes(prog: str) -> None:
    """Refuse to be one of several processes that torchrun started, each of which would do all of the work.

    Args:
        prog: the program as it is called, ``python -m pmm_fast.evaluate``.

    Raises:
        ConfigError: torchrun's variables say so.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        name = prog.rpartition(".")[2]
        raise ConfigError(f"{name} is one process, but torchrun started {processes}: call it with {prog}")


def run_main(function: Callable[[list[str]], object], argv: list[str] | None = None) -> NoReturn:
    """Run a program's ``main`` and exit: 0 when it returns, 2 after an error that its user can mend.

    Such errors (``ValueError``, ``OSError``, and ``ImportError`` for a missing extra) are printed as one line on
    stderr; ``--traceback`` or ``PMM_FAST_TRACEBACK=1`` shows the traceback instead.  Others are bugs and pass through.

    Args:
        function: the main, called with the arguments; what it returns is ignored.
        argv: arguments without the program's name; None: those of the process.

    Raises:
        SystemExit: always, unless the traceback was asked for.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "--traceback" in arguments or os.environ.get(TRACEBACK, "") not in ("", "0"):
        function(arguments)
        raise SystemExit(0)
    try:
        function(arguments)
    except BrokenPipeError:
        # the reader of a pipe (head) has seen enough; nothing may be flushed into it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)
