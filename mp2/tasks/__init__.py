"""Tasks: cards, examples, reading-comprehension inputs, few-shot splits, predictions and metrics."""

from mp2.tasks.card import Source, TaskCard, card_names, list_cards, load_card
from mp2.tasks.check import CheckReport, check_task
from mp2.tasks.cloze import ClozeFormatter
from mp2.tasks.data import has_split, load_examples, read_examples
from mp2.tasks.decode import decode
from mp2.tasks.example import Answer, Example
from mp2.tasks.faults import AllFaults, Fault, FirstFault
from mp2.tasks.fewshot import FewShotSplit, few_shot_split
from mp2.tasks.fields import FieldFormatter
from mp2.tasks.metrics import accuracy, character_f1, exact_match, score
from mp2.tasks.mrc import MrcFormatter, MrcInput, filled_template, label_words

__all__ = [
    "AllFaults",
    "Answer",
    "CheckReport",
    "ClozeFormatter",
    "Example",
    "Fault",
    "FewShotSplit",
    "FieldFormatter",
    "FirstFault",
    "MrcFormatter",
    "MrcInput",
    "Source",
    "TaskCard",
    "accuracy",
    "card_names",
    "character_f1",
    "check_task",
    "decode",
    "exact_match",
    "few_shot_split",
    "filled_template",
    "has_split",
    "label_words",
    "list_cards",
    "load_card",
    "load_examples",
    "read_examples",
    "score",
]
