"""What is typed wrong, option by option: exit 2 and one line that names it, before anything is made."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import mp2
from tuning_world import World, make_world

from mp2.backbone import Backbone

HUGE = 2**70


@dataclass(frozen=True)
class Places:
    """A world of good files, and bad ones beside it."""

    world: World
    root: Path

    def options(self, command: str) -> list[str]:
        """Arguments of a command that is good, but for what a test adds; an option given again wins."""
        world = self.world
        model = ["--backbone", world.backbone, "--threads", 1]
        task = [
            "--task",
            world.card,
            "--data",
            world.data,
            "--prompts",
            world.deep,
            "--shots",
            4,
            "--no-test",
        ]
        sizes = ["--modules", 4, "--prompt-tokens", 3, "--intrinsic-dim", 5, "--max-tokens", 64]
        shape = ["--layers", 2, "--hidden", 16, "--heads", 2, "--vocab-size", 200, "--max-positions", 32]
        run = ["--batch-size", 8, "--steps", 2]
        out = ["--out", self.root / "new"]
        good: dict[str, list[object]] = {
            "bbt": [*model, *task, "--iters", 8, *out],
            "tune": [*model, *task, "--epochs", 4, *out],
            "scratch": ["--backbone", world.backbone, "--like", world.deep, *out],
            "export": ["--backbone", world.backbone, *out],
            "pretrain": [*model, "--tasks", world.card, "--data", world.data, *sizes, *run, *out],
            "pretrain-backbone": ["--corpus", self.root / "corpus", *shape, "--length", 16, *run, *out],
            "predict": ["--run", self.root / "no-run", "--input", self.root / "good.txt"],
            "tasks show": [world.card],
            "tasks check": [world.card],
        }
        return [*command.split(), *map(str, good[command])]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Places:
    root = tmp_path_factory.mktemp("places")
    world = make_world(root, tiny_backbone)
    for name in ("corpus", "empty", "not-text", "not-xz", "no-words", "no-test"):
        (root / name).mkdir()
    (root / "corpus" / "a.txt").write_text("天气今日晴有雨！\n" * 100, "utf-8")
    (root / "not-text" / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (root / "not-xz" / "a.txt.xz").write_bytes(b"no archive")
    (root / "no-words" / "a.txt").write_text("\n\n", "utf-8")
    (root / "folders" / "a.txt").mkdir(parents=True)
    (root / "folder-in-place" / "mood" / "train.jsonl").mkdir(parents=True)
    (root / "good.txt").write_text("真的很好\n", "utf-8")
    (root / "noise.bin").write_bytes(random.Random(0).randbytes(300))
    (root / "half.toml").write_text('task = "half"\n', "utf-8")
    (root / "no.toml.toml").write_text("task = \n", "utf-8")
    for name, text in (
        ("no-examples", ""),
        ("no-json", "hello\n"),
        ("long-number", '{"text": "好", "label": %s}\n' % ("9" * 5000)),
        ("no-label", '{"text": "好", "label": "pos"}\n{"text": "好", "label": "poss"}\n'),
    ):
        (root / name / "mood").mkdir(parents=True)
        for split in ("train", "dev"):
            (root / name / "mood" / f"{split}.jsonl").write_text(text, "utf-8")
    (root / "no-test" / "mood").mkdir()
    (root / "no-test" / "mood" / "train.jsonl").write_bytes(
        (world.data / "mood" / "train.jsonl").read_bytes()
    )
    return Places(world, root)


TUNING: list[tuple[list[object], str]] = [
    (["--task", "moood"], "unknown task 'moood'"),
    (["--task", "chnsentt"], "Did you mean 'chnsent'"),
    (["--task", "ROOT/nowhere.toml"], "there is no task card"),
    (["--task", "ROOT/half.toml"], "half.toml: field 'family': missing"),
    (["--data", "ROOT/nowhere"], "--data: there is no file or folder"),
    (["--data", "ROOT/empty"], "empty has no folder 'mood'"),
    (["--data", "ROOT/no-examples"], "the train data of task 'mood' is empty"),
    (["--data", "ROOT/no-json"], "train.jsonl:1: not JSON"),
    (
        ["--data", "ROOT/long-number"],
        "train.jsonl:1: not JSON that can be read: a number has too many digits",
    ),
    (["--data", "ROOT/no-label"], "train.jsonl:2: field 'label': unknown label 'poss'"),
    (["--backbone", "mimi"], "unknown backbone 'mimi'. Did you mean 'mini'"),
    (["--backbone", "ROOT/empty"], "config.json: no such file"),
    (["--data", "ROOT/folder-in-place"], "train.jsonl is a folder, expected a file of data"),
    (["--prompts", "mini-dep"], "unknown prompts 'mini-dep'. Did you mean 'mini-deep'"),
    (["--prompts", "mini-deep"], "these prompts are for a 6-layer backbone"),
    (["--prompts", "ROOT/noise.bin"], "noise.bin: not a safetensors file"),
    (["--prompts", "ROOT/tiny/model.safetensors"], "this is not a prompt file of mp2"),
    (["--shallow"], "drop --shallow"),
    (["--seed", -1], "seed is -1"),
    (["--seed", HUGE], f"seed is {HUGE}"),
    (["--seeds", "8;9"], "--seeds is '8;9'"),
    (["--seed", 8, "--seeds", "8,9"], "--seed and --seeds were both given"),
    (["--shots", 0], "shots is 0"),
    (["--max-tokens", 5], "does not fit 5 tokens"),
    (["--max-tokens", 97], "max_tokens is 97, expected at most 96"),
    (["--device", "cdua"], "unknown device 'cdua'. Did you mean 'cuda'"),
    (["--device", "cpu:3"], "unknown device 'cpu:3'. Did you mean 'cpu'"),
    (["--threads", 0], "threads is 0, expected 1 to"),
    (["--threads", 100_000], "threads is 100000, expected 1 to"),
    (["--test-limit", 0], "test_limit is 0"),
    (["--test-limit", 5], "drop --test-limit or --no-test"),
    (["--deep", "--shallow"], "--deep and --shallow were both given"),
    (["--out", "ROOT/good.txt"], "good.txt"),
]
CASES: dict[str, list[tuple[list[object], str]]] = {
    "bbt": [
        *TUNING,
        (["--iters", 0], "iters is 0"),
        (["--iters", HUGE], f"iters is {HUGE}, expected at most 10,000,000"),
        (["--popsize", 10_001], "popsize is 10001, expected 3 to 10,000"),
        (["--popsize", 9, "--router-iters", 4], "popsize is 9, but stage II has 4 of the 8 iterations"),
        *(
            (["--router-only", option, value], f"--router-only has no stage II, which {option} is for")
            for option, value in (
                ("--popsize", 20),
                ("--cma", "full"),
                ("--sigma-input", 0.05),
                ("--sigma-deep", 0.2),
                ("--sigma-shallow", 0.1),
            )
        ),
        (["--router-iters", 0], "router_iters is 0"),
        (["--router-iters", 9], "router_iters is 9, expected at most 8"),
        (["--router-search", "bit"], "unknown router search method 'bit'. Did you mean 'bits'"),
        (["--router-search", "none", "--router-iters", 4], "there is no stage I"),
        (["--router-search", "none", "--router-only"], "leaves nothing to search"),
        (["--router-search", "exhaustive"], "exhaustive search needs 2^12 iterations"),
        (["--popsize", 1], "popsize is 1"),
        (["--cma", "ful"], "Did you mean 'full'"),
        (["--sigma-input", "inf"], "sigma_input is inf"),
        (["--sigma-deep", "nan"], "sigma_deep is nan"),
        (["--sigma-shallow", 0], "sigma_shallow is 0"),
        (["--engine", "ROOT/nowhere"], "nowhere: no manifest.json there"),
        (["--engine", "ROOT/empty"], "empty: no manifest.json there"),
        (["--runtime", "troch"], "unknown runtime 'troch'. Did you mean 'torch'"),
        (["--precision", "fp31"], "unknown precision 'fp31'. Did you mean 'fp32'"),
        (["--precision", "fp8", "--device", "cpu"], "unknown precision 'fp8'"),
        (["--resume", "ROOT/empty"], "drop --"),
        (["--resume", "ROOT/empty", "--deep"], "drop --"),
        (["--itres", 3], "No such option '--itres'"),
    ],
    "tune": [
        *TUNING,
        (["--epochs", 1], "epochs is 1"),
        (["--router-epochs", 5], "router_epochs is 5"),
        (["--router-lr", "nan"], "router_lr is nan"),
        (["--prompt-lr", 0], "prompt_lr is 0"),
        (["--prompt-lr", 0.1, "--router-only"], "there is no stage II (--router-only)"),
        (["--router-lr", 0.1, "--router-epochs", 0], "there is no stage I (router_epochs is 0)"),
        (["--batch-size", 0], "batch_size is 0"),
        (["--injection", "inlin"], "unknown injection 'inlin'. Did you mean 'inline'"),
    ],
    "scratch": [
        (["--backbone", "mimi"], "unknown backbone 'mimi'"),
        (["--like", "mini-dep"], "Did you mean 'mini-deep'"),
        (["--like", "mini-deep"], "these prompts are for a 6-layer backbone"),
        (["--seed", -1], "seed is -1"),
        (["--seed", HUGE], f"seed is {HUGE}"),
        (["--out", "ROOT/good.txt/x"], "good.txt is a file, expected a folder"),
        (["--out", ""], "--out is empty"),
    ],
    "export": [
        (["--backbone", "mimi"], "unknown backbone 'mimi'"),
        (
            ["--precision", "fp16", "--prompts", "mini-deep"],
            "these prompts are for a 6-layer backbone",
        ),
        (["--prompts", "mini-deep"], "and --prompts are for --precision fp16"),
        (["--runtime", "onnx"], "unknown runtime 'onnx'. Did you mean 'onnxruntime'"),
        (["--precision", "fp17"], "unknown precision 'fp17'. Did you mean 'fp16'"),
        (["--precision", "fp16", "--popsize", 0], "popsize is 0"),
        (["--data", "ROOT/nowhere"], "--data is read for a --task only"),
        (["--task", "mood"], "--task, --popsize and --prompts are for --precision fp16"),
        (["--popsize", 20], "--task, --popsize and --prompts are for --precision fp16"),
        (["--out", "ROOT/good.txt/x"], "good.txt is a file, expected a folder"),
        (["--out", "ROOT/corpus"], "corpus is not empty and not an engine folder"),
    ],
    "pretrain": [
        (["--tasks", "moood"], "unknown task 'moood'"),
        (["find.tml"], "unknown task 'find.tml'"),
        (["--data", "ROOT/nowhere"], "--data: there is no file or folder"),
        (["--data", "ROOT/no-label"], "train.jsonl:2: field 'label': unknown label 'poss'"),
        (["--data", "ROOT/no-test"], "has no"),
        (
            ["--init", "mini-deep"],
            "--init prompts are for 6 layers of hidden size 256, backbone 'tiny' has 3",
        ),
        (
            ["--init", "ROOT/deep.safetensors", "--modules", 5],
            "--init prompts have (K, m, d, kind) = (4, 3, 5",
        ),
        (["--modules", 0], "modules is 0"),
        (["--shallow", "--prompt-tokens", 96], "prompt_tokens is 96, expected less than the 96 positions"),
        (["--prompt-tokens", 100_000], "prompt_tokens is 100000, expected less than the 96 positions"),
        (["--intrinsic-dim", 10**12], "and intrinsic_dim 1000000000000 take"),
        (["--modules", 10**12], "modules 1000000000000, prompt_tokens 3"),
        (["--router-lr", "nan"], "router_lr is nan"),
        (["--temperature", "inf"], "temperature is inf"),
        (["--checkpoint-minutes", "inf"], "checkpoint_minutes is inf"),
        (["--router-inference", "sof"], "unknown router inference 'sof'. Did you mean 'soft'"),
        (["--shallow", "--injection", "prefix"], "drop --injection"),
        (["--shallow", "--deep"], "--deep and --shallow were both given"),
        (["--seed", HUGE], f"seed is {HUGE}"),
        (["--threads", -1], "threads is -1"),
        (["--device", "cpu:1"], "unknown device 'cpu:1'"),
        (["--out", "ROOT/good.txt/x"], "good.txt is a file, expected a folder"),
        (["--resume", "ROOT/empty"], "drop '"),
    ],
    "pretrain-backbone": [
        (["--corpus", "ROOT/nowhere"], "there is no folder"),
        (["--corpus", "ROOT/folders"], "no *.txt or *.txt.xz files"),
        (["--layers", 0], "layers is 0, expected at least 1"),
        (["--hidden", 15], "hidden is 15, expected a multiple of the 2 heads"),
        (["--length", 2], "length is 2, expected at least 3"),
        (["--lr", "inf"], "lr is inf, expected 0 < rate < 1"),
        (["--masking", "chars"], "unknown masking 'chars'. Did you mean 'char'"),
        (["--seed", -1], "seed is -1"),
        (["--threads", 0], "threads is 0"),
        (["--checkpoint-minutes", "nan"], "checkpoint_minutes is nan"),
        (["--out", "ROOT/good.txt/x"], "good.txt is a file, expected a folder"),
    ],
    "predict": [
        (["--run", "ROOT/empty"], "is not a run folder"),
        (["--inptu", "x"], "No such option '--inptu'"),
    ],
    "tasks show": [
        (["--data", "ROOT/nowhere"], "--data: there is no file or folder"),
        (["--backbone", "mimi"], "Did you mean 'mini'"),
    ],
    "tasks check": [(["--data", "ROOT/nowhere"], "--data: there is no file or folder")],
}


@pytest.mark.parametrize(
    ("command", "more", "expected"),
    [(command, *case) for command, cases in CASES.items() for case in cases],
    ids=lambda x: " ".join(map(str, x))[:60] if isinstance(x, list) else None,
)
def test_one_line_says_what_was_typed_wrong(
    places: Places, command: str, more: list[object], expected: str
) -> None:
    before = sorted(places.root.rglob("*"))
    words = [str(word).replace("ROOT", str(places.root)) for word in more]
    done = mp2(*places.options(command), *words)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2
    assert expected in done.stderr.splitlines()[-1]
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage: ", "Try "))]
    assert len(lines) == 1
    assert sorted(places.root.rglob("*")) == before


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--corpus", "ROOT/not-text"], "a.txt: not UTF-8 text"),
        (["--corpus", "ROOT/not-xz"], "a.txt.xz: not UTF-8 text"),
        (["--corpus", "ROOT/no-words"], "corpus has 0 sequences, expected at least one batch of 8"),
        (["--vocab-size", "10"], "--vocab-size 10, expected more than"),
    ],
)
def test_a_corpus_or_vocabulary_that_will_not_do_is_named_and_leaves_nothing(
    places: Places, tmp_path: Path, words: list[str], expected: str, there: bool
) -> None:
    out = tmp_path / "deep" / "new"
    if there:
        out.mkdir(parents=True)
        (out / "notes").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    typed = [word.replace("ROOT", str(places.root)) for word in words]
    done = mp2(*places.options("pretrain-backbone"), *typed, "--out", out)
    assert done.exit_code == 2
    assert expected in done.stderr.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "backbone", "expected"),
    [
        ("bbt", "cpt-larg", "unknown backbone 'cpt-larg'. Did you mean 'cpt-large'"),
        ("tune", "cpt-larg", "unknown backbone 'cpt-larg'. Did you mean 'cpt-large'"),
        ("tune", "cpt-large", "no prompts were named for backbone 'cpt-large': give --prompts FILE"),
        ("tune", "ROOT/tiny", "tiny': give --prompts FILE"),
    ],
)
def test_a_backbone_without_prompts_is_first_looked_up(
    places: Places, command: str, backbone: str, expected: str
) -> None:
    name = backbone.replace("ROOT", str(places.root))
    done = mp2(command, "--task", "demo_sentiment", "--backbone", name, "--out", places.root / "new")
    assert done.exit_code == 2
    assert expected in done.stderr


@pytest.mark.parametrize("command", ["bbt", "tune"])
def test_missing_test_data_are_found_before_tuning(places: Places, tmp_path: Path, command: str) -> None:
    options = [word for word in places.options(command) if word != "--no-test"]
    words = ["--data", str(places.root / "no-test"), "--out", str(tmp_path / "new")]
    done = mp2(*options, *words)
    assert done.exit_code == 2
    assert "task 'mood' has no" in done.stderr
    assert "test.jsonl" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("half.toml", "field 'family': missing"),
        ("no.toml.toml", "not TOML"),
        ("nowhere.toml", "there is no task card"),
    ],
)
@pytest.mark.parametrize("command", ["show", "check"])
def test_a_bad_card_is_named(places: Places, command: str, card: str, expected: str) -> None:
    done = mp2("tasks", command, places.root / card)
    assert done.exit_code == 2
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["pretrain", "pretrain-backbone"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a training checkpoint"),
        (b"\0junk" * 99, "not a training checkpoint"),
        (None, "it has no training state"),
    ],
    ids=["empty", "junk", "another-file"],
)
def test_a_bad_checkpoint_is_named(
    places: Places, tmp_path: Path, command: str, content: bytes | None, expected: str
) -> None:
    options = [*places.options(command), "--out", str(tmp_path / "run")]
    if command == "pretrain":
        options += ["--data", str(places.root / "dev")]
        _with_dev(places)
    (tmp_path / "run").mkdir()
    name = "checkpoint.safetensors" if command == "pretrain" else "mlm_checkpoint.safetensors"
    other = (places.world.backbone / "model.safetensors").read_bytes()
    (tmp_path / "run" / name).write_bytes(other if content is None else content)
    done = mp2(*options)
    assert done.exit_code == 2
    assert name in done.stderr.splitlines()[-1]
    assert expected in done.stderr.splitlines()[-1]


def _with_dev(places: Places) -> None:
    """A data folder with the world's test data as dev."""
    folder = places.root / "dev" / "mood"
    if not folder.exists():
        folder.mkdir(parents=True)
        for split, source in (("train", "train"), ("dev", "test")):
            data = (places.world.data / "mood" / f"{source}.jsonl").read_bytes()
            (folder / f"{split}.jsonl").write_bytes(data)
