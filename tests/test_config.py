"""Every YAML composes and builds; every wrong value is refused with the key and what is accepted."""

import inspect
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support import ROOT
from support.configuration import configure
from support.forked import Forked

from conf import command_line
from conf.registry import BUILDERS, FORMER_TARGETS, GIVEN_BY_CODE, find
from conf.schema import CHOOSERS, COPIES, GROUPS, ConfigError, builder, keys_of, options_of, typed, validate
from models.training.batching import micro_batches
from models.training.devices import choose_precision, compiles_by_default, uses_cuda
from models.training.identity import INCIDENTAL
from models.training.length import Length
from models.training.processes import find_processes
from models.training.stopping import Stopping
from models.training.trainer import build_trainer
from train import build_module

OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
EXPERIMENTS = [path.stem for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]
DEBUGS = [path.stem for path in sorted((ROOT / "conf" / "debug").glob("*.yaml"))]
KINDS = ", ".join(BUILDERS["attention"])
SWEEPS = [path.stem for path in sorted((ROOT / "conf" / "sweep").glob("*.yaml"))]


def needed(group, option):
    """What the option's file leaves to the command line."""
    return [f"{group}.{key}=some/file" for key in keys_of(group, option) if is_left_out(group, option, key)]


def is_left_out(group, option, key):
    return OmegaConf.is_missing(OmegaConf.load(ROOT / "conf" / group / f"{option}.yaml"), key)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_validates_and_names_what_exists(group, option):
    config = validate(configure(f"{group}={option}", *needed(group, option)))
    if group in ("attention", "norm", "model", "optimizer"):
        build_module(config)
    if group == "trainer":
        build_trainer(
            run_dir=Path("unused"), loggers=[], callbacks=[], length=Length(3), accumulate=2, options=config.trainer,
            processes=find_processes(devices=1, num_nodes=1), stopping=Stopping(),
        )  # fmt: skip
    if group in ("data", "logger"):
        assert callable(builder(config, group))


@pytest.mark.parametrize(("group", "option"), [(group, option) for group, option in OPTIONS if group != "trainer"])
def test_an_options_file_has_the_keys_of_what_it_builds(group, option):
    written = OmegaConf.load(ROOT / "conf" / group / f"{option}.yaml")
    parameters = inspect.signature(find(group, written.kind)).parameters
    assert set(keys_of(group, option)) == set(parameters) - set(GIVEN_BY_CODE[group])


def test_every_reference_of_an_option_is_known_as_a_copy():
    found = {}
    for group, option in OPTIONS:
        for key, value in OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{option}.yaml")).items():
            if isinstance(value, str) and "${" in value:
                found[f"{group}.{key}"] = value
    assert found == {key: f"${{{source}}}" for key, source in COPIES.items()}


def test_every_kind_is_an_options_and_every_former_target_a_kind():
    for group, kinds in BUILDERS.items():
        assert {OmegaConf.load(ROOT / "conf" / group / f"{option}.yaml").kind for option in options_of(group)} == set(
            kinds
        )
    assert set(FORMER_TARGETS.values()) <= {(group, kind) for group, kinds in BUILDERS.items() for kind in kinds}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_its_model(experiment):
    config = validate(configure(f"experiment={experiment}"))
    module = build_module(config)
    assert module.gpt.seq_len == config.seq_len
    size, accumulate = micro_batches(config.tokens_per_step, 16384, config.seq_len, 1)
    assert size * accumulate * config.seq_len == config.tokens_per_step


@pytest.mark.parametrize("experiment", ["enwik8", "enwik8_predecessor"])
def test_enwik8_experiments_have_the_size_and_length_of_the_predecessor(experiment):
    config = validate(configure(f"experiment={experiment}"))
    assert (config.model.num_layers, config.model.width, config.model.num_heads) == (8, 512, 8)
    assert (config.seq_len, config.tokens_per_step * config.max_steps) == (1024, 16 * 1024 * 100_000)


def test_the_predecessors_experiment_is_what_its_script_computed():
    """Its train.py at 0.1.40, and what reaches its attention: scale 1, groups 1."""
    config = validate(configure("experiment=enwik8_predecessor"))
    assert dict(config.attention) | {"kind": "cosine", "scale": 1.0, "groups": 1, "learned_scale": False} == dict(
        config.attention
    )
    assert config.tokens_per_step == 4 * 4 * 1024 and config.trainer.clip_norm == 0.5 and config.norm.kind == "pre"
    assert config.model.positions == "learned" and not config.model.tied_head and config.model.dropout == 0
    module = build_module(config)
    optimizer, _ = module.optimizer.build(module.gpt)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0} and optimizer.defaults["eps"] == 1e-8
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert {module.optimizer.lr_at(step) for step in (0, 1, 50_000, 100_000)} == {2e-4}


def test_the_ten_minutes_are_of_muon_by_time_with_heads_of_128_for_both_attentions():
    for attention in ("cosine", "regular"):
        config = validate(configure("experiment=enwik8_10min", f"attention={attention}"))
        module = build_module(config)
        assert module.gpt.head_dim == 128 and config.trainer.budget_minutes == 10 and config.optimizer.kind == "muon"
        assert module.gpt.num_parameters() == pytest.approx(49.5e6, rel=0.01)
        assert [module.optimizer.lr_at(step) for step in (50, 50_000, 100_000)] == pytest.approx([4e-3, 4e-3, 4e-4])
    without = "optimizer=adamw lr=1e-3 model.num_heads=10 model.activation=gelu optimizer.cooldown_fraction=1"
    config = validate(configure("experiment=enwik8_10min", *without.split(), "trainer.budget_minutes=null"))
    assert build_module(config).gpt.head_dim == 64 and config.optimizer.kind == "adamw"


# As the defaults stood at the end of November 2026; they may change, the experiment may not.
BASELINE = {
    "seq_len": 1024, "tokens_per_step": 65536, "lr": 1e-3,
    "attention": {"kind": "cosine", "scale": 12, "learned_scale": True, "groups": 1, "window": None},
    "norm": {"kind": "pre"},
    "model": {"num_layers": 8, "width": 512, "num_heads": 8, "num_kv_heads": None, "positions": "rotary",
              "tied_head": False, "dropout": 0, "activation": "gelu"},
    "optimizer": {"kind": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "warmup_steps": 100,
                  "decay": "cosine", "final_lr_fraction": 0.1, "cooldown_fraction": 1, "rates": None},
    "trainer": {"clip_norm": 1, "precision": None, "budget_minutes": 10},
}  # fmt: skip


def test_the_baseline_writes_out_every_value_that_could_change_a_loss():
    """A key that an option gets later is missing here: it joins the file, with the value that says what was done."""
    written = OmegaConf.load(ROOT / "conf/experiment/baseline_2026_11.yaml")
    composed = OmegaConf.to_container(validate(configure("experiment=baseline_2026_11")))
    incidental = {"resume", "compressors", "name", "run_root", "logger", "data", "norm"}
    for key in set(composed) - incidental:
        if isinstance(composed[key], dict):
            quiet = {name.removeprefix(f"{key}.") for name in INCIDENTAL if name.startswith(f"{key}.")}
            assert set(composed[key]) - {"kind"} - quiet <= set(written[key]), key
        else:
            assert key in written, key
    for key, value in BASELINE.items():
        assert composed[key] == value if not isinstance(value, dict) else composed[key] | value == composed[key], key


NAMED = {"experiment": EXPERIMENTS, "debug": DEBUGS, "sweep": SWEEPS}


@pytest.mark.parametrize("name", [f"{group}/{option}" for group, options in NAMED.items() for option in options])
def test_experiments_and_sweeps_say_their_command_and_only_override(name):
    text = (ROOT / "conf" / f"{name}.yaml").read_text()
    group, option = name.split("/")
    assert f"{group}={option}" in text.splitlines()[1]
    known = {*OmegaConf.load(ROOT / "conf/config.yaml"), *GROUPS, "sweep"}  # sweep: what the file refers to itself
    assert set(OmegaConf.create(text)) <= known


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_debugging_goes_with_every_experiment(experiment):
    chosen = [f"experiment={experiment}"] if experiment else []
    fast = validate(configure(*chosen, "debug=fast"))
    assert (fast.max_steps, fast.model.width, fast.model.seq_len, fast.run_root) == (4, 32, 64, "runs/debug")
    assert fast.data.kind == "pystdlib" and fast.trainer.val_bytes == 2048
    larger = validate(configure(*chosen, "debug=fast", "model=small", "max_steps=9", "norm=post"))
    assert (larger.max_steps, larger.model.tied_head) == (9, False) and larger.norm.kind == "post"


@pytest.mark.parametrize("attention", ["cosine", "regular"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_arm_of_the_first_comparison_sees_the_same_bytes_at_a_rate_of_its_own(attention, norm):
    arm = [f"attention={attention}", f"norm={norm}", "data=file", "data.path=x"]
    parts = (("first_comparison_lr", []), ("first_comparison", []), ("first_comparison", ["seq_len=8192"]))
    rates, final, long = (validate(configure(f"sweep={name}", *arm, *more)) for name, more in parts)
    sweep = OmegaConf.load(ROOT / "conf/sweep/first_comparison.yaml")
    assert final.lr == long.lr == final.optimizer.lr == OmegaConf.to_container(sweep.sweep)["lr"][attention][norm]
    assert rates.model.num_layers == final.model.num_layers == 8 and long.model.seq_len == 8192
    for config in (rates, final, long):
        assert config.micro_batch_tokens == config.tokens_per_step == 65536 and config.max_steps == 800
        assert config.trainer.val_bytes is None


def test_command_line_of_the_readme_composes():
    config = validate(configure("attention=cosine", "seq_len=8192"))
    assert config.model.seq_len == 8192
    assert config.attention.kind == "cosine"
    config = validate(configure("experiment=long_context", "attention=regular", "norm=post"))
    assert config.norm.kind == "post"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=abc", "lr must be a finite number, got 'abc'"),
        ("lr=nan", "lr must be a finite number, got nan"),
        ("lr=-inf", "lr must be a finite number, got -inf"),
        ("lr=true", "lr must be a finite number, got true"),
        ("optimizer.eps=nan", "optimizer.eps must be a finite number, got nan"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas must be a list, each entry a finite number, got [0.9, nan]"),
        ("optimizer.betas=[0.9,true]", "optimizer.betas must be a list, each entry a finite number, got [0.9, True]"),
        ("trainer.clip_norm=inf", "trainer.clip_norm must be a finite number or null, got inf"),
        ("attention.scale=nan", "attention.scale must be a finite number, got nan"),
        ("attention.window=1e3", "attention.window must be an integer or null, got 1000.0"),
        ("attention.window=true", "attention.window must be an integer or null, got true"),
        ("attention.window_pattern=[S,L]", "attention.window_pattern must be text or null, got ['S', 'L']"),
        ("seed=1.5", "seed must be an integer, got 1.5"),
        ("seed=true", "seed must be an integer, got true"),
        ("max_steps=1e3", "max_steps must be an integer, got 1000.0"),
        ("test=2", "test must be true or false, got 2"),
        ("name=[a]", "name must be text or null, got ['a']"),
        ("name={a:1}", "name must be text or null, got {'a': 1}"),
        ("lr=${no.such}", "lr: Interpolation key 'no.such' not found"),
        ("data.cache_dir=${oc.env:NO_SUCH_VARIABLE}", "Environment variable 'NO_SUCH_VARIABLE' not found"),
        ("seq_len=8k", "seq_len must be an integer, got '8k'"),
        ("tokens_per_step=1.5", "tokens_per_step must be an integer, got 1.5"),
        ("test=maybe", "test must be true or false, got 'maybe'"),
        ("compile=fast", "compile must be true or false or null, got 'fast'"),
        ("trainer.val_every=null", "trainer.val_every must be an integer, got null"),
        ("model.width=wide", "model.width must be an integer, got 'wide'"),
        ("model.activation=[gelu]", "model.activation must be text, got ['gelu']"),
        ("model=huge", "Available options in 'model':\n\tbase\n\tsmall\n\ttiny"),
        ("optimizer.lr=0.1", "optimizer.lr follows lr = 0.001, got 0.1: give lr alone"),
        ("optimizer.max_steps=20", "optimizer.max_steps follows max_steps = 2000, got 20: give max_steps alone"),
        ("model.seq_len=32", "model.seq_len follows seq_len = 1024, got 32: give seq_len alone"),
        ("optimizer.betas=[a,b]", "optimizer.betas must be a list, each entry a finite number"),
        ("+flash=1", "flash is not a key; accepted: seq_len, max_steps"),
        ("+model.depth=3", "model.depth is not a key; accepted: model.num_layers, model.width"),
        ("+trainer.epochs=3", "trainer.epochs is not a key; accepted: trainer.accelerator"),
        ("data=file", "data.path must be given, e.g. data.path=VALUE"),
        ("+data.url=http://x", "data.url is not a key; accepted: data.path"),
        ("+attention._target_=os.system", "attention._target_ is not a key; accepted: attention.scale"),
        ("attention.kind=os.system", f"attention.kind must be one of {KINDS}; got 'os.system'"),
        ("attention.kind=[cosine]", f"attention.kind must be one of {KINDS}; got ['cosine']"),
        ("~attention.kind", f"attention.kind must be one of {KINDS}; it is missing"),
        (
            "attention.kind=regular",
            "attention.scale is a key of attention=cosine and attention=cosine_fixed; the chosen option has "
            "attention.window, attention.window_pattern",
        ),
        ("~attention", f"attention must be one of {', '.join(options_of('attention'))} (conf/attention/), got null"),
    ],
)
def test_wrong_values_name_the_key_and_what_is_accepted(override, message):
    with pytest.raises(Exception) as caught:
        validate(configure(override))
    assert message in str(caught.value)
    if override != "model=huge":
        assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=7"], "model.num_heads must divide model.width = 512, got 7"),
        (["model.width=1056", "model.num_heads=4"], "multiple of 8 up to 256, got 264"),
        (["model.activation=swiglu"], "model.activation must be gelu or relu2, got 'swiglu'"),
        (["lr=-1"], "lr must be a positive number, got -1"),
        (["attention.backend=gpu"], "attention.backend must be auto, cuda, sdpa or reference, got 'gpu'"),
        (["attention.window=0"], "attention.window must be null or at least 1, got 0"),
        (["attention=regular", "attention.window=8", "attention.window_pattern=SX"], "letters S and L, .* got 'SX'"),
        (["attention.window=8", "attention.window_pattern=LL"], "attention.window=8 is for the layers S .* got 'LL'"),
        (["attention=cosine_fixed", "attention.window_pattern=SL"], "_pattern needs attention.window, .* got 'SL'"),
        (["model.positions=t5"], "model.positions must be rotary, learned, alibi or dynamic, got 't5'"),
        (
            ["model.positions=dynamic", "attention.scale=45"],
            r"in \(0, 44\] \(the bias .* 16 of 60\), got 45 \* 1",
        ),
        (["max_steps=0"], "max_steps must be at least 1, got 0"),
        (["optimizer.decay=exponential"], "optimizer.decay must be cosine or linear, got 'exponential'"),
        (["trainer.clip_norm=-1"], "trainer.clip_norm must be positive or null, got -1"),
        (["trainer.accelerator=tpu"], "trainer.accelerator must be auto, cpu or gpu, got 'tpu'"),
    ],
)
def test_wrong_ranges_are_refused_when_the_model_is_built(overrides, message):
    config = validate(configure(*overrides))
    with pytest.raises(Exception, match=message):
        build_module(config)


# What a command line is refused with, in one line.
REFUSED = {
    "seqlen=8": "seqlen is not a key; accepted: seq_len, max_steps",
    "lr.x=8": "lr.x is not a key; accepted: seq_len, max_steps",
    "model.depth=3": "model.depth is not a key; accepted: model.num_layers, model.width",
    "+model.depth=3": "model.depth is not a key; accepted: model.num_layers, model.width",
    "optimizer.betas.x=3": "optimizer.betas.x is not a key; accepted: optimizer.lr",
    "optimizer.lr=0.1": "optimizer.lr follows lr and takes no value of its own: give lr=0.1",
    "-m optimizer.max_steps=10,20": "optimizer.max_steps follows max_steps and takes no value of its own: give "
    "max_steps=10,20",
    "model.seq_len=1024": "model.seq_len follows seq_len and takes no value of its own: give seq_len=1024",
    "~optimizer.lr": "optimizer.lr follows lr and takes no value of its own: give lr=VALUE",
    "optimizer.betas={a:0.9}": "optimizer.betas takes no keys of its own, got {'a': 0.9}",
    "attention=regular attention.scale=3": "attention.scale is a key of attention=cosine and attention=cosine_fixed; "
    "the chosen option has attention.window, attention.window_pattern",
    "attention=regular +attention.scale=3": "attention.scale is a key of attention=cosine",
    "-m attention=regular norm=pre,post attention.scale=3": "attention.scale is a key of attention=cosine",
    "data=pystdlib data.pattern=x": "data.pattern is a key of data=file; the chosen option has data.subset",
    "experiment=quickstart data.path=x": "data.path is a key of data=enwik8 and data=file",
    "data.subset=full": "data.subset is a key of data=pystdlib; the chosen option has data.path",
    "logger=csv logger.project=x": "logger.project is a key of logger=wandb",
    "attention.position=alibi": "attention.position is not a key: it is model.positions, the same for every option",
    "logger=null": "logger must be one of csv, none, tensorboard, wandb, got null",
    "model=null": "model must be one of base, small, tiny, got null",
    "~model": "model must be one of base, small, tiny, got null",
    "model=huge": "model must be one of base, small, tiny, got 'huge'",
    "-m model=tiny,huge": "model must be one of base, small, tiny, got 'huge'",
    "model=[tiny,small]": "model must be one of base, small, tiny, got",
    "sweep=all": "sweep must be one of attention_norm, first_comparison",
    "experiment=null": "experiment must be one of baseline_2026_11, enwik8, enwik8_10min, enwik8_predecessor, ",
    "attention.kind=regular": "attention.kind is set by attention=OPTION; accepted: cosine, ",
    "attention._target_=os.system": "_target_ is not a key",
    "+hydra.callbacks.x._target_=os.system": "_target_ is not a key",
    "+hydra.callbacks={x:{_target_:os.system}}": "_target_ is not a key",
    "seed=0,1": "seed=0,1 has several values, which needs -m: python train.py -m seed=0,1",
    "data=file data.path=a=b": """data.path got characters that must be quoted: 'data.path="a=b"'""",
    "data=file data.path=/tmp/é": """data.path got characters that must be quoted: 'data.path="/tmp/é"'""",
    "data=file data.path='a": """"data.path='a" is no KEY=VALUE""",
    "seq_len": "'seq_len' must be KEY=VALUE",
    "+seed=1": "+seed=1: seed is a key already, which + would add: drop the +, seed=1",
    "+attention.scale=3": "attention.scale is a key already, which + would add: drop the +, attention.scale=3",
    "+experiment=enwik8": "experiment is a key already, which + would add: drop the +, experiment=enwik8",
    "-m +seed=1,2": "seed is a key already, which + would add: drop the +, seed=1,2",
}


@pytest.mark.parametrize(
    "value",
    ["runs/NAME", "my runs, a=1/x", "a=b", "/tmp/é", "it's", 'say "x"', "back\\", 'a\\"b', "a(b)", "[x]", "{a:1}",
     "a:b", "~/x", "null", "a#b", "a;b", "2026_12_01", "1e5", "1.50", "True", "inf", "-x"],
)  # fmt: skip
def test_what_is_printed_to_be_typed_is_read_as_it_is(value):
    (word,) = shlex.split(typed("resume", value))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.key_or_group == "resume"
    assert override.value() == value


@pytest.mark.parametrize("line", REFUSED)
def test_a_command_line_that_cannot_be_is_answered_in_one_line(line):
    with pytest.raises(SystemExit) as caught:
        command_line.answer(line.split())
    message = caught.value.code
    assert message.startswith("error: ") and REFUSED[line] in message and "\n" not in message


@pytest.mark.parametrize(
    "line",
    [
        "attention=cosine attention.scale=3 data=file data.path=x",
        "experiment=enwik8 data.path=x",
        "experiment=quickstart data=file data.path=x",
        "name=null 'data.path=\"a,b\"' logger.tags=[a,b] optimizer.betas=[0.9,0.95]",
        "data.path=${oc.env:HOME}/x",
        "name=my_target_run seed=1",
        "-c job lr=1",
        "--cfg job --package model lr=1",
        "++seed=1 ++model.width=64",
        "hydra.verbose=true +hydra.job.env_set.X=1 hydra/launcher=basic",
        "--config-dir elsewhere attention=other attention.x=1",
    ],
)
def test_a_command_line_that_can_be_is_left_as_it_is(line):
    words = line.replace("'", "").split(" ")
    assert command_line.answer(words) == words


def test_in_a_sweep_a_key_is_for_the_options_that_have_it():
    line = "seq_len=32 -m sweep=attention_norm attention.scale=8 model=tiny,small model.width=64 norm=glob(*)".split()
    words = command_line.answer(line)
    assert words == ["-m", "seq_len=32", "sweep=attention_norm", "++attention.scale=8", *line[4:]]
    for attention, expected in (("cosine", ["attention.scale=8"]), ("regular", [])):
        job = ["seq_len=32", "++attention.scale=8", f"attention={attention}"]
        choices = {group: "default" for group in GROUPS} | {
            "attention": attention, "norm": "pre", "model": "small", "data": "enwik8", "optimizer": "adamw",
            "logger": "wandb",
        }  # fmt: skip
        config, overrides = command_line.of_options(configure(*job), choices, job)
        assert overrides == ["seq_len=32", *expected, f"attention={attention}"]
        assert validate(config).attention.get("scale") == (8 if expected else None)
        with_wrong = configure(*job, "+attention.depth=1")
        with pytest.raises(ConfigError, match="attention.depth is not a key"):  # but what no option has is refused
            validate(command_line.of_options(with_wrong, choices, job)[0])


FILES = [("experiment", name) for name in options_of("experiment")] + [("debug", name) for name in options_of("debug")]


@pytest.mark.parametrize("chooser, name", FILES)
@pytest.mark.parametrize("group", ["attention", "norm", "model", "optimizer"])
def test_an_option_given_beside_an_experiment_is_what_is_built_or_refused(chooser, name, group):
    """What makes the option another one than the experiment's is its own, or the line is refused and says what is not.

    What the experiment sets of keys that both have alike, dropout or a schedule, goes with any option.
    """
    file, refused = f"{chooser}={name}", set()
    defaults = dict(command_line._defaults("config.yaml")) | dict(command_line._defaults(f"{chooser}/{name}.yaml"))
    meant = configure(f"{group}={defaults[group]}")[group]
    for option in options_of(group):
        own, built = configure(f"{group}={option}")[group], configure(file, f"{group}={option}")[group]
        lost = [f"{group}.{key}" for key in own if built[key] != own[key] != meant.get(key)]
        for flags in [], ["-m"]:
            if lost:
                refused.add(option)
                with pytest.raises(ConfigError, match=f"^{file} sets .*, whatever {group}={option} has there") as said:
                    command_line.check([*flags, file, f"{group}={option}"])
                assert set(lost) <= {word.rstrip(",") for word in str(said.value).split()}
            command_line.check(
                [*flags, file, f"{group}={option}", *(f"{key}={own[key[len(group) + 1 :]]}" for key in lost)]
            )
    assert defaults[group] not in refused


def test_options_beside_experiments():
    for line, said in {
        "experiment=enwik8_10min model=base": "model=base has there: .* or leave model=base out",
        "-m experiment=enwik8_predecessor sweep=attention_norm": "attention=cosine of sweep=attention_norm has there",
        "-m experiment=baseline_2026_11 sweep=scale": "attention=cosine_fixed of sweep=scale .* leave sweep=scale out",
        "experiment=baseline_2026_11 debug=overfit": "model=tiny of debug=overfit .* or model=small, or leave",
        "-m experiment=enwik8_10min debug=fast,overfit": "model=tiny of debug=overfit has there",
    }.items():
        with pytest.raises(ConfigError, match=f"itself, whatever {said}"):
            command_line.check(line.split())
    for line in (
        "experiment=enwik8_10min optimizer=adamw",
        "experiment=enwik8_10min attention=regular",
        "debug=fast",
        "-m experiment=baseline_2026_11 sweep=attention_norm",
        "experiment=baseline_2026_11 debug=fast",  # which sets the sizes, too
        "-m sweep=scale debug=fast",
        "-m sweep=positions debug=fast",
        "experiment=baseline_2026_11 debug=overfit model=small",
    ):
        command_line.check(line.split())


def test_keys_of_an_experiment_that_the_chosen_option_lacks_are_none():
    words = ["experiment=baseline_2026_11", "attention=regular"]
    choices = {"attention": "regular", "norm": "pre", "model": "small", "data": "enwik8", "optimizer": "adamw",
               "logger": "wandb", "trainer": "default"}  # fmt: skip
    config, overrides = command_line.of_options(configure(*words), choices, words)
    assert overrides == words and [*validate(config).attention] == ["kind", "window", "window_pattern"]


def test_help_says_what_every_key_of_every_option_means():
    usage = command_line.usage()
    lines = [line.split("=", 1)[0].strip() for line in usage.splitlines() if "=" in line]
    meanings = command_line.described("config.yaml")
    for key, _, meaning in meanings:
        assert meaning and key in lines, key
    known = {*OmegaConf.load(ROOT / "conf/config.yaml"), *GROUPS, *CHOOSERS} - {"defaults", "hydra"}
    assert {key for key, _, _ in meanings} == known
    said = {}
    for group, option in OPTIONS:
        described = command_line.described(f"{group}/{option}.yaml")
        assert [key for key, _, _ in described] == keys_of(group, option)
        for key, _, meaning in described:
            assert meaning and f"{group}.{key}" in lines, f"{group}.{key}"
            kind = OmegaConf.load(ROOT / "conf" / group / f"{option}.yaml").get("kind")
            assert said.setdefault((group, kind, key), meaning) == meaning  # the sizes of a model say the same
    assert max(map(len, usage.splitlines())) <= 120
    narrow = command_line.usage(80)
    assert "".join(narrow.split()) == "".join(usage.split())
    assert max(len(line) for line in narrow.splitlines() if "sha256=" not in line) <= 80  # which is one word


def test_help_is_as_wide_as_the_terminal_and_may_be_read_in_part():
    command = f"COLUMNS=80 {sys.executable} train.py --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    part = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (part.returncode, part.stderr) == (0, "") and part.stdout.startswith("python train.py")
    command = f"COLUMNS=80 {sys.executable} train.py --help"
    whole = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert whole.stdout == command_line.usage(80)


def test_train_answers_before_the_imports_that_take_seconds(tmp_path):
    for name in ("torch", "lightning"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('too late')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for line, code, said in (
        ("seqlen=8", 1, "seqlen is not a key"),
        ("-m lr=1e-3,2e-3 --cfg job", 1, "-m does not go with --cfg"),
        ("lr=1 --help", 0, "peak learning rate"),
    ):
        answer = subprocess.run(
            [sys.executable, "train.py", *line.split()], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert answer.returncode == code and said in answer.stdout + answer.stderr, answer.stderr


@pytest.mark.slow
def test_a_back_end_that_cannot_serve_is_refused_before_a_folder_exists(tmp_path):
    line = ["model=tiny", "data=pystdlib", "logger=csv", f"run_root={tmp_path / 'runs'}", "trainer.accelerator=cpu"]
    answer = Forked([*line, "attention.backend=cuda"], {"CUDA_VISIBLE_DEVICES": ""}, None)
    _, errors = answer.communicate()
    assert answer.returncode == 1
    (error,) = [text for text in errors.splitlines() if "InstallationWarning" not in text and text[0] != " "]
    assert error.startswith("error: attention.backend='cuda' ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((65536, 16384, 1024, 1), (16, 4)),
        ((65536, 16384, 8192, 1), (2, 4)),
        ((65536, 1, 8192, 1), (1, 8)),  # at least one sequence
        ((65536, 16384, 1000, 1), (13, 5)),  # 65 sequences, at most 16 at once
        ((65536, 10**9, 1024, 2), (32, 1)),
        ((1024, 10**9, 1024, 1), (1, 1)),
    ],
)
def test_a_step_is_cut_into_equal_micro_batches(arguments, expected):
    assert micro_batches(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected", "better"),
    [
        ((97 * 1024, 65536, 1024, 1), (1, 97), "tokens_per_step=98304 makes 2 of 48"),
        ((2 * 1009 * 64, 8192, 64, 2), (1, 1009), "tokens_per_step=129024 makes 8 of 126"),
        ((1008 * 64, 8192, 64, 1), (126, 8), None),
        ((6 * 64, 5 * 64, 64, 1), (3, 2), None),
        ((7 * 64, 64, 64, 1), (1, 7), None),
        ((10 * 64, 6 * 64, 64, 1), (5, 2), None),
    ],
)
def test_a_step_that_falls_into_many_small_micro_batches_is_warned_of(arguments, expected, better, caplog):
    assert micro_batches(*arguments) == expected
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == ([better] if better else [])
    if better:
        suggested = int(better.split("=")[1].split()[0])
        size, number = micro_batches(suggested, *arguments[1:])
        assert better.endswith(f"makes {number} of {size}") and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 16384, 1024, 1), "tokens_per_step must be at least seq_len = 1024, one sequence a step, got 1000"),
        ((3072, 16384, 1024, 2), "= 3 sequences a step must be a multiple of trainer.devices = 2"),
        ((1024, 0, 1024, 1), "micro_batch_tokens must be at least 1, got 0"),
        ((1024, 1, 0, 1), "seq_len must be at least 1, got 0"),
        ((1024, 1, 1024, 0), "trainer.devices must be at least 1, got 0"),
    ],
)
def test_steps_that_cannot_be_cut_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro_batches(*arguments)


def test_compiling_by_default_needs_a_gpu_and_a_c_compiler(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "gcc")
    assert compiles_by_default(cuda=True) and not compiles_by_default(cuda=False)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiles_by_default(cuda=True)
    assert "no C compiler was found" in caplog.text


def test_precision_follows_the_device():
    assert choose_precision(None, cuda=True) == "bf16-mixed"
    assert choose_precision(None, cuda=False) == "32-true"
    with pytest.raises(ValueError, match="got '16-mixed'"):
        choose_precision("16-mixed", cuda=True)
    assert not uses_cuda("cpu")
