"""All options, each with its one default. The command line, YAML files and help texts are derived from them.

`None` means "not given"; the help text says what happens then. Names follow transformers where it has one.
"""

from handspun.config.export import ExportConfig, GgufType
from handspun.config.generation import (
    CONSTRAINTS,
    NEXT_USER,
    SAMPLING_OPTIONS,
    GenerationOptions,
    Weights,
    read_option,
)
from handspun.config.names import unknown_option, wrong_names
from handspun.config.ranges import option_name, wrong_argument
from handspun.config.template_args import TemplateArgs, read_template_args
from handspun.config.training import DataConfig, DataFormat, Tracker, TrainConfig

__all__ = [
    "CONSTRAINTS",
    "NEXT_USER",
    "SAMPLING_OPTIONS",
    "DataConfig",
    "DataFormat",
    "ExportConfig",
    "GenerationOptions",
    "GgufType",
    "TemplateArgs",
    "Tracker",
    "TrainConfig",
    "Weights",
    "option_name",
    "read_option",
    "read_template_args",
    "unknown_option",
    "wrong_argument",
    "wrong_names",
]
