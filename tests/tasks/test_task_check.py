from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mp2.backbone.tokenizer import Tokenizer
from mp2.cli import main
from mp2.tasks import FieldFormatter, MrcFormatter, TaskCard, check_task, load_card, load_examples
from mp2.tasks.check import Readings
from mp2.tasks.lengths import lengths

Write = Callable[[Path, Any], Path]


def readings(tokenizer: Tokenizer, max_tokens: int) -> Callable[[TaskCard], Readings]:
    def of(card: TaskCard) -> Readings:
        span = MrcFormatter(card, tokenizer, max_tokens)
        return Readings({"span": span}, span.fits)

    return of


@pytest.fixture
def user(tmp_path: Path, card_toml: dict[str, str], write_jsonl: Write) -> Path:
    """A user's card and good data; returns the folder that has both."""
    (tmp_path / "fruit.toml").write_text(card_toml["classification"], encoding="utf-8")
    lines = [{"text": f"今天{i}", "label": "abc"[i % 3]} for i in range(90)]
    write_jsonl(tmp_path / "fruit" / "train.jsonl", lines)
    write_jsonl(tmp_path / "fruit" / "test.jsonl", lines[:3])
    return tmp_path


def test_a_good_task_is_ok_and_summed_up(user: Path) -> None:
    report = check_task(str(user / "fruit.toml"), user)
    assert report.ok
    assert report.n_examples == {"train": 90, "test": 3}
    assert report.n_by_label["train"] == {"a": 30, "b": 30, "c": 30}
    assert report.remarks == ("3 of the test examples are also in train",)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_folder_in_a_files_place_is_called_that(user: Path, split: str) -> None:
    path = user / "fruit" / f"{split}.jsonl"
    path.unlink(missing_ok=True)
    path.mkdir()
    (fault,) = check_task(str(user / "fruit.toml"), user).faults
    assert str(fault) == f"{path}: is a folder, expected a file of data"


def test_every_fault_is_reported_with_its_line(user: Path, write_jsonl: Write) -> None:
    bad = [{"text": "x", "label": "z"}, "{", {"label": "a"}, {"text": "x", "label": "a"}]
    path = write_jsonl(user / "fruit" / "train.jsonl", bad)
    (user / "fruit" / "test.jsonl").unlink()
    write_jsonl(user / "fruit" / "dev.jsonl", [])
    report = check_task(str(user / "fruit.toml"), user, test=False)
    assert [(Path(p.path).name, p.line, p.field) for p in report.faults] == [
        (path.name, 1, "label"),
        (path.name, 2, None),
        (path.name, 3, "text"),
        ("dev.jsonl", None, None),
    ]
    assert report.n_examples == {"train": 1, "dev": 0}


def test_without_test_examples_a_task_is_refused_as_bbt_refuses_it(user: Path) -> None:
    (user / "fruit" / "test.jsonl").unlink()
    words = ["--data", str(user)]
    done = CliRunner().invoke(main, ["tasks", "check", str(user / "fruit.toml"), *words])
    tuned = CliRunner().invoke(main, ["bbt", "--task", str(user / "fruit.toml"), *words, "--head", "span"])
    assert (done.exit_code, tuned.exit_code) == (2, 2)
    (said,) = re.findall(r"task 'fruit' has no .*--no-test", tuned.stderr)
    assert said in done.stdout
    assert check_task(str(user / "fruit.toml"), user, test=False).ok
    done = CliRunner().invoke(main, ["tasks", "check", str(user / "fruit.toml"), *words, "--no-test"])
    assert done.exit_code == 0
    (user / "fruit" / "train.jsonl").unlink()
    (fault,) = check_task(str(user / "fruit.toml"), user, test=False).faults
    assert "train.jsonl" in str(fault)


def test_what_is_checked_is_what_the_runs_prompts_and_head_leave_room_for(user: Path) -> None:
    def check(*words: str) -> tuple[int, str]:
        card, data = str(user / "fruit.toml"), str(user)
        done = CliRunner().invoke(main, ["tasks", "check", card, "--data", data, *words])
        return done.exit_code, done.output

    assert check("--max-tokens", "512")[0] == 0
    code, said = check("--max-tokens", "512", "--shallow")
    assert code == 2
    assert re.search(r"max_tokens is 512, expected at most \d+ with shallow prompts", said)
    code, said = check("--prompts", "mini-deep", "--shallow")
    assert (code, "drop --shallow" in said) == (2, True)
    code, said = check("--prompts", "scratch-deep", "--head", "span")
    assert (code, "these prompts have no span head" in said) == (2, True)
    short = ("--max-tokens", "16")  # no room for the options, but for the text alone
    assert check(*short, "--head", "span")[0] == 2
    assert check(*short)[0] == check(*short, "--prompts", "scratch-deep")[0] == 0
    assert check(*short, "--head", "ridge")[0] == 0


def test_the_command_exits_0_or_2_and_prints_the_report(user: Path, write_jsonl: Write) -> None:
    card = str(user / "fruit.toml")
    done = CliRunner().invoke(main, ["tasks", "check", card, "--data", str(user)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "no faults")
    path = write_jsonl(user / "fruit" / "test.jsonl", [{"text": "", "label": "q"}])
    done = CliRunner().invoke(main, ["tasks", "check", card, "--data", str(user)])
    assert done.exit_code == 2
    assert f"{path}:1: field 'text': empty" in done.output
    assert f"{path}:1: field 'label': unknown label 'q'; the card knows a, b, c" in done.output
    assert done.output.splitlines()[-1] == "2 faults"
    done = CliRunner().invoke(main, ["tasks", "check", card, "--data", str(user), "--json"])
    assert done.exit_code == 2
    assert [p["field"] for p in json.loads(done.output)["faults"]] == ["text", "label"]


def test_a_bad_card_is_reported_whole_before_its_data(user: Path) -> None:
    path = user / "fruit.toml"
    path.write_text('task = "fruit"\ntype = "sorting"\n', encoding="utf-8")
    done = CliRunner().invoke(main, ["tasks", "check", str(path), "--data", str(user)])
    assert done.exit_code == 2
    assert f"{path}:2: field 'type': got 'sorting'" in done.output
    assert "the data is checked once the card is right" in done.output
    assert done.output.splitlines()[-1] == "6 faults"


def test_fewer_examples_than_shots_are_remarks_and_fewer_than_two_a_fault(
    user: Path, write_jsonl: Write
) -> None:
    write_jsonl(user / "fruit" / "train.jsonl", [{"text": f"好{i}", "label": "abc"[i % 3]} for i in range(9)])
    report = check_task(str(user / "fruit.toml"), user)
    assert report.ok
    assert any("3 of 1" in remark and "with label 'a'" in remark for remark in report.remarks)
    assert any("no dev set: train takes 9 of 9 examples" in remark for remark in report.remarks)
    write_jsonl(user / "fruit" / "train.jsonl", [{"text": f"好{i}", "label": "abc"[i % 3]} for i in range(5)])
    (fault,) = check_task(str(user / "fruit.toml"), user).faults
    assert "too few different training examples: 1 with label 'c'; expected at least 2 of each" in str(fault)


def test_a_repeated_fault_is_one_line_with_a_count_and_three_places(user: Path, write_jsonl: Write) -> None:
    lines = [{"text": f"好{i}", "label": "no" if i % 2 else "a"} for i in range(100)]
    path = write_jsonl(user / "fruit" / "train.jsonl", [*lines, {"text": "好", "label": 7}, {"text": "好"}])
    report = check_task(str(user / "fruit.toml"), user)
    assert len(report.faults) == 52
    first, second, third, *rest = str(report).splitlines()
    assert first == (
        f"{path}:2: field 'label': unknown label 'no'; the card knows a, b, c (51 such lines, first 2, 4, 6)"
    )
    assert second == f"{path}:102: field 'label': missing; expected one of a, b, c"
    assert "fruit: classification" in third
    assert rest[-1] == "52 faults of 2 kinds"


def test_long_values_are_shown_shortened(user: Path, write_jsonl: Write) -> None:
    write_jsonl(user / "fruit" / "train.jsonl", [{"text": "好", "label": "x" * 5000}])
    assert all(len(line) < 300 for line in str(check_task(str(user / "fruit.toml"), user)).splitlines())


def test_what_a_backbone_cuts_is_said_and_what_it_cannot_spell_is_a_fault(
    user: Path, write_jsonl: Write, tokenizer: Tokenizer
) -> None:
    lines = [{"text": f"{'今' * (60 if i % 3 else 5)}{i:02}", "label": "abc"[i % 3]} for i in range(90)]
    write_jsonl(user / "fruit" / "train.jsonl", lines)
    card = user / "fruit.toml"
    report = check_task(str(card), user, readings=readings(tokenizer, 40))
    assert report.ok
    assert any(
        "67 % of the train texts are too long and are cut to 40, half of them by" in r for r in report.remarks
    )
    card.write_text(card.read_text(encoding="utf-8").replace("房", "龘"), encoding="utf-8")
    (fault,) = check_task(str(card), user, readings=readings(tokenizer, 40)).faults
    assert "cannot spell the label words '龘' (c)" in str(fault)
    (fault,) = check_task(str(card), user, readings=readings(tokenizer, 20)).faults


def test_each_head_that_auto_may_take_has_its_own_cuts(user: Path, write_jsonl: Write) -> None:
    lines = [{"text": f"{'今天' * 15}{i:02}", "label": "abc"[i % 3]} for i in range(90)]
    write_jsonl(user / "fruit" / "train.jsonl", lines)
    write_jsonl(user / "fruit" / "test.jsonl", [line | {"text": "今天" * 30} for line in lines])

    def notes(*words: str) -> list[str]:
        card = ["tasks", "check", str(user / "fruit.toml"), "--data", str(user), "--max-tokens", "45"]
        done = CliRunner().invoke(main, [*card, *words])
        assert done.exit_code == 0, done.output
        return re.findall(r"note: (.*(?:head|are cut|is cut).*)", done.output)

    known, *cuts = notes()
    assert known.startswith("which head reads the texts is known when the run starts")
    assert [re.sub(r", half.*", "", line) for line in cuts] == [
        "head span: 100 % of the train texts are too long and are cut to 45",
        "head span: 100 % of the test texts are too long and are cut to 45",
        "head ridge: no train text is cut",
        "head ridge: 100 % of the test texts are too long and are cut to 45",
    ]
    assert [line[:36] for line in notes("--head", "ridge")] == ["100 % of the test texts are too long"]
    known, *cuts = notes("--prompts", "scratch-deep")  # no span head
    assert [line.partition(":")[0] for line in cuts] == ["head ridge"] * 2 + ["head mlm"] * 2


def test_options_that_do_not_fit_are_counted(
    tmp_path: Path, card_toml: dict[str, str], write_jsonl: Write, tokenizer: Tokenizer
) -> None:
    (tmp_path / "pick.toml").write_text(card_toml["multiple_choice"], encoding="utf-8")
    lines = [
        {"context": f"今{i}", "question": "好", "options": ["一", "二" * (99 if i < 7 else 3)], "label": 0}
        for i in range(40)
    ]
    write_jsonl(tmp_path / "pick" / "train.jsonl", lines)
    report = check_task(str(tmp_path / "pick.toml"), tmp_path, readings=readings(tokenizer, 60), test=False)
    assert any("7 of 40 train examples do not fit 60 tokens" in r for r in report.remarks)
    write_jsonl(tmp_path / "pick" / "train.jsonl", lines[:7])
    (fault,) = check_task(
        str(tmp_path / "pick.toml"), tmp_path, readings=readings(tokenizer, 60), test=False
    ).faults
    assert "too few different training examples: 0" in str(fault)


def test_without_data_only_the_card_is_checked(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MP2_DATA", raising=False)
    report = check_task(str(user / "fruit.toml"))
    assert report.ok
    assert report.remarks == ("no data was checked; --data DIR (or MP2_DATA) names it",)


def test_every_card_of_the_package_is_fine() -> None:
    from mp2.tasks import card_names
    from mp2.tasks.card import CARDS_DIR, read_card
    from mp2.tasks.faults import AllFaults

    for name in card_names():
        faults = AllFaults()
        assert read_card(CARDS_DIR / f"{name}.toml", faults), faults.found


def test_an_unknown_card_exits_2_with_the_nearest_name() -> None:
    done = CliRunner().invoke(main, ["tasks", "check", "tnew"])
    assert done.exit_code == 2
    assert "Did you mean 'tnews'" in done.output


def test_faults_of_one_kind_are_one_line_whatever_they_show(
    tmp_path: Path, card_toml: dict[str, str], write_jsonl: Write
) -> None:
    (tmp_path / "fruit.toml").write_text(card_toml["classification"], encoding="utf-8")
    odd: list[Any] = ['it\'s "odd"', "x" * 99, 3, 2.5, None, True, ["a", {"k": "v'"}], {"k": ["…"]}, "'"]
    lines: list[dict[str, Any]] = []
    for i, value in enumerate(10 * odd):
        varied = f"{value}{i}" * 9 if isinstance(value, str) else value
        lines += [{"text": "今天", "label": varied}, {"text": value if value != "'" else 4, "label": "a"}]
        lines += [{f"key{'abcdefgh'[i % 8]}": varied, "label": "a"}]
    write_jsonl(tmp_path / "fruit" / "train.jsonl", lines)
    shown = str(check_task(str(tmp_path / "fruit.toml"), tmp_path, test=False)).splitlines()
    counts = [int(n) for line in shown for n in re.findall(r"\((\d+) such lines", line)]
    # unknown labels, missing texts, values that are no texts, values that are no labels
    assert counts == [50, 90, 70, 40]
    assert shown[-1] == f"{sum(counts)} faults of {len(counts)} kinds"
    assert all(len(line) < 300 for line in shown)


def test_options_that_leave_no_room_in_any_test_example_are_refused_as_bbt_does(
    tmp_path: Path, card_toml: dict[str, str], write_jsonl: Write
) -> None:
    (tmp_path / "pick.toml").write_text(card_toml["multiple_choice"], encoding="utf-8")
    short = {"context": "天", "question": "天", "options": ["今", "明"], "label": 0}
    write_jsonl(tmp_path / "pick" / "train.jsonl", [short | {"context": "天" * i} for i in range(1, 80)])
    write_jsonl(tmp_path / "pick" / "test.jsonl", [short | {"options": ["今" * 60, "明" * 60]}])
    vocab = Tokenizer.from_vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今明天选项：；。，？“”"])
    report = check_task(str(tmp_path / "pick.toml"), tmp_path, readings=readings(vocab, 90))
    assert [fault.message for fault in report.faults] == ["no test example of 'pick' fits 90 tokens"]


def test_more_tokens_than_the_backbone_has_are_refused() -> None:
    done = CliRunner().invoke(main, ["tasks", "check", "demo_topic", "--max-tokens", "9999"])
    assert done.exit_code == 2
    assert "max_tokens is 9999, expected at most 512" in done.output


def test_many_labels_are_summed_up(tmp_path: Path, card_toml: dict[str, str], write_jsonl: Write) -> None:
    text = card_toml["classification"]
    labels = "\n".join(f'l{i} = "词{i}"' for i in range(30))
    (tmp_path / "fruit.toml").write_text(text[: text.index("[labels]")] + f"[labels]\n{labels}\n", "utf-8")
    lines = [{"text": f"今天{i} {n}", "label": f"l{i}"} for i in range(30) for n in range(2 + i)]
    write_jsonl(tmp_path / "fruit" / "train.jsonl", lines)
    shown = str(check_task(str(tmp_path / "fruit.toml"), tmp_path, test=False))
    assert "  train: 30 labels of 2 to 31; fewest: l0 2, l1 3, l2 4, l3 5, l4 6\n" in shown


def test_lengths_are_those_of_what_a_head_reads(user: Path, tokenizer: Tokenizer) -> None:
    card = load_card(user / "fruit.toml")
    examples = [replace(e, fields={"text": "今" * 60}) for e in load_examples(card, "train", user)[:4]]
    bare = lengths(card, tokenizer, 40, examples, FieldFormatter)
    assert bare is not None
    assert (bare.n_long, bare.median, bare.median_lost) == (4, 62, 22)  # [CLS] text [SEP]
    written = lengths(card, tokenizer, 40, examples)
    assert written is not None
    assert written.median > bare.median
