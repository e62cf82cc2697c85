"""Runs that nobody trained."""

import hashlib
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf

from conf.schema import validate
from models.training.load import build_gpt
from support.configuration import configure


def untrained_run(root: Path, text: bytes) -> Path:
    """The folder of a small run on root/text as train.py leaves it, with its weights as they were initialised."""
    (root / "text").write_bytes(text)
    line = "model=tiny model.num_layers=1 model.width=32 model.num_heads=2 seq_len=16 data=file logger=csv".split()
    config = validate(configure(*line, f"data.path={root / 'text'}", "trainer.accelerator=cpu"))
    (root / "run" / "checkpoints").mkdir(parents=True)
    OmegaConf.save(config, root / "run" / "config.yaml")
    corpus = {"sha256": hashlib.sha256(text).hexdigest()}
    (root / "run" / "run.json").write_text(json.dumps({"status": "finished", "corpus": corpus}))
    state = {f"gpt.{key}": value for key, value in build_gpt(config).state_dict().items()}
    torch.save({"global_step": 1, "state_dict": state}, root / "run" / "checkpoints" / "best.ckpt")
    return root / "run"
