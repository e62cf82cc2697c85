"""Keys that the config.yaml of an older run may have, and that are no longer."""

from omegaconf import DictConfig, OmegaConf, open_dict

# Each with the value that says what is now the only behaviour.
REMOVED = {"model.residual": "float32"}


def drop_removed(config: DictConfig) -> DictConfig:
    """A stored configuration without the keys that were removed.

    Raises:
        ValueError: a removed key asks for what there no longer is.
    """
    for key, left in REMOVED.items():
        group, _, name = key.rpartition(".")
        holder = OmegaConf.select(config, group)
        if not isinstance(holder, DictConfig) or name not in holder:
            continue
        if holder[name] != left:
            raise ValueError(f"{key} was removed and means {left} everywhere, got {holder[name]!r}")
        with open_dict(holder):
            del holder[name]
    return config
