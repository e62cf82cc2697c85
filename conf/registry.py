"""What the options of conf/ build.

A configuration is data: an option says its ``kind``, and the kind is looked up here. No name that stands in a YAML
file, in the config.yaml of somebody else's run or on a command line is ever imported.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

# By group and kind: the class or function that is called with the option's other keys.
BUILDERS = {
    "attention": {
        "cosine": "models.attention.CosineAttention",
        "regular": "models.attention.RegularAttention",
    },
    "norm": {
        "pre": "models.blocks.PreNormBlock",
        "post": "models.blocks.PostNormBlock",
    },
    "model": {
        "gpt": "models.gpt.GPT",
    },
    "data": {
        "enwik8": "data.enwik8.enwik8",
        "file": "data.files.file",
        "pystdlib": "data.pystdlib.pystdlib",
    },
    "optimizer": {
        "adamw": "models.training.optimizer.AdamW",
        "muon": "models.training.optimizer.Muon",
    },
    "logger": {
        "csv": "models.training.loggers.csv_only",
        "none": "models.training.loggers.csv_only",
        "tensorboard": "models.training.loggers.tensorboard_and_csv",
        "wandb": "models.training.loggers.wandb_and_csv",
    },
}
# By group: what the thing built must offer, with its shapes; tests/test_protocols.py holds every kind to it. The other
# groups have no protocol: GPT is the one model, and loggers are Lightning's.
PROTOCOLS = {
    "attention": "models.attention.InnerAttention",
    "norm": "models.blocks.Block",
    "data": "data.bytes.Corpus",
    "optimizer": "models.training.optimizer.OptimizerBuilder",
}
# Their arguments that the program supplies itself: no keys of the configuration.
GIVEN_BY_CODE = {
    "attention": ("num_heads", "head_dim", "layer", "num_layers", "position_bias"),
    "norm": ("width", "num_layers", "attention", "mlp"),
    "model": ("attention", "block"),
    "data": ("url",),  # a run's folder, which may be somebody else's, says what its bytes are, not where to fetch them
    "optimizer": (),
    "logger": ("run_dir", "resume_step", "wandb_id"),
}
# Earlier runs stored, instead of the kind, the name of what was imported: these, and no others.
FORMER_TARGETS = {
    "models.attention.CosineAttention": ("attention", "cosine"),
    "models.attention.RegularAttention": ("attention", "regular"),
    "models.blocks.PreNormBlock": ("norm", "pre"),
    "models.blocks.PostNormBlock": ("norm", "post"),
    "models.gpt.GPT": ("model", "gpt"),
    "data.enwik8.enwik8": ("data", "enwik8"),
    "data.files.file": ("data", "file"),
    "data.pystdlib.pystdlib": ("data", "pystdlib"),
    "models.optimizer.AdamW": ("optimizer", "adamw"),
    "models.loggers.csv_only": ("logger", "csv"),
    "models.loggers.wandb_and_csv": ("logger", "wandb"),
}


def find(group: str, kind: str) -> Callable[..., Any]:
    """The class or function of a kind that stands in BUILDERS."""
    return _named(BUILDERS[group][kind])


def protocol_of(group: str) -> type:
    """The protocol of a group that stands in PROTOCOLS."""
    return _named(PROTOCOLS[group])


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
