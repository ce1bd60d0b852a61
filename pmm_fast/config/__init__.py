"""Configuration: the options (``schema``), files and presets (``load``), what may be combined (``validate``), and the
command line (``cli``).

Needs nothing but PyYAML, so that ``--help`` and ``--print-config`` answer at once.
"""

from pmm_fast.config.cli import (
    CHECKPOINT_FILE,
    Parser,
    default_out,
    parse_command_line,
    refuse_several_processes,
    run_main,
)
from pmm_fast.config.eval_protocols import EVAL_PROTOCOLS, EvalProtocol, forget_protocol, resolve_protocol
from pmm_fast.config.load import (
    ConfigError,
    from_dict,
    load_config,
    load_file,
    load_preset,
    preset_names,
    to_dict,
    to_yaml,
)
from pmm_fast.config.protocol import describe_order, describe_protocol, leave_one_out
from pmm_fast.config.schema import (
    Config,
    DataConfig,
    DomainConfig,
    EvalConfig,
    MemoryConfig,
    MetaConfig,
    ModelConfig,
    OptimConfig,
    WhiteningConfig,
)
from pmm_fast.config.validate import validate

__all__ = [
    "CHECKPOINT_FILE",
    "EVAL_PROTOCOLS",
    "Config",
    "ConfigError",
    "DataConfig",
    "DomainConfig",
    "EvalConfig",
    "EvalProtocol",
    "MemoryConfig",
    "MetaConfig",
    "ModelConfig",
    "OptimConfig",
    "Parser",
    "WhiteningConfig",
    "default_out",
    "describe_order",
    "describe_protocol",
    "forget_protocol",
    "from_dict",
    "leave_one_out",
    "load_config",
    "load_file",
    "load_preset",
    "parse_command_line",
    "preset_names",
    "refuse_several_processes",
    "resolve_protocol",
    "run_main",
    "to_dict",
    "to_yaml",
    "validate",
]
