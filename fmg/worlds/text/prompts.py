"""Words and prompts of the text world. Imports no torch.

A word is three letters of `LETTERS`: twelve glyphs of similar width that the recogniser of `ocr-logp` distinguishes in
an image of 24 x 24 pixels (I, F, Q, V, W and others are confused with neighbours at that size).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Literal, get_args

from fmg.core.prompt import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.worlds.configs import TextPromptsConfig

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

LETTERS = "ABDEGLNOPRST"
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
ADD ADO AGE AGO ALE ALL AND APE APT ARE ART ASP ATE BAD BAG BAN BAR BAT BED BEG BET BOA BOG DAB DAD DEN DOE DOG DOT
EAR EAT EEL EGG EGO END ERA ETA GAB GAG GAP GAS GEL GET GOD GOT LAB LAD LAG LAP LEA LED LEG LET LOB LOG LOP LOT NAB
NAG NAP NET NOD NOR NOT OAR OAT ODD ODE OLD ONE OPT ORB ORE PAD PAL PAN PAR PAT PEA PEG PEN PEP PET POD POP POT PRO
RAG RAN RAP RAT RED ROB ROD ROT SAD SAG SAP SAT SEA SEE SET SOB SOD SON SOP SPA TAB TAD TAG TAN TAP TAR TEA TEE TEN
TOE TON TOP TOT
"""
WORDS = tuple(_ENGLISH.split())
"""English words over the alphabet; the training and held-out prompts quote them."""


def is_heldout(word: str) -> bool:
    """Whether a word is held out: one in four, by the sum of its letters' positions in the alphabet."""
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
    """The words of the prompts around the quoted one, sorted."""
    return tuple(sorted({word for template in TEMPLATES for word in template.split() if "{word}" not in word}))


def text_train(config: TextPromptsConfig) -> PromptList:
    """Training prompts: signs that quote a word of three letters."""
    return _prompts("text-train", "train")


def text_heldout(config: TextPromptsConfig) -> PromptList:
    """Prompts that quote words not in the training prompts."""
    return _prompts("text-heldout", "heldout")


def _prompts(name: str, split: Split) -> PromptList:
    return PromptList(name, [Prompt(prompt, "text", {"prompt": prompt}) for prompt in prompt_set(split)])
