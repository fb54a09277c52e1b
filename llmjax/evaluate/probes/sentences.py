"""The sentences that probes hide in a text and ask for at its end, in English and Chinese: pass keys and facts."""

from __future__ import annotations

import dataclasses

from llmjax.data.packing.order import hash_integers

# The number of answers to choose from.
ANSWERS = 4
# The number of digits of a pass key.
KEY_DIGITS = 5
# Digits in Chinese text, which may contain no Arabic ones.
CHINESE_DIGITS = "零一二三四五六七八九"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A sentence to hide and the question for it.

    Hidden in the text: `lead` + answer + `rest`, where {} in `rest` is the answer again. Asked at the end:
    `question`, then `lead`. The question does not contain the lead, so that a model which continues a repeated text
    finds the hidden place.

    answers  `ANSWERS` different answers, equally likely to someone who has not read the text
    """

    question: str
    lead: str
    rest: str
    answers: tuple[str, ...]


def pass_key(language: str, number: int) -> Fact:
    """A random key of five digits with three others to choose from (Mohtashami and Jaggi 2023, "Landmark attention",
    section 4.2)."""
    span = 9 * 10 ** (KEY_DIGITS - 1)
    keys: list[int] = []
    # 64 draws make four different keys practically certain.
    for value in hash_integers(range(64 * number, 64 * number + 64), key=0):
        key = 10 ** (KEY_DIGITS - 1) + int(value) % span
        if key not in keys:
            keys.append(key)
    spell, question, lead, rest = PASS_KEYS[language]
    return Fact(question, lead, rest, tuple(spell(str(key)) for key in keys[:ANSWERS]))


def fact(language: str, number: int) -> Fact:
    """A fact of the list that could just as well be otherwise (the needle of Kamradt 2023, "Needle in a haystack")."""
    facts = FACTS[language]
    return facts[number % len(facts)]


# How a key is spelled, the question, the text before the key, and the text after it.
PASS_KEYS = {
    "en": (" {}".format, "What is the pass key?", "The pass key is", ". Remember it.{} is the pass key."),
    "zh": (
        lambda key: key.translate(str.maketrans("0123456789", CHINESE_DIGITS)),
        "什么是通行密钥？",
        "通行密钥是",
        "。请记住它。{}就是通行密钥。",
    ),
}
FACTS = {
    "en": (
        Fact(
            "Where does Anna keep her old letters?",
            "Anna keeps her old letters in the",
            ".",
            (" cellar", " kitchen", " garden", " library"),
        ),
        Fact(
            "What is the captain's dog called?",
            "The captain's dog is called",
            ".",
            (" Rover", " Caesar", " Hector", " Jack"),
        ),
        Fact(
            "Where does the stranger come from?",
            "The stranger comes from",
            ".",
            (" France", " Spain", " Russia", " Egypt"),
        ),
        Fact(
            "What is Peter's favourite fruit?",
            "Peter's favourite fruit is the",
            ".",
            (" apple", " pear", " cherry", " plum"),
        ),
        Fact(
            "What colour is the door of the old mill?",
            "The door of the old mill is",
            ".",
            (" green", " red", " blue", " white"),
        ),
        Fact(
            "What is the doctor's brother?",
            "The doctor's brother is a",
            ".",
            (" baker", " farmer", " teacher", " sailor"),
        ),
        Fact(
            "When is the market held?",
            "The market is held every",
            ".",
            (" Monday", " Tuesday", " Thursday", " Saturday"),
        ),
        Fact(
            "Where is the silver spoon hidden?",
            "The silver spoon is hidden under the",
            ".",
            (" stairs", " carpet", " table", " bed"),
        ),
    ),
    "zh": (
        Fact("小兰的旧信在哪里？", "小兰把旧信放在", "里。", ("地窖", "厨房", "花园", "书房")),
        Fact("船长的狗有什么名字？", "船长的狗叫", "。", ("大黄", "小白", "黑虎", "来福")),
        Fact("那个客人的家乡是哪里？", "那个客人是", "人。", ("北京", "南京", "扬州", "长安")),
        Fact("什么果子小明最爱吃？", "小明最爱吃的果子是", "。", ("苹果", "梨子", "桃子", "葡萄")),
        Fact("旧磨坊的门有什么颜色？", "旧磨坊的门是", "的。", ("绿色", "红色", "黑色", "白色")),
        Fact("大夫的哥哥做什么？", "大夫的哥哥是个", "。", ("木匠", "农夫", "和尚", "秀才")),
        Fact("集市什么日子开？", "集市每逢", "开。", ("初三", "初五", "初八", "初十")),
        Fact("银匙在什么下面？", "银匙藏在", "下面。", ("楼梯", "石头", "桌子", "床铺")),
    ),
}
