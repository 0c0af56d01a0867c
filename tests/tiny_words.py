"""The character vocabulary of the tests' tiny backbones."""

from __future__ import annotations

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = sorted(
    set(
        "这个东西真的很好不错喜欢太差了失望退货天气今日晴有雨旅游美食体育科技健康教育财经音乐宠物主题识别：“”的是？选项"
        "，。负面正面情感分析意思判断与关系矛盾蕴含中立阅读理解文档问题答案在哪里谁什么人一二三四五六七八九十关键词提取"
    )
)


def tiny_vocab() -> list[str]:
    """A character vocabulary in BERT's order."""
    return [*SPECIAL, *CHARACTERS, *"abcdefghij0123456789", *("##" + c for c in "abcdefghij0123456789")]
