"""Words and prompts of the text world. Imports no torch.

A word is three letters of `LETTERS`: sixteen glyphs of similar width that the recogniser of `ocr-logp` tells apart on a
picture of 24 x 24 pixels (I, F, J, M, Q, V, W and others are confused with neighbours at that size).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Literal, get_args

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

LETTERS = "ABCDEGHLNOPRSTUY"
"""The alphabet of the signs."""
SLOTS = 3
"""Letters of a word."""
TEMPLATES = (
    'a sign that says "{word}"',
    'the word "{word}"',
    'a label with "{word}"',
    '"{word}" on a sign',
)
_ENGLISH = """
ACE ACT ADD AGE AGO ALL AND APE ARC ARE ART ASH ATE BAD BAG BAN BAR BAT BAY BED BEG BET BOA BOY BUD BUG BUN BUS BUT
BUY CAB CAN CAP CAR CAT COB COD COG COT COY CRY CUB CUP CUT DAB DAD DAY DEN DOE DOG DOT DRY DUE DUG DUO EAR EAT EEL
EGG END ERA EYE GAP GAS GEL GET GOD GOT GUN GUT GUY HAD HAS HAT HAY HEN HER HOG HOP HOT HUB HUG HUT LAB LAD LAP LAY
LEG LET LOB LOG LOT LUG NAP NET NOD NOR NOT NUN NUT OAR OAT ODD OLD ONE ORB ORE OUR OUT PAD PAN PAT PAY PEA PEN PET
PLY POD POP POT PRO PRY PUB PUN PUP PUT RAG RAN RAP RAT RAY RED ROB ROD ROT ROY RUB RUG RUN RUT RYE SAD SAG SAP SAT
SAY SEA SEE SET SHE SHY SLY SOB SOD SON SPA SPY SUB SUN TAB TAG TAN TAP TAR TEA TEN THE TOE TON TOP TOY TRY TUB TUG
USE YEN YES YET YOU
"""
WORDS = tuple(_ENGLISH.split())
"""English words over the alphabet; the training and held-out prompts quote them."""


def is_heldout(word: str) -> bool:
    """Whether a word is held out: one in four, by the sum of its letters' numbers in the alphabet."""
    return sum(LETTERS.index(letter) for letter in word) % 4 == 0


def quoted(word: str) -> tuple[str, ...]:
    """All prompts that ask for a word, the plainest first."""
    return tuple(template.format(word=word) for template in TEMPLATES)


@lru_cache
def prompt_set(split: Split) -> tuple[str, ...]:
    """The prompts of a split, in a fixed order; `train` and `heldout` share no word."""
    words = [word for word in WORDS if is_heldout(word) == (split == "heldout")]
    return tuple(prompt for word in words for prompt in quoted(word))


def every_word() -> tuple[str, ...]:
    """All strings of `SLOTS` letters: what the base model is pretrained on."""
    return tuple("".join(letters) for letters in product(LETTERS, repeat=SLOTS))


def vocabulary() -> tuple[str, ...]:
    """What the prompts consist of besides the quoted letters, sorted: their words, and the opening quote."""
    said = {word for template in TEMPLATES for word in template.split() if "{word}" not in word}
    return tuple(sorted({*said, '"'}))
