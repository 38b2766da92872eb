"""What the synthetic crops say: dictionary words, words of signs, numbers, codes.

The dictionary is the system's (Debian's `wamerican`) or a file with one word a line. The words of
signs below are our own list. A hash of the word splits everything: one in ten belongs to test
sets and never appears in a training set.
"""

from __future__ import annotations

import string
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np

from lemma_fast.training.data.tables import read_text

Split = Literal["train", "test"]
SYSTEM_DICTIONARY = Path("/usr/share/dict/words")
LONGEST = 14

SIGN_WORDS: tuple[str, ...] = tuple(
    """
    airport alarm alley antique apartment arcade arrivals art auto avenue bags bakery bank bar
    barber bargain basement bath bay beach beauty beer best bicycle bike bistro block board boat
    book books boulevard bread breakfast bridge building burger bus business butcher buy cab cafe
    cake camera camp candy capital car card care cash castle caution center central centre chapel
    charge check cheese chemist chicken children china church cinema city classic clean clearance
    clinic clock close closed closing clothes clothing club coach coffee cold collection college
    company computer control cook cookies cool corner cosmetics council court craft credit
    crossing cut daily dairy danger dance dark date days deli delivery dental dentist deposit
    design diner dining dinner direct discount district do dogs dollar door doors double down
    dress drink drinks drive driver dry east electric elevator emergency end energy enter entrance
    entry espresso event exchange exit express eyes factory family farm fashion fast fee festival
    fire first fish fitness floor florist flower flowers food foot for forest free fresh friday
    fruit fuel full furniture gallery game garage garden gas gate gift gifts girls glass go gold
    golf good grand great green grill grocery group guest gym hair half hall hand happy harbor
    hardware health heart heavy help here high highway hill history home hospital hot hotel hour
    hours house ice in income info inn inside insurance international island jewelry job juice
    junction keep key kids kitchen lady lake lamp land lane large laundry law left leather lemon
    level library licence life lift light lights limit limited line liquor live loading loan lock
    london lost lounge love low luggage lunch machine magazine mail main man map market massage
    mature max maximum meat medical meeting men menu metro middle mile milk min mini mobile modern
    monday money motel motor mountain museum music nail national natural new news night no north
    notice now number nursery ocean of off offer office official oil old on one only open opening
    optical orange order organic out outlet over own paint palace paper paris park parking part
    party pass passage pasta pay peace pedestrian people pet pharmacy phone photo piano pizza
    place plan plants plaza please police pool port post power premium press price private pro
    public pull pump push quality queen quick quiet radio rail railway ranch red rent rental
    repair reserved rest restaurant restroom rice ride right river road rock roof room rooms rose
    route royal rules safe safety salad sale salon sandwich saturday save school sea seafood
    season seat security self sell senior service services shell shirt shoes shop shopping show
    shower side sign silver size ski sky slow small smart smoke smoking snack soda soft solution
    soup south spa speed spicy sport sports spring square stadium stairs stand star station steak
    steps stop storage store street studio style suite summer sun sunday super supply surf sushi
    sweet swim system table take taxi tea team tech telephone temple tennis terrace theater thank
    the ticket tickets tile time tire to tobacco today toilet toll tools top total tour tower town
    toys trade traffic trail train transit transport travel tree truck trust tube tuesday tunnel
    turn union unit university up urban use vacancy valley value vegan video view villa village
    vintage visit volume wait walk wall warehouse warning wash watch water way wear wedding week
    welcome west wharf wheel white wholesale window wine winter wire women wood work workshop
    world yard year yellow yield yoga you zone zoo
    """.split()
)

# Slurs and obscenities, whole or as a beginning: hashed, because a list is no place to read them.
_UNWELCOME = frozenset(
    """
    038c9ccd 09508013 0f28c496 13a465fc 16ea09fc 216aaecd 29edf765 2a6937d7 40582c4d
    491c21a8 566f532d 6ac3c336 76f03622 7bc67115 7c419fd6 82e695c9 83621b34 85fc17f7
    886d51e9 89133bc0 8c5c0439 9f9bdbc2 a27c6f71 afc41e6f c2c3b68b c3de533e cc020323
    d58e7fca dd92623b 044eb98b 0be9b885 17bde8b4 2189c0ed 45cd3e1b 59cc3cb8 70aafb42
    78a00d18 796e43a5 867d7897 94a2b576 98b52c4b 9915ba2d 99e367bc a76d588d ad505b0b
    affc8757 bbf8bb78 be2db2bf c1b4ed05 c5116290 d0e3cb91 daec0c23 e7b98c6a eb9b0354
    eea29916 f9d0d9b1
    """.split()
)

_KINDS = ("dictionary", "sign", "number", "code", "marked")
_KIND_ODDS = (0.56, 0.22, 0.11, 0.06, 0.05)


def normalised(label: str) -> str:
    """Lower case, letters and digits alone: what recognisers are judged by."""
    return "".join(c for c in label.lower() if c in string.ascii_lowercase or c in string.digits)


def split_of(label: str) -> Split:
    """The one split in which this word may appear, whatever its case and punctuation."""
    return "test" if sha256(normalised(label).encode()).digest()[0] % 10 == 0 else "train"


@lru_cache(maxsize=8)
def read_dictionary(source: str) -> tuple[str, ...]:
    """Words of a file (`builtin` for the list of sign words): ASCII letters, at most 14 of them."""
    if source == "builtin":
        return SIGN_WORDS
    path = SYSTEM_DICTIONARY if source == "system" else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no word list at {path}: install the Debian package wamerican, name a file with one"
            " word a line, or ask for the short list by the name builtin"
        )
    lines = read_text(path).split()
    kept = {
        w
        for w in lines
        if w.isascii() and w.isalpha() and 2 <= len(w) <= LONGEST and not _is_unwelcome(w.lower())
    }
    if not kept:
        raise ValueError(f"{path} has no word of 2 to {LONGEST} ASCII letters")
    return tuple(sorted(kept))


def digest(dictionary: str) -> str:
    """The sha256 of the words of a dictionary, which a recipe and a run are named by."""
    return sha256("\n".join(read_dictionary(dictionary)).encode()).hexdigest()


def _is_unwelcome(word: str) -> bool:
    beginnings = {word, word[:4], word[:5], word[:6]}
    return any(sha256(b.encode()).hexdigest()[:8] in _UNWELCOME for b in beginnings)


class Vocabulary:
    """Draws labels of one split from a dictionary, the sign words, numbers and codes."""

    def __init__(self, dictionary: str = "system", split: Split = "train") -> None:
        self.dictionary = dictionary
        self.split = split
        self.digest = digest(dictionary)
        self._words = tuple(w for w in read_dictionary(dictionary) if split_of(w) == split)
        self._signs = tuple(w for w in SIGN_WORDS if split_of(w) == split)
        if not self._words:
            raise ValueError(f"the word list {dictionary} has no word of the {split} split")

    def draw(self, rng: np.random.Generator, marks: str) -> str:
        """One label in the case it is drawn in; `marks` is the punctuation the face has."""
        while True:
            label = self._draw(rng, marks)
            if normalised(label) and split_of(label) == self.split:
                return label

    def _draw(self, rng: np.random.Generator, marks: str) -> str:
        kind = _KINDS[rng.choice(len(_KINDS), p=_KIND_ODDS)]
        if kind == "number":
            return _number(rng, marks)
        if kind == "code":
            return _code(rng)
        if kind == "sign":
            return _cased(rng, str(self._signs[rng.integers(len(self._signs))]))
        word = self._words[rng.integers(len(self._words))]
        other = self._words[rng.integers(len(self._words))]
        # Signs are terse: the shorter of two, more often than not.
        if len(other) < len(word) and rng.random() < 0.6:
            word = other
        if kind == "marked":
            return _marked(rng, _cased(rng, word), marks)
        return _cased(rng, word)


def _cased(rng: np.random.Generator, word: str) -> str:
    turn = rng.random()
    if turn < 0.42:
        return word.upper()
    if turn < 0.70:
        return word[:1].upper() + word[1:]
    return word.lower() if turn < 0.97 else word


def _number(rng: np.random.Generator, marks: str) -> str:
    turn = rng.random()
    if turn < 0.35:
        return str(rng.integers(10 ** int(rng.integers(1, 5))))
    if turn < 0.5:
        return str(rng.integers(1900, 2030))
    if turn < 0.65 and "." in marks:
        price = f"{rng.integers(100)}.{rng.integers(100):02d}"
        return f"${price}" if "$" in marks and rng.random() < 0.5 else price
    if turn < 0.75 and ":" in marks:
        return f"{rng.integers(24)}:{rng.integers(60):02d}"
    if turn < 0.82 and "%" in marks:
        return f"{rng.integers(1, 101)}%"
    if turn < 0.92 and "-" in marks:
        return f"{rng.integers(100, 1000)}-{rng.integers(1000, 10000)}"
    return "".join(str(d) for d in rng.integers(10, size=int(rng.integers(3, 11))))


def _code(rng: np.random.Generator) -> str:
    length = int(rng.integers(1, 9))
    if rng.random() < 0.5:
        letters = string.ascii_letters
    else:
        letters = string.ascii_uppercase + string.digits
    text = "".join(letters[i] for i in rng.integers(len(letters), size=length))
    return text if rng.random() < 0.25 else text.upper()


def _marked(rng: np.random.Generator, word: str, marks: str) -> str:
    turn = rng.random()
    if turn < 0.3 and "'" in marks:
        return f"{word}'{'S' if word.isupper() else 's'}"
    if turn < 0.5 and "-" in marks and len(word) > 4:
        cut = int(rng.integers(2, len(word) - 1))
        return f"{word[:cut]}-{word[cut:]}"
    if turn < 0.6 and "&" in marks:
        letters = rng.integers(26, size=2)
        return f"{string.ascii_uppercase[letters[0]]}&{string.ascii_uppercase[letters[1]]}"
    mark = ".,!:"[rng.integers(4)]
    return word + mark if mark in marks else word
