"""``mp2 pretrain``: from names, folders and devices to a run, or back into one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mp2.backbone.load import EMBEDDED as BACKBONES
from mp2.backbone.load import Backbone, load_backbone
from mp2.environment import data_folder
from mp2.errors import FormatError, UsageError
from mp2.json_files import build, read_object
from mp2.limits import check_new_folder, check_threads, memory_bytes
from mp2.prompts import PromptSet, load_prompts
from mp2.prompts.prompt_set import EMBEDDED as PROMPTS
from mp2.runs.needs import say_what_it_loads
from mp2.tasks import TaskCard, list_cards, load_card
from mp2.tasks.place import tasks_in
from mp2.training.config import PRETRAIN_STEPS, PretrainConfig
from mp2.training.mixture import MixtureTask, load_mixture
from mp2.training.next_sentence import next_sentence_task
from mp2.training.outputs import PretrainResult
from mp2.training.pretrainer import Pretrainer, differences
from mp2.training.prompted import table
from mp2.training.ranks import is_main, joined


@dataclass(frozen=True, kw_only=True)
class PretrainInputs:
    """Task names or cards, where data, backbone and first prompts are, and what was typed."""

    tasks: tuple[str, ...]
    backbone: str
    revision: str | None = None
    data: str | None = None
    corpus: str | None = None
    init: str | None = None
    command: str | None = None

    def absolute(self) -> PretrainInputs:
        """The same with full paths and MP2_DATA, so that a run can be resumed from any folder and shell.

        Names of what ships with the package stay names, whatever lies in this folder.
        """

        def full(name: str, embedded: Collection[str] = ()) -> str:
            return str(Path(name).resolve()) if name not in embedded and Path(name).exists() else name

        data = self.data or data_folder()
        return PretrainInputs(
            tasks=tuple(full(t) if t.endswith(".toml") else t for t in self.tasks),
            backbone=full(self.backbone, BACKBONES),
            revision=self.revision,
            data=full(data) if data else None,
            corpus=full(self.corpus) if self.corpus else None,
            init=full(self.init, PROMPTS) if self.init else None,
            command=self.command,
        )


def pretrain(
    cards: Sequence[TaskCard],
    backbone: Backbone,
    config: PretrainConfig,
    out: str | Path,
    *,
    data: str | Path | None = None,
    corpus: str | Path | None = None,
    init: PromptSet | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = lambda _: None,
    inputs: PretrainInputs | None = None,
) -> PretrainResult:
    """Pre-train prompts for ``cards`` over ``backbone`` in the folder ``out`` (section 3.3 of the paper).

    A run in ``out`` goes on. ``data`` (or MP2_DATA) has TASK/{train,dev}.jsonl; for method ppt ``corpus`` has
    plain text (*.txt, *.txt.xz, a blank line after each document), and there are no cards. ``init`` are
    prompts to start from. Under ``torchrun`` all its processes share the work. ``inputs`` is kept in
    ``config.json``.

    Raises:
        UsageError: bad data or settings.
        MismatchError: a checkpoint in ``out`` is of other settings, data or backbone.
        RunLockedError: another process trains in ``out``.
        LossError: ten losses in a row were not finite; the last checkpoint is good.
    """
    if init is not None:
        differences(init, backbone, config)
    positions = backbone.config.max_positions
    if config.prompt_tokens >= positions:
        why = ": inline prompts take positions" if config.n_inline else ""
        raise UsageError(
            f"prompt_tokens is {config.prompt_tokens}, expected less than the {positions} positions of "
            f"'{backbone.name}'{why}"
        )
    limit = min(config.max_tokens, positions - config.n_inline)
    with joined(device) as ranks:
        _check_memory(backbone, config, ranks.device)
        say = log if ranks.main else lambda _: None
        if config.method == "ppt":
            if corpus is None:
                raise UsageError("no text for method ppt: give --corpus DIR (*.txt or *.txt.xz)")
            with ranks.main_first():  # it writes what the others read
                tasks: Sequence[MixtureTask] = [
                    next_sentence_task(
                        Path(corpus),
                        backbone.tokenizer,
                        limit,
                        dev_limit=config.dev_limit,
                        seed=config.seed,
                        cache=Path(out) / "corpus",
                    )
                ]
        else:
            tasks = load_mixture(
                cards,
                Path(data) if data is not None else None,
                backbone.tokenizer,
                limit,
                dev_limit=config.dev_limit,
                rotated=config.rotated,
                shuffle_options=config.shuffle_options,
                seed=config.seed,
                log=say,
            )
        n_train = sum(len(t.train) for t in tasks)
        say(f"{len(tasks)} tasks, {n_train:,} training sequences")
        run = Pretrainer(
            backbone,
            tasks,
            config,
            Path(out),
            init=init,
            ranks=ranks,
            log=say,
            inputs=asdict(inputs.absolute()) if inputs else None,
        )
        return run.run()


def _check_memory(backbone: Backbone, config: PretrainConfig, device: torch.device) -> None:
    """Raise ``UsageError`` for prompts that cannot be trained in the device's whole memory."""
    if device.type == "cuda":
        there: int | None = torch.cuda.get_device_properties(device).total_memory
    else:
        there = memory_bytes()
    n_layers = backbone.config.n_layers if config.kind == "deep" else 1
    n_values = (
        n_layers * config.intrinsic_dim * (config.n_modules + config.prompt_tokens * backbone.config.hidden)
    )
    n_bytes = 4 * 4 * n_values  # float32: z and A, their gradients, Adam's two moments
    if there is not None and n_bytes > there:
        raise UsageError(
            f"modules {config.n_modules}, prompt_tokens {config.prompt_tokens} and intrinsic_dim "
            f"{config.intrinsic_dim} take {n_bytes / 2**30:,.0f} GiB to train over '{backbone.name}', and "
            f"{device} has {there / 2**30:,.0f} GiB: make one of them smaller"
        )


def pretrain_command(
    inputs: PretrainInputs,
    config: PretrainConfig,
    out: str,
    device: str,
    threads: int | None,
    *,
    resumed: bool = False,
    log: Callable[[str], None],
    show: Callable[[str], None],
) -> PretrainResult:
    """What ``mp2 pretrain`` does: resolve names, load, train, show the score table.

    Without task names, every task that has training data in the data folder. ``resumed``: the inputs are
    those that ``config.json`` in ``out`` names.
    """
    check_new_folder(Path(out))
    check_threads(threads)
    if threads:
        torch.set_num_threads(threads)
    if resumed:
        named = {name: getattr(inputs, name) for name in ("backbone", "data", "corpus", "init")}
        say_what_it_loads(Path(out), named, lambda line: log(f"mp2: {line}"))
    backbone = load_backbone(inputs.backbone, revision=inputs.revision)
    root = Path(inputs.data) if inputs.data else None
    cards = [load_card(name) for name in inputs.tasks]
    if not cards and config.method != "ppt":
        names = tasks_in(root)
        cards = [card for card in list_cards() if card.task in names]
        if not cards:
            raise UsageError("no task has training data; pass --data DIR (DIR/<task>/train.jsonl) or --tasks")
    twice = sorted({card.task for card in cards if sum(c.task == card.task for c in cards) > 1})
    if twice:
        raise UsageError(f"task '{twice[0]}' was given twice; give each task once")
    prompts = load_prompts(inputs.init) if inputs.init else None
    result = pretrain(
        cards,
        backbone,
        config,
        Path(out),
        data=root,
        corpus=inputs.corpus,
        init=prompts,
        device=device,
        log=log,
        inputs=inputs,
    )
    if is_main():
        show(score_table(result))
    return result


def asked_run(
    options: dict[str, Any], given: set[str], typed: str | None
) -> tuple[PretrainInputs, PretrainConfig, str]:
    """Inputs, settings and folder of the run that command-line ``options`` ask for; ``given`` were typed.

    Raises:
        UsageError: options that do not go together, or neither --out nor --resume.
    """
    options = dict(options)
    tasks = (*options.pop("names"), *options.pop("more"))
    names = ("backbone", "revision", "data", "corpus", "init")
    inputs = PretrainInputs(tasks=tasks, command=typed, **{name: options.pop(name) for name in names})
    out, resume = options.pop("out"), options.pop("resume")
    if resume:
        others = sorted(given - {"resume", "device", "threads"})
        if others:
            raise UsageError(
                "--resume takes all but --device and --threads from the run's config.json; "
                f"drop '{others[0].replace('_', '-')}'"
            )
        return (*saved_run(resume), resume)
    method = options["method"]
    wrong = PretrainConfig.not_of(method, given)
    of_tasks = given & {"names", "tasks", "more", "data"}
    wrong = sorted(of_tasks)[0] if method == "ppt" and of_tasks else wrong
    wrong = "corpus" if method != "ppt" and "corpus" in given else wrong
    if wrong is not None:
        flag = {"names": "tasks", "more": "tasks"}.get(wrong, wrong).replace("_", "-")
        raise UsageError(f"--{flag} was given, and method {method} has none: drop it")
    if "steps" not in given:
        options["steps"] = PRETRAIN_STEPS[method]
    if not out:
        raise UsageError("no folder: give --out DIR to write to, or --resume DIR to go on with a run")
    return inputs, PretrainConfig(**options), out


def saved_run(out: str) -> tuple[PretrainInputs, PretrainConfig]:
    """Inputs and settings of the run in a folder, for ``--resume``.

    Raises:
        UsageError: no run of ``mp2 pretrain`` there.
        FormatError: its ``config.json`` is damaged.
    """
    path = Path(out) / "config.json"
    if not path.is_file():
        raise UsageError(f"--resume: there is no {path}; give the --out folder of a run of 'mp2 pretrain'")
    raw = read_object(path)
    if "inputs" not in raw:
        raise FormatError("missing: not the settings of a run of 'mp2 pretrain'", path=path, field="inputs")
    inputs = build(PretrainInputs, raw.pop("inputs"), path, where="inputs")
    return inputs, build(PretrainConfig, raw, path)


def score_table(result: PretrainResult) -> str:
    """Dev scores before and after, a line a task, best gain first."""
    lines = [table(result.scores)]
    if result.skipped_steps:
        lines.append(f"{result.skipped_steps} steps had a non-finite loss and were skipped")
    return "\n".join(lines)
