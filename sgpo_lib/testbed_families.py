"""The problem families of the testbed: data, no logic.

A family starts from its first number and takes three forks. `right` and `wrong` are (word, operation), applied to
the running value and the next number; `~` subtracts the running value from the number. Template placeholders {0} to
{3} are the four numbers, a fixed one (such as the 1 of a fence) has a range of one value. The third template of
each family is held out of training, and so are the families marked `held_out`. Levels were dealt out before any
method was compared on them: four training families each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fork:
    """One step: the right and the tempting wrong (word, operation)."""

    right: tuple[str, str]
    wrong: tuple[str, str]


@dataclass(frozen=True)
class Family:
    """One kind of problem."""

    name: str
    strategy: str
    forks: tuple[Fork, Fork, Fork]
    ranges: tuple[tuple[int, int], ...]
    templates: tuple[str, str, str]
    level: str
    """How often the unguided base takes a right fork: `easy`, `middle` or `hard` (`testbed.FORK_RANGE`)."""
    held_out: bool = False


NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo"]


def _forks(*pairs: tuple[str, str]) -> tuple[Fork, Fork, Fork]:
    def split(text: str) -> tuple[str, str]:
        word, op = text.split()
        return word, op
    a, b, c = (Fork(split(right), split(wrong)) for right, wrong in pairs)
    return a, b, c


FAMILIES: tuple[Family, ...] = (
    Family("unit rate", "price of one then scale",
           _forks(("unit /", "gap -"), ("scale *", "extend +"), ("redeem -", "charge +")),
           ((6, 48), (2, 8), (2, 8), (1, 8)),
           ("{name} pays {0} coins for {1} pens. How much do {2} pens cost with a coupon of {3} coins?",
            "{1} pens cost {0} coins. {name} buys {2} pens and has a coupon of {3} coins. What is the price?",
            "With a coupon of {3} coins, what does {name} pay for {2} pens when {1} pens cost {0} coins?"),
           "middle"),
    Family("fence posts", "count the gaps then add one post",
           _forks(("split /", "gap -"), ("post +", "inner -"), ("cost *", "extend +")),
           ((8, 64), (2, 7), (1, 1), (2, 9)),
           ("A fence of {0} meters has a post every {1} meters, at both ends too. A post costs {3} coins. "
            "What do all posts cost?",
            "{name} sets posts {1} meters apart along {0} meters, from end to end. Each post costs {3} coins. "
            "What is the price?",
            "Posts cost {3} coins each and stand {1} meters apart on a line of {0} meters with both ends. "
            "What do they cost?"),
           "hard"),
    Family("inclusion exclusion", "add the groups and take the overlap off",
           _forks(("union +", "gap -"), ("overlap -", "append +"), ("outside ~", "raise +")),
           ((12, 30), (6, 12), (1, 5), (52, 60)),
           ("Of {3} pupils, {0} sing, {1} dance and {2} do both. How many do neither?",
            "A class has {3} pupils. {0} play chess, {1} play ball, {2} play both. How many play nothing?",
            "{2} pupils do both, {0} sing and {1} dance. The class has {3} pupils. How many do neither?"),
           "hard"),
    Family("working backward", "undo each operation in reverse order",
           _forks(("undo -", "add +"), ("halve /", "double *"), ("lower -", "raise +")),
           ((12, 40), (2, 9), (2, 2), (1, 5)),
           ("{name} thinks of a number, adds {3}, doubles it, adds {1} and gets {0}. What is the number?",
            "After adding {3}, doubling and adding {1}, the result is {0}. Find the number of {name}.",
            "The result is {0}. It came from a number by adding {3}, doubling, and adding {1}. Find the number."),
           "middle"),
    Family("discount", "total price then discount then delivery",
           _forks(("total *", "append +"), ("rebate -", "charge +"), ("deliver +", "redeem -")),
           ((3, 9), (2, 6), (2, 8), (1, 7)),
           ("{name} orders {0} books at {1} coins each, gets {2} coins off and pays {3} coins for delivery. "
            "What is the bill?",
            "{0} books cost {1} coins each. {2} coins come off and delivery costs {3} coins. What does {name} pay?",
            "Delivery costs {3} coins and a discount takes {2} coins off. What do {0} books at {1} coins each cost?"),
           "easy"),
    Family("perimeter", "add the sides then double then leave the gate",
           _forks(("sides +", "gap -"), ("double *", "extend +"), ("gate -", "append +")),
           ((8, 24), (3, 7), (2, 2), (1, 6)),
           ("A garden is {0} meters long and {1} meters wide. How much fence goes around it with a gate of {3} "
            "meters left open?",
            "{name} fences a yard of {0} by {1} meters but leaves {3} meters open. How long is the fence?",
            "A gate of {3} meters stays open. How much fence does {name} need for {0} by {1} meters?"),
           "easy"),
    Family("average", "sum the scores then divide then compare",
           _forks(("union +", "gap -"), ("mean /", "double *"), ("bonus +", "lower -")),
           ((12, 40), (4, 11), (2, 2), (1, 5)),
           ("{name} scores {0} and {1} in two games. What is the average with a bonus of {3} on top?",
            "Two scores are {0} and {1}. The average is raised by {3}. What is the result of {name}?",
            "A bonus of {3} is added to the average of {0} and {1}. What does {name} get?"),
           "middle"),
    Family("shopping change", "total cost then subtract from the note",
           _forks(("total *", "append +"), ("basket +", "rebate -"), ("change ~", "charge +")),
           ((2, 9), (2, 5), (1, 7), (55, 60)),
           ("{name} buys {0} apples at {1} coins each and a bag for {2} coins. What is left of {3} coins?",
            "{0} apples cost {1} coins each and a bag costs {2} coins. {name} pays with {3} coins. "
            "How much comes back?",
            "From {3} coins {name} pays for a bag at {2} coins and {0} apples at {1} coins each. What is left?"),
           "middle"),
    Family("fraction equation", "isolate the fraction then clear it",
           _forks(("isolate -", "add +"), ("clear *", "share /"), ("shift +", "lower -")),
           ((12, 24), (2, 10), (2, 3), (1, 5)),
           ("x / {2} + {1} = {0}. What is x + {3}?",
            "Solve x / {2} + {1} = {0} and add {3} to x.",
            "{name} knows that x / {2} + {1} = {0}. Find x + {3}."),
           "hard"),
    Family("sequences", "count the jumps then multiply then add the start",
           _forks(("jumps -", "post +"), ("scale *", "extend +"), ("start +", "lower -")),
           ((4, 9), (1, 1), (3, 7), (1, 9)),
           ("A sequence starts at {3} and grows by {2}. What is term number {0}?",
            "The first term is {3} and each term is {2} more. Find term number {0}.",
            "{name} counts from {3} in jumps of {2}. What is term number {0}?"),
           "easy"),
    Family("tank", "fill rate times time then leaks",
           _forks(("flow *", "append +"), ("leak -", "raise +"), ("pour /", "double *")),
           ((3, 12), (2, 9), (1, 9), (2, 2)),
           ("A tap gives {0} liters a minute for {1} minutes. {2} liters leak. The rest goes into {3} cans. "
            "How much is in a can?",
            "{name} fills a tank at {0} liters a minute for {1} minutes, loses {2} liters and pours it into {3} "
            "cans. How much is in each?",
            "{2} liters leak after {1} minutes at {0} liters a minute. {3} cans share the rest. How much is in each?"),
           "easy"),
    Family("ages", "go back then compare then go ahead",
           _forks(("undo -", "add +"), ("times *", "append +"), ("start +", "inner -")),
           ((8, 18), (2, 6), (2, 3), (2, 9)),
           ("{name} is {0}. {1} years ago the uncle was {2} times as old as {name}. How old is he after {3} years "
            "from then?",
            "{1} years ago the uncle of {name} was {2} times as old. {name} is {0} now. How old was he {3} years "
            "after that?",
            "{name} is {0} now. The uncle was {2} times as old {1} years ago. What is his age {3} years later?"),
           "hard"),
    Family("parking", "hours after the first then rate then entry",
           _forks(("after -", "basket +"), ("rate *", "extend +"), ("entry +", "redeem -")),
           ((4, 12), (1, 3), (2, 5), (1, 9)),
           ("{name} parks {0} hours. {1} hours are free and each further hour costs {2} coins, with {3} coins to "
            "enter. What is the bill?",
            "Entry costs {3} coins, {1} hours are free, each further hour costs {2} coins. What do {0} hours cost?",
            "What does {name} pay for {0} hours when {1} hours are free, an hour costs {2} coins and entry {3}?"),
           "middle", held_out=True),
    Family("recipe", "portion of one then scale then spare",
           _forks(("portion /", "gap -"), ("times *", "append +"), ("spare +", "leak -")),
           ((6, 40), (2, 5), (2, 6), (1, 6)),
           ("A recipe for {1} people needs {0} eggs. How many eggs do {2} people need with {3} spare?",
            "{0} eggs serve {1} people. {name} cooks for {2} people and keeps {3} eggs spare. How many eggs?",
            "With {3} eggs spare, how many does {name} need for {2} people when {1} people need {0} eggs?"),
           "hard", held_out=True),
)
