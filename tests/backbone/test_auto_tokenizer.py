"""Token ids against ``transformers.AutoTokenizer`` over whatever a checkpoint folder may hold."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer

from mp2.backbone import Tokenizer
from mp2.backbone.tokenizer_files import vocab_of
from mp2.errors import FormatError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *"abcABé这个好，。-$",
    "ab",
    "##a",
    "##b",
    "##个",
    "",
    " ",
    "a ",
    " a",
    "a\t",
    "é\u2028",
    "\u3000",
    "<gap>",
]
TEXT = st.text(st.sampled_from("abcABéÉ这个好，。-$ \t\u3000\u0301<>gp1\u200b"), max_size=14)


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Files as bytes, text, or values that are JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, bytes | str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def theirs(folder: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(str(folder))(text, add_special_tokens=False)["input_ids"]
    return ids


def fast_file(vocab: Mapping[str, int], **normalizer: Any) -> str:
    """A ``tokenizer.json`` as the library ``tokenizers`` writes it."""
    fast = Fast(models.WordPiece(dict(vocab), unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(**normalizer)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return str(fast.to_str())


CONFIG = {"config.json": {"model_type": "bert"}}


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """Files of a checkpoint folder: odd vocabularies, switches, added tokens, one file form or both."""
    lines = [*SPECIAL, *draw(st.lists(st.sampled_from(WORDS), max_size=25))]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    text = end.join(draw(st.permutations(lines))) + draw(st.sampled_from(["", end, end * 2]))
    switches = {
        name: value
        for name, values in {
            "do_lower_case": (True, False),
            "strip_accents": (True, False, None),
            "tokenize_chinese_chars": (True, False),
            "tokenizer_class": ("BertTokenizer", "BertTokenizerFast"),
            "model_max_length": (4,),
        }.items()
        if (value := draw(st.sampled_from(["left out", *values]))) != "left out"
    }
    files: dict[str, Any] = {**CONFIG}
    if switches or draw(st.booleans()):
        files["tokenizer_config.json"] = switches
    form = draw(st.sampled_from(["vocab.txt", "tokenizer.json", "both"]))
    if form != "tokenizer.json":
        files["vocab.txt"] = text
    vocab = vocab_of(text)
    if form != "vocab.txt":
        holes = {token: i + (i > 6) for token, i in vocab.items()}  # ids that vocab.txt could not tell
        files["tokenizer.json"] = fast_file(
            holes,
            lowercase=switches.get("do_lower_case", True),
            strip_accents=switches.get("strip_accents"),
            handle_chinese_chars=switches.get("tokenize_chinese_chars", True),
        )
    added = draw(st.lists(st.sampled_from(["<gap>", "好a", "-b"]), max_size=2, unique=True))
    if added and form == "vocab.txt" and len(vocab) == max(vocab.values()) + 1:
        new = [token for token in added if token not in vocab]
        ids = {token: len(vocab) + i for i, token in enumerate(new)}
        kind = draw(st.sampled_from(["added_tokens.json", "decoder", "special"]))
        if kind == "added_tokens.json":
            files["added_tokens.json"] = ids
        elif kind == "decoder":
            keys = ("lstrip", "rstrip", "normalized", "single_word", "special")
            decoder = {
                str(i): {"content": t, **{k: draw(st.booleans()) for k in keys}} for t, i in ids.items()
            }
            files["tokenizer_config.json"] = {**switches, "added_tokens_decoder": decoder}
        else:
            files["special_tokens_map.json"] = {"additional_special_tokens": new}
    return files


@settings(max_examples=120, deadline=None)
@given(files=folders(), texts=st.lists(TEXT, min_size=1, max_size=4))
def test_ids_equal_auto_tokenizer_or_the_folder_is_refused(files: dict[str, Any], texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / "checkpoint", files)
        ours = Tokenizer.from_folder(folder)
        for text in texts:
            pieces = ours.encode(text)
            assert pieces.ids == theirs(folder, text)
            assert all(0 <= start <= end <= len(text) for start, end in pieces.offsets)
        ours.save(Path(place))
        again = Tokenizer.from_folder(Path(place))
        assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
        assert again.tokens() == ours.tokens()


def test_an_added_token_whose_id_transformers_gives_twice_is_refused(tmp_path: Path) -> None:
    files = {"vocab.txt": "\n".join([*SPECIAL, "a", "a"]), "added_tokens.json": {"<gap>": 7}}
    with pytest.raises(FormatError, match=r"<gap>' is declared with id 7, transformers gives it 6"):
        Tokenizer.from_folder(write(tmp_path, {**CONFIG, **files}))


VOCAB = [*SPECIAL, *"abAé这个好", "##b"]
TXT = {**CONFIG, "vocab.txt": "\n".join(VOCAB) + "\n"}
SAMPLES = ["a 好b <gap> A é", "ab这 个", "", "好<gap>", "Ab never é"]


@pytest.mark.parametrize(
    "files",
    [
        {**TXT, "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"}},
        {**TXT, "special_tokens_map.json": dict.fromkeys(["mask_token"], "[MASK]")},
        {
            **TXT,
            "special_tokens_map.json": {"bos_token": {"content": "<gap>", "lstrip": True, "rstrip": False}},
        },
        {**TXT, "tokenizer_config.json": {"extra_special_tokens": ["<gap>"]}},
        {**TXT, "tokenizer_config.json": {"my_own_token": "<gap>", "add_bos_token": False}},
        {**TXT, "tokenizer_config.json": {"split_special_tokens": True, "extra_special_tokens": ["<gap>"]}},
        {
            **TXT,
            "tokenizer_config.json": {"tokenizer_file": "/nowhere/tokenizer.json", "name_or_path": "x/y"},
        },
        {**TXT, "config.json": {"model_type": "ernie"}},
        {**TXT, "config.json": {"model_type": "bart", "tokenizer_class": "BertTokenizer"}},  # CPT
        {**TXT, "config.json": {"model_type": "bert", "tokenizer_class": "BertTokenizerFast"}},
        {
            **CONFIG,
            "tokenizer.json": fast_file({t: 2 * i for i, t in enumerate(VOCAB)}, lowercase=False),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        },
        {
            **CONFIG,
            "tokenizer.json": fast_file({t: i for i, t in enumerate(VOCAB)}, lowercase=True),
            "tokenizer_config.json": {"do_lower_case": False},  # the switch goes before the file
        },
    ],
)
def test_folders_as_they_are_found(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = write(tmp_path, files)
    ours = Tokenizer.from_folder(folder)
    for text in SAMPLES:
        assert ours.encode(text).ids == theirs(folder, text), text


def test_cpt_has_bert_tokenizer_whatever_auto_tokenizer_takes_for_bart(tmp_path: Path) -> None:
    """CPT's README: "please use BertTokenizer"; the class is not in its configuration."""
    folder = write(
        tmp_path, {**TXT, "config.json": {"model_type": "bart", "d_model": 8, "encoder_layers": 1}}
    )
    ours, bert = Tokenizer.from_folder(folder), BertTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        assert ours.encode(text).ids == bert(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["added_tokens.json", "special"])
def test_added_tokens_are_one_token_and_special_tokens_in_a_text_are_text(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "a", {**TXT, "added_tokens.json": {"<gap>": len(VOCAB)}})
    if kind == "special":
        tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / "b", TXT))
        tokenizer.add_tokens(["<gap>"], special_tokens=True)
        tokenizer.save_pretrained(tmp_path / "b")
        folder = tmp_path / "b"
        assert (folder / "tokenizer.json").exists()
    ours = Tokenizer.from_folder(folder)
    pieces = ours.encode("a<gap>[SEP]b")
    assert pieces.ids[:2] == [VOCAB.index("a"), len(VOCAB)]
    assert pieces.offsets[1] == (1, 6)
    assert ours.sep_id not in pieces.ids
    assert ours.vocab_size == len(VOCAB) + 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"never_split": ["ab"]}}, "'never_split': is \\['ab'\\]"),
        ({"tokenizer_config.json": {"do_basic_tokenize": False}}, "'do_basic_tokenize': is False"),
        (
            {"tokenizer_config.json": {"do_lower_case": "false"}},
            "'do_lower_case': is 'false', expected true or false",
        ),
        ({"tokenizer_config.json": {"do_lower_case": None}}, "'do_lower_case': is None"),
        (
            {"tokenizer_config.json": {"strip_accents": 1}},
            "'strip_accents': is 1, expected true or false or null",
        ),
        ({"tokenizer_config.json": {"wordpieces_prefix": "@@"}}, "'wordpieces_prefix': is '@@'"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}, "'auto_map'.*not loaded"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "ErnieTokenizer"}},
            "'ErnieTokenizer' \\(tokenizer_class\\)",
        ),
        ({"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "'BertJapaneseTokenizer'"),
        ({"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}}, "'RobertaTokenizer'"),
        ({"tokenizer_config.json": {"tokenizer_class": 3}}, "'tokenizer_class': is 3"),
        ({"tokenizer_config.json": {"mask_token": "a"}}, "'mask_token': is 'a', expected '\\[MASK\\]'"),
        ({"special_tokens_map.json": {"sep_token": "</s>"}}, "'sep_token': is '</s>'"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "[MASK]"}}}},
            "'\\[MASK\\]' has id 4",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": "a"}}}, "is 'x', expected a token id"),
        ({"added_tokens.json": {"<gap>": 900}}, "'<gap>' is declared with id 900, transformers gives it 13"),
        ({"added_tokens.json": {"<gap>": "1"}}, "'<gap>': is '1', expected a token id"),
        ({"vocab.txt": "\n".join(SPECIAL[:4])}, "no token '\\[MASK\\]'"),
        ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {}}}}, "'model.type': is 'BPE'"),
        ({"tokenizer.json": {"model": {"type": "WordPiece", "vocab": {"a": -1}}}}, "'model.vocab.a': is -1"),
        (
            {"tokenizer.json": {"model": {"type": "WordPiece", "vocab": {"a": 10**30}}}},
            "'model.vocab.a': is 10000",
        ),
        (
            {"tokenizer.json": {"model": {"type": "WordPiece", "vocab": {"a": 1, "b": 1}}}},
            "id 1 is both 'a' and 'b'",
        ),
        (
            {"tokenizer.json": fast_file({t: i for i, t in enumerate(VOCAB)}, lowercase=False)},
            "'normalizer.lowercase': is False.*has no 'do_lower_case': write it there",
        ),
        ({"tokenizer.json": "[" * 100_000}, "tokenizer.json: not JSON"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(
    tmp_path: Path, files: dict[str, Any], expected: str
) -> None:
    with pytest.raises(FormatError, match=expected) as caught:
        Tokenizer.from_folder(write(tmp_path, {**TXT, **files}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
}


@pytest.mark.parametrize("part", PANICS)
@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_what_makes_the_library_panic_is_one_line_or_left_out(
    tmp_path: Path, part: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads(fast_file({t: i for i, t in enumerate(VOCAB)}, lowercase=True))
    files = {
        "tokenizer.json": {**raw, part: PANICS[part]},
        "tokenizer_config.json": {"tokenizer_class": kind},
    }
    write(tmp_path, {**CONFIG, **files})
    if part == "normalizer":
        with pytest.raises(FormatError, match="'normalizer': is"):
            Tokenizer.from_folder(tmp_path)
    else:
        assert Tokenizer.from_folder(tmp_path).encode("ab").ids == [VOCAB.index("a"), VOCAB.index("##b")]
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_of_the_library_is_a_format_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def panic(*_: object, **__: object) -> None:
        raw = {**json.loads(fast_file({"[UNK]": 0})), "normalizer": PANICS["normalizer"]}
        Fast.from_str(json.dumps(raw))

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(FormatError, match="not a tokenizer that can be read: PanicException: Precompiled"):
        Tokenizer.from_folder(write(tmp_path, {**TXT, "added_tokens.json": {"<gap>": len(VOCAB)}}))
    assert capfd.readouterr().err == ""


def test_what_the_library_prints_does_not_reach_the_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = {"content": "<gap>", "special": False, "unheard": 1}
    settings_file = {"added_tokens_decoder": {str(len(VOCAB)): token}}
    Tokenizer.from_folder(write(tmp_path, {**TXT, "tokenizer_config.json": settings_file}))
    assert capfd.readouterr() == ("", "")


def test_a_plain_folder_is_read_without_importing_transformers(tmp_path: Path) -> None:
    write(tmp_path, {**TXT, "tokenizer.json": fast_file({t: i for i, t in enumerate(VOCAB)})})
    code = (
        "import sys; from pathlib import Path; from mp2.backbone import Tokenizer, load_backbone\n"
        "Tokenizer.from_folder(Path(sys.argv[1])); load_backbone('mini')\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(write(tmp_path / "plain", TXT))
    mark = b"\xef\xbb\xbf"
    files = {name: mark + (tmp_path / "plain" / name).read_bytes() for name in TXT}
    files["tokenizer_config.json"] = mark + b'{"do_lower_case": true}'
    marked = Tokenizer.from_folder(write(tmp_path / "marked", files))
    assert marked.tokens() == plain.tokens() == VOCAB
    files["added_tokens.json"] = mark + b'{"<gap>": 13}'
    assert Tokenizer.from_folder(write(tmp_path / "more", files)).tokens() == [*VOCAB, "<gap>"]


def test_largest_id_counts_where_the_vocabulary_has_holes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(
        write(tmp_path, {"tokenizer.json": fast_file({t: 3 * i for i, t in enumerate(VOCAB)})})
    )
    assert tokenizer.vocab_size == 3 * (len(VOCAB) - 1) + 1
    assert tokenizer.tokens()[3] == "[UNK]"
    assert tokenizer.tokens()[4] == ""
    assert Tokenizer.from_vocab(tokenizer.tokens()).encode("ab 好").ids == tokenizer.encode("ab 好").ids
