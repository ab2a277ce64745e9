import dataclasses
import json

import pytest
import yaml

from miras import variants
from miras.errors import UsageError
from miras.train import SIZES, TrainConfig, load_config


@pytest.mark.parametrize("size", SIZES)
def test_what_is_left_out_comes_from_the_size(size):
    config = TrainConfig(size=size)
    for name, value in dataclasses.asdict(SIZES[size]).items():
        assert getattr(config, name) == value, name
    assert None not in (config.out, config.cache, config.eval_every, config.save_every)


def test_flags_win_over_the_file_and_the_file_over_the_size(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: memora\nsize: 120m\nsteps: 10\nlearning_rate: 3e-4\n")
    config = load_config(str(path), {"steps": 20})
    assert (config.model, config.steps, config.layers) == ("memora", 20, 12)
    assert config.learning_rate == 3e-4


def test_warm_up_is_at_most_a_tenth():
    assert TrainConfig(steps=20).warmup == 2
    assert TrainConfig(steps=2000).warmup == SIZES["tiny"].warmup


def test_a_saved_configuration_is_the_same_run(tmp_path):
    config = TrainConfig(model="yaad,sliding_window", steps=7, bf16=True, learning_rate=1e-5)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path), {}) == config


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_rule_written_out_in_a_file(tmp_path, kind):
    rule = variants.titans(chunk=8)
    path = tmp_path / f"mine.{kind}"
    fields = {"mixer": [rule.to_config(), variants.sliding_window().to_config()], "layers": 4}
    path.write_text(json.dumps(fields) if kind == "json" else yaml.safe_dump(fields))
    config = load_config(str(path), {})
    assert config.model == "mine"
    assert config.mixers == (rule, variants.sliding_window()) * 2


def test_numbers_in_files_are_numbers(tmp_path):
    """As people and json write them; YAML 1.1 has words for some of these."""
    rule = variants.memora().to_config()
    rule["memory"] |= {"eps": 1e-05}
    path = tmp_path / "mine.yaml"
    path.write_text(f"mixer: {json.dumps(rule)}\nlearning_rate: 3e-4\nweight_decay: 1\nout: 3e-4x\n")
    config = load_config(str(path), {})
    assert "1e-05" in path.read_text() and config.mixers[0].memory.eps == 1e-5
    assert (config.learning_rate, config.weight_decay, config.out) == (3e-4, 1.0, "3e-4x")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "yad"}, "Did you mean 'yaad'"),
        ({"size": "12m"}, "--size 12m: expected one of tiny, 120m, 340m"),
        ({"steps": "many"}, "--steps: expected a whole number, got 'many'"),
        ({"steps": 0}, "--steps 0"),
        ({"bf16": 1}, "--bf16: expected true or false"),
        ({"learning_rate": "fast"}, "--learning-rate: expected a number"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"batch": 100}, "--batch 100: expected a multiple of 256"),
        ({"warmup": 300}, "--warmup 300: expected fewer than the 300 steps"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"gates": "heads"}, "Did you mean 'head'"),
        ({"dim": 130}, "--dim 130: expected a multiple of the 4 heads"),
        ({"mixer": {"name": "Rul"}}, "Did you mean 'Rule'"),
        ({"mixer": ["yaad"]}, "mixer: expected a rule"),
        ({"mixer": {"name": "Attention"}, "chunk": 4}, "--chunk 4"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(UsageError) as refused:
        TrainConfig(**fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [("stepz: 3", "Did you mean 'steps'"), ("- a", "expected fields"), ("a: [", "cannot be read"), (None, "no such")],
)
def test_a_bad_file_is_refused(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError) as refused:
        load_config(str(path), {})
    assert said in str(refused.value)
