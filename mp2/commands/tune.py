"""``mp2 tune``: tune prompts for a task by gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mp2.commands.options import build, config_options, log_option, read_seeds
from mp2.commands.paths import PATH
from mp2.commands.printing import as_json_text, note, quiet_option
from mp2.errors import UsageError
from mp2.runs.config import BbtConfig
from mp2.training.config import TuneConfig

# of black-box tuning, which gradient tuning shares a config with
_SKIPPED = (
    *("iters", "router_search", "router_iters", "engine", "runtime", "precision", "seed", "head"),
    *("endpoint", "endpoint_patience_s", "ridge_features", "popsize", "cma", "keep"),
    *("sigma_input", "sigma_deep", "sigma_shallow"),
)


def _rates(text: str | None) -> tuple[float, ...]:
    """Learning rates of ``--lr``; raises ``UsageError`` for what are none."""
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--lr is '{text}', expected rates with commas: 5e-3,1e-2") from None


@click.command(short_help="Tune prompts for a task by gradient.")
@config_options(
    TuneConfig,
    skip=_SKIPPED,
)
@click.option(
    "--lr", "lr", metavar="RATE,...", help="Rates that are tried, and dev chooses.  [default: the method's]"
)
@click.option("--seed", type=int, help="Draws the few-shot split and drives training.  [default: 8]")
@click.option("--seeds", metavar="8,13,...", help="Several seeds, a run each.")
@click.option("--out", type=PATH, default="runs", show_default=True, help="Where run folders are made.")
@log_option
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (a list with --seeds).")
def tune(
    as_json: bool,
    quiet: bool,
    out: str,
    seed: int | None,
    seeds: str | None,
    lr: str | None,
    loggers: list[str],
    **typed: Any,
) -> None:
    """Tune prompts for a task by gradient: the router, then the prompts it selects (two-stage, Adam).

    --method has what MP2 is compared with; an option that a method does not read is refused.
    """
    from mp2.commands.report import show_result, show_series
    from mp2.runs.loggers import create_loggers
    from mp2.runs.progress import ProgressLine
    from mp2.training.tune_run import start_tunes

    numbers, line = read_seeds(seed, seeds), ProgressLine()
    run = build(BbtConfig, {k: v for k, v in typed.items() if k != "method"} | {"runtime": "torch"})
    config = build(TuneConfig, typed, run=run, lr=_rates(lr))
    logger = create_loggers(loggers, None if quiet else line.logger)
    results = []
    try:
        for result in start_tunes(config, numbers, Path(out), logger):
            line.close()
            results.append(result)
            if not as_json:
                show_result(result)
    except KeyboardInterrupt:
        line.close()
        note("mp2: a tuning by gradient keeps nothing before its end; begin it again")
        raise
    finally:
        line.close()
    if as_json:
        click.echo(as_json_text(results if seeds else results[0]))
    elif len(results) > 1:
        show_series(results)
