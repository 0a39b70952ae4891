"""Splits of question/answer pairs that keep near-duplicate questions on one side.

A held-out question that is a training question with one word changed measures memory.
"""

import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

ALIKE = 0.5  # of the trigrams that either question has, the share that both have


class Split(NamedTuple):
    train: list[int]
    held_out: list[int]


def trigrams(question: str) -> frozenset[str]:
    """Of its letters and digits, with both ends marked."""
    letters = "".join(letter for letter in question.lower() if letter.isalnum())
    marked = f"  {letters} "
    return frozenset(marked[i : i + 3] for i in range(len(marked) - 2))


def groups_of_near_duplicates(questions: Sequence[str]) -> list[list[int]]:
    """Every question's number, grouped: whoever is alike is in one group, and so is whoever is
    alike to one of them.
    """
    grams = [trigrams(question) for question in questions]
    group = list(range(len(questions)))
    for one in range(len(questions)):
        for other in range(one):
            shared = len(grams[one] & grams[other])
            either = len(grams[one]) + len(grams[other]) - shared
            if shared >= ALIKE * either and group[one] != group[other]:
                into, gone = group[other], group[one]
                group = [into if number == gone else number for number in group]
    members: dict[int, list[int]] = {}
    for question, number in enumerate(group):
        members.setdefault(number, []).append(question)
    return list(members.values())


def split_by_groups(groups: list[list[int]], train: int, held_out: int, seed: int) -> Split:
    """As many as asked for, drawn by the seed, no group on both sides."""
    waiting = [sorted(group) for group in groups]
    random.Random(seed).shuffle(waiting)
    chosen: list[list[int]] = []
    for wanted in (held_out, train):
        side: list[int] = []
        left = []
        for group in waiting:
            if len(side) + len(group) <= wanted:
                side += group
            else:
                left.append(group)
        if len(side) < wanted:
            sys.exit(
                f"{train} training pairs and {held_out} held-out ones were asked for, and the data "
                f"has {sum(map(len, groups))} short enough, in {len(groups)} groups of "
                f"near-duplicates that stay together: use fewer, or a larger --max-length"
            )
        chosen.append(side)
        waiting = left
    return Split(train=chosen[1], held_out=chosen[0])
