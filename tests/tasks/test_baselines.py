from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from mp2.tasks import Answer, Example, TaskCard
from mp2.tasks.baseline_models import TfIdf, fitted_logistic, standardised
from mp2.tasks.baselines import Baseline, baselines, verdict
from tests.command_line import mp2, mp2_json

MakeCard = Callable[..., TaskCard]

NAMES = {"a": "球 赛 进 攻 守", "b": "钱 股 市 涨 跌", "c": "楼 盘 卖 租 门"}


def texts(label: str, n: int, seed: int) -> list[Example]:
    """Texts of five characters, three of which are the label's own."""
    rng = np.random.default_rng((seed, ord(label)))
    own, any_ = NAMES[label].split(), [f"{chr(0x4E00 + i)}" for i in range(30)]
    return [Example({"text": "".join([*rng.choice(own, 3), *rng.choice(any_, 2)])}, label) for _ in range(n)]


def labelled(n: int, seed: int) -> list[Example]:
    return [e for label in NAMES for e in texts(label, n, seed)]


def one_hot_states(inputs: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Stand-in encoder: how often each label's own characters stand in the input."""
    return np.array([[sum(c in "".join(i) for c in own) for own in NAMES.values()] for i in inputs], float)


def test_on_an_easy_task_text_and_probe_are_right_and_majority_is_a_third(make_card: MakeCard) -> None:
    found = baselines(
        make_card("classification"),
        labelled(8, 1),
        {"dev": labelled(8, 2), "test": labelled(50, 3)},
        one_hot_states,
    )
    by_key = {line.key: line for line in found}
    assert by_key["majority"].scores == {"dev": pytest.approx(1 / 3), "test": pytest.approx(1 / 3)}
    assert by_key["tfidf"].scores["test"] > 0.9
    assert by_key["probe"].scores["test"] == 1.0


def test_the_majority_class_is_the_training_sets(make_card: MakeCard) -> None:
    train = [*texts("b", 3, 1), *texts("a", 2, 1), *texts("c", 2, 1)]
    majority = baselines(make_card("classification"), train, {"test": texts("b", 9, 2)})[0]
    assert majority.scores == {"test": 1.0}


def test_without_states_the_probe_says_why_there_is_none(make_card: MakeCard) -> None:
    probe = baselines(make_card("classification"), labelled(4, 1), {"dev": labelled(2, 2)})[-1]
    assert (probe.key, probe.scores, probe.note) == ("probe", {}, "no backbone was given")


def test_reduced_features_give_the_decisions_of_scikit_learns_own_pipeline() -> None:
    train, test = labelled(10, 4), labelled(40, 5)
    words = [[e.fields["text"] for e in part] for part in (train, test)]
    labels = [str(e.label) for e in train]
    ours = TfIdf(words[0])
    model = fitted_logistic(ours.train, labels)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
    plain = LogisticRegression(C=model.strength, max_iter=10_000, tol=1e-8)
    plain.fit(vectorizer.fit_transform(words[0]), labels)
    assert list(plain.predict(vectorizer.transform(words[1]))) == model.labels(ours(words[1]))
    np.testing.assert_allclose(ours.train @ ours.train.T, (lambda x: (x @ x.T).toarray())(
        vectorizer.transform(words[0])), atol=1e-9)  # fmt: skip


def test_a_single_label_or_one_example_a_label_needs_no_folds() -> None:
    features = np.eye(3)
    assert fitted_logistic(features, ["a", "a", "a"]).labels(features) == ["a", "a", "a"]
    assert fitted_logistic(features, ["a", "b", "c"]).labels(features) == ["a", "b", "c"]


def test_a_constant_state_is_no_division_by_zero() -> None:
    scale, rows = standardised(np.array([[1.0, 5.0], [3.0, 5.0]], np.float32))
    np.testing.assert_array_equal(rows, [[-1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(scale(np.array([[2.0, 5.0]])), [[0.0, 0.0]])


def choice(right: int, n: int = 3) -> Example:
    options = tuple("天气很好" if i == right else f"{chr(0x4E00 + 10 * i)}" * 4 for i in range(n))
    return Example({"context": "今天天气很好", "question": "怎样"}, right, options)


def test_multiple_choice_has_an_index_a_similarity_and_a_probe_on_pairs(make_card: MakeCard) -> None:
    train = [choice(2), choice(2), choice(0), choice(1)]
    tests = [choice(i) for i in (0, 1, 2, 1)]

    def states(inputs: Sequence[tuple[str, ...]]) -> np.ndarray:
        return np.array([["天" in "".join(i), len(i)] for i in inputs], float)

    found = {
        line.key: line.scores
        for line in baselines(make_card("multiple_choice"), train, {"test": tests}, states)
    }
    assert found == {"majority": {"test": 0.25}, "tfidf": {"test": 1.0}, "probe": {"test": 1.0}}


def test_a_majority_index_beyond_the_options_is_the_last_one(make_card: MakeCard) -> None:
    tests = [choice(1, n=2)]
    majority = baselines(make_card("multiple_choice"), [choice(2), choice(2)], {"test": tests})[0]
    assert majority.scores == {"test": 1.0}


def find(context: str, question: str, answer: str) -> Example:
    answers = (Answer(answer, context.index(answer)),) if answer else ()
    return Example({"context": context, "question": question}, None, (), answers)


def test_extraction_has_the_whole_context_and_the_clause_nearest_to_the_question(make_card: MakeCard) -> None:
    train = [find("小王在北京，小李在上海。", "小李在哪", "上海")]
    tests = [find("天气很好。看电影吃饭", "电影怎样", "看电影吃饭")]
    found = {line.key: line for line in baselines(make_card("extraction"), train, {"test": tests})}
    assert found["nearest"].scores == {"test": 1.0}
    assert found["whole_context"].scores["test"] == pytest.approx(2 * 5 / (9 + 5))
    assert "span" in str(found["probe"].note)
    assert "no_answer" not in found


def test_without_questions_the_clause_nearest_to_the_training_answers_is_taken(make_card: MakeCard) -> None:
    train = [find("我们去小吃街，好", "", "小吃街"), find("一二三，大吃街", "", "大吃街")]
    nearest = baselines(make_card("extraction"), train, {"test": [find("上下，好吃街，不是", "", "好吃街")]})[
        1
    ]
    assert nearest.scores == {"test": 1.0}


def test_where_questions_may_have_no_answer_that_is_a_baseline(make_card: MakeCard) -> None:
    card = make_card("extraction", ("version = 1", "version = 1\nunanswerable = true"))
    tests = [find("一二", "三", ""), find("一二", "三", "一")]
    first = baselines(card, [find("一二", "三", "二")], {"test": tests})[0]
    assert (first.key, first.scores) == ("no_answer", {"test": 0.5})


LINES = [
    Baseline("majority", "majority class", {"test": 0.5}),
    Baseline("tfidf", "TF-IDF + logistic regression", {"test": 0.8}),
    Baseline("probe", "linear probe", {}, "no backbone was given"),
]


def test_a_result_at_or_below_a_baseline_is_said_in_words() -> None:
    assert verdict("accuracy", "test", 0.81, LINES) is None
    text = verdict("accuracy", "test", 0.8, LINES)
    assert text is not None
    assert text.startswith(
        "test accuracy 80.0 is not better than TF-IDF + logistic regression (80.0); what to try:"
    )
    text = verdict("accuracy", "test", 0.5, LINES)
    assert text is not None
    assert "majority class (50.0) or TF-IDF" in text
    assert "mp2 tasks check" in text
    assert verdict("accuracy", "dev", 0.0, LINES) is None  # nothing to compare with
    text = verdict("accuracy", "test", 0.5, LINES, longer="--epochs")  # 'mp2 tune' has no --iters
    assert text is not None
    assert "more --epochs" in text
    assert "--iters" not in text


def test_of_a_full_score_nothing_is_to_be_tried() -> None:
    full = [Baseline(x.key, x.name, dict.fromkeys(x.scores, 1.0)) for x in LINES]
    assert verdict("accuracy", "test", 1.0, LINES) is None
    said = "test accuracy 100.0, as of majority class and TF-IDF + logistic regression: "
    assert verdict("accuracy", "test", 1.0, full, "'mp2 bbt --head ridge', ") == (
        f"{said}there is nothing to gain on these examples"
    )


def test_the_command_gives_the_lines_alone() -> None:
    done = mp2("baselines", "--task", "demo_topic", "--test-limit", "30")
    assert done.exit_code == 0, done.output
    for word in ("majority class", "TF-IDF + logistic regression", "linear probe", "probe of mini"):
        assert word in done.stdout
    found = mp2_json("baselines", "--task", "demo_topic", "--no-probe")
    assert found["baselines"]["probe"]["note"] == "no backbone was given"
    assert 0.0 <= found["baselines"]["tfidf"]["test_score"] <= 1.0
    assert found["examples"]["train"] > 0


def test_pooled_states_do_not_depend_on_what_else_is_in_the_batch() -> None:
    from mp2.backbone import load_backbone
    from mp2.runs.pooled_states import pooled_states

    backbone = load_backbone("mini")
    together = pooled_states(backbone, 64)([("今天",), ("今天天气很好", "我们去看电影"), ("今天",), ("",)])
    alone = [
        pooled_states(backbone, 64)([texts])[0] for texts in (("今天",), ("今天天气很好", "我们去看电影"))
    ]
    np.testing.assert_allclose(together[:2], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together[0], together[2])
    cut = pooled_states(backbone, 5)([("今天天气很好" * 20,)])
    assert np.isfinite(cut).all()


def test_a_reader_of_results_gets_the_lines_back() -> None:
    from mp2.runs.baselines import read_baselines

    stored = json.loads(json.dumps({line.key: line.as_dict() for line in LINES}))
    assert read_baselines(stored) == LINES
