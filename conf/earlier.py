"""What the config.yaml of an earlier run has that is no longer, and lacks that came since."""

from omegaconf import DictConfig, OmegaConf, open_dict

# Each with the value that says what is now the only behaviour.
REMOVED = {"model.residual": "float32"}
# Keys that change what a run computes, each with the value that says what was done before there was the key: with them
# an earlier run and one of today that compute the same are the same.
ADDED = {
    "init_from": None,
    "trainer.overfit": False,
    "trainer.num_nodes": 1,
    "attention.window": None,
    "attention.window_pattern": None,
    "model.activation": "gelu",
    "optimizer.cooldown_fraction": 1.0,
    "optimizer.rates": None,
    "trainer.budget_minutes": None,
}
# Of keys of ADDED that not every kind of their group got, those that did. A kind that came later is not among them.
KINDS_ADDED_TO = {
    "attention.window": ("cosine", "regular"),
    "attention.window_pattern": ("cosine", "regular"),
    "optimizer.cooldown_fraction": ("adamw",),
    "optimizer.rates": ("adamw",),
}


def brought_up_to_date(config: DictConfig) -> DictConfig:
    """A stored configuration without the keys that were removed, and with those that came since.

    Raises:
        ValueError: a removed key asks for what there no longer is.
    """
    for key, left in REMOVED.items():
        holder, name = _holder(config, key)
        if holder is None or name not in holder:
            continue
        if holder[name] != left:
            raise ValueError(f"{key} was removed and means {left} everywhere, got {holder[name]!r}")
        with open_dict(holder):
            del holder[name]
    for key, before in ADDED.items():
        holder, name = _holder(config, key)
        kinds = KINDS_ADDED_TO.get(key)
        if holder is not None and name not in holder and (kinds is None or holder.get("kind") in kinds):
            with open_dict(holder):
                holder[name] = before
    return config


def _holder(config: DictConfig, key: str) -> tuple[DictConfig | None, str]:
    """The group that has or would have a key, and the key's name in it."""
    group, _, name = key.rpartition(".")
    holder = OmegaConf.select(config, group) if group else config
    return (holder if isinstance(holder, DictConfig) else None), name
