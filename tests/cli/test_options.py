"""Options of the command line are the fields of the configs: same defaults, choices, limits, completion."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import click
import pytest
from click.shell_completion import ShellComplete
from command_line import mp2

from mp2.cli import main
from mp2.commands.options import build, config_options, field_values, parameter
from mp2.engine import select
from mp2.engine.backend import PRECISIONS as CPU_PRECISIONS
from mp2.engine.cuda.backend import CUDA_PRECISIONS
from mp2.errors import UnknownNameError, UsageError
from mp2.options import check, option
from mp2.runs.config import PRECISIONS, RUNTIMES, BbtConfig
from mp2.serve.config import ServeConfig
from mp2.training.config import MlmConfig, PretrainConfig, TuneConfig

CONFIGS = {"bbt": BbtConfig, "pretrain": PretrainConfig, "pretrain-backbone": MlmConfig, "tune": TuneConfig}
CONFIGS["serve"] = ServeConfig
OF_TORCH = {"iters", "router_search", "router_iters", "popsize", "cma", "engine", "runtime", "precision"}
LEFT_OUT = {"tune": OF_TORCH | {"sigma_input", "sigma_deep", "sigma_shallow", "head", "ridge_features"}}
LEFT_OUT["tune"] |= {"keep", "endpoint", "endpoint_patience_s"}


def options(config: type[Any]) -> dict[str, Any]:
    """Name on the command line -> default, of a config and those in it."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config)
    for item in fields(config):
        if is_dataclass(hints[item.name]):
            found |= options(hints[item.name])  # type: ignore[arg-type]
        elif "option" in item.metadata:
            found[parameter(item.name, item.metadata["option"])] = item.default
    return found


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_is_an_option_with_the_same_default(command: str) -> None:
    words = {
        "tune": ["--task", "t"],
        "serve": ["--bundle", "b"],
        "pretrain-backbone": ["--corpus", "c", "--out", "o"],
    }.get(command, [])
    typed = main.commands[command].make_context(command, words).params
    for name, default in options(CONFIGS[command]).items():
        if name in LEFT_OUT.get(command, set()) | {
            "task",
            "seed",
            "kind",
            "no_test",
            "no_baselines",
            "no_mix_tasks",
            "bundle",
        }:
            continue
        assert typed[name] == default, name


def test_tune_offers_nothing_that_only_a_search_reads() -> None:
    offered = main.commands["tune"].make_context("tune", ["--task", "t"]).params
    assert not LEFT_OUT["tune"] & set(offered)
    assert {"method", "lr", "prompt_tokens", "epochs"} <= set(offered)


@pytest.mark.parametrize("config", [PretrainConfig, MlmConfig])
def test_what_was_not_typed_gives_the_config_without_arguments(config: type[Any]) -> None:
    typed = options(config) | {"kind": "auto"}
    assert build(config, typed) == config()
    assert field_values(config, {}) == {}


def test_what_was_typed_arrives_in_the_config_and_those_in_it() -> None:
    typed = {"router_search": "bo", "popsize": 7, "no_test": True, "kind": "shallow", "other": 1}
    config = build(BbtConfig, typed, task="t", seed=3)
    assert (config.router.method, config.layers.popsize, config.test) == ("bo", 7, False)
    assert (config.kind, config.task, config.seed, config.iters) == ("shallow", "t", 3, 8000)


def test_names_of_runtimes_and_precisions_are_the_engines() -> None:
    assert set(RUNTIMES) == set(select.RUNTIMES)
    assert set(PRECISIONS) == {"auto", *CPU_PRECISIONS, *CUDA_PRECISIONS}


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["bbt", "--task"], "tne", ["tnews"]),
        (["tune", "--task"], "demo_t", ["demo_topic"]),
        (["pretrain", "--tasks"], "lcq", ["lcqmc"]),
        (["bbt", "--backbone"], "mi", ["mini"]),
        (["bbt", "--prompts"], "mini-s", ["mini-shallow"]),
        (
            ["bbt", "--runtime"],
            "onnx",
            ["onnxruntime", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "onnxruntime-openvino"],
        ),
        (["predict", "--runtime"], "tor", ["torch"]),
        (["bbt", "--precision"], "f", ["fp32", "fp16", "fp8"]),
        (["bbt", "--router-search"], "n", ["nevergrad:", "none"]),
        (["bbt", "--cma"], "", ["full", "diagonal"]),
        (["export", "--precision"], "b", ["bf16"]),
        (["export", "--prompts"], "mini-d", ["mini-deep"]),
        (["scratch", "--like"], "mini-s", ["mini-shallow"]),
        (["pretrain", "--device"], "cu", ["cuda"]),
        (["bbt"], "--router-i", ["--router-iters"]),
    ],
)
def test_shells_complete_names(words: list[str], incomplete: str, expected: list[str]) -> None:
    found = ShellComplete(main, {}, "mp2", "_MP2_COMPLETE").get_completions(words, incomplete)
    assert [item.value for item in found] == expected


def test_a_name_that_is_none_is_completed_as_a_file() -> None:
    found = ShellComplete(main, {}, "mp2", "_MP2_COMPLETE").get_completions(["bbt", "--task"], "my_tasks/m")
    assert [(item.value, item.type) for item in found] == [("my_tasks/m", "file")]


def test_help_says_how_completion_is_switched_on() -> None:
    assert "_MP2_COMPLETE=bash_source mp2" in " ".join(mp2("--help").stdout.split())


@dataclass(frozen=True, kw_only=True)
class Small:
    n: int = option(3, "How many.", at_least=1, at_most=9, why=" (fingers)")
    rate: float | None = option(None, "Of change.", above=0, below=1, expected="0 < rate < 1")
    how: str = option("fast", "Manner.", flag="manner", choices=("fast", "slow"))
    inner: int = 5  # Python only

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n is 0, expected at least 1 (fingers)"),
        ({"n": 10}, "n is 10, expected at most 9 (fingers)"),
        ({"rate": 0.0}, "rate is 0.0, expected 0 < rate < 1"),
        ({"rate": 1.0}, "rate is 1.0, expected 0 < rate < 1"),
        ({"rate": float("nan")}, "rate is nan, expected 0 < rate < 1"),
        ({"rate": float("inf")}, "rate is inf, expected 0 < rate < 1"),
    ],
)
def test_what_is_outside_of_its_limits_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Small(**values)
    assert str(raised.value) == message


def test_another_choice_is_answered_with_the_nearest_in_python_and_on_the_command_line() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown manner 'fats'\. Did you mean 'fast'"):
        Small(how="fats")

    @click.command("small")
    @config_options(Small)
    def command(**typed: Any) -> None: ...

    assert [p.name for p in command.params] == ["n", "rate", "manner"]
    with pytest.raises(UnknownNameError, match=r"unknown manner 'fats'\. Did you mean 'fast'"):
        command.make_context("small", ["--manner", "fats"])
