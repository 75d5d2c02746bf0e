"""Whether a text names something: words compared as people read them, not as they are typed.

Texts are compared after Unicode normalisation (NFKC, so that decomposed accents and full-width letters count as what
they look like), with folded case, and with spaces, underscores and hyphens of any kind and number alike. The last
word of a name counts in singular and plural. Scripts that are written without spaces have no word borders; everywhere
else a letter or digit before or after a name makes it another word, and so does a single letter before a hyphen
("t-shirt" names no shirt, "Van Gogh-style" names Van Gogh).
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Sequence

# Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han: no spaces between words; Hangul, whose particles follow without one
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3021-\u3029\u3040-\u318f"
UNSPACED += "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
LETTER = rf"(?:(?![{UNSPACED}_])\w)"  # of a word with borders; digits count

IRREGULAR = {
    "child": "children",
    "die": "dice",
    "foot": "feet",
    "goose": "geese",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "policeman": "policemen",
    "tooth": "teeth",
    "woman": "women",
}
SINGULARS = {plural: singular for singular, plural in IRREGULAR.items()}
JOINT = " + "  # between the parts of a joint name: it is about what shows all of them
HISSING = ("s", "x", "z", "ch", "sh")


def plural(word: str) -> str:
    """The plural of an English word in small letters, by the common rules.

    >>> plural("church"), plural("baby"), plural("boot")
    ('churches', 'babies', 'boots')
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith(HISSING):
        return word + "es"
    if len(word) > 1 and word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def forms(word: str) -> list[str]:
    """The word in singular and plural, as far as English has rules for it; a word of other letters has one form."""
    if not (word.isascii() and word.isalpha() and len(word) > 2):
        return [word]
    found = {word, plural(word), word + "s"}
    if word in SINGULARS:
        found.add(SINGULARS[word])
    if word.endswith("o"):
        found.add(word + "es")
    if re.search("[aeiou][sz]$", word):  # quizzes, busses
        found.add(word + word[-1] + "es")
    if word.endswith(("f", "fe")):
        found.add(re.sub("fe?$", "ves", word))
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        found.add(word[:-1])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        if word.endswith("ves"):
            found |= {word[:-3] + "f", word[:-3] + "fe"}
        if word.endswith("es") and word[:-2].endswith((*HISSING, "o")):
            found.add(word[:-2])
    return sorted(found, key=len, reverse=True)


@functools.lru_cache(maxsize=100_000)
def folded(text: str) -> tuple[str, tuple[int, ...]]:
    """The text as it is compared, and for each of its characters where in `text` it begins (one more for the end).

    A run of spaces and underscores is one space, a run with a hyphen in it one hyphen.
    """
    characters: list[str] = []
    starts: list[int] = []
    position = 0
    while position < len(text):
        end = position + 1
        while end < len(text) and _continues(text[end]):
            end += 1
        for character in _normalised(text[position:end]):
            kind = "L" if character.isalnum() else unicodedata.category(character)
            if kind in ("Cf", "Cc") and not character.isspace():  # invisible
                continue
            if character.isspace() or character == "_" or kind == "Pd":
                mark = "-" if kind == "Pd" else " "
                if characters and characters[-1] in " -":
                    characters[-1] = max(mark, characters[-1])  # "-" is the greater
                    continue
                character = mark
            characters.append(character)
            starts.append(position)
        position = end
    return "".join(characters), (*starts, len(text))


def as_compared(text: str) -> str:
    """The text in the form in which two texts that say the same are equal.

    >>> as_compared("A  red T-shirt ")
    'a red t-shirt'
    """
    return folded(text)[0].strip(" -")


def _normalised(cluster: str) -> str:
    if cluster.isascii():
        return cluster.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", cluster).casefold())


def _continues(character: str) -> bool:
    """Whether a character belongs to the one before it: accents, and the vowels and ends of a Korean syllable."""
    return character > "\u02ff" and (
        bool(unicodedata.combining(character)) or "\u1160" <= character <= "\u11ff" or character == "\u200d"
    )


@functools.lru_cache(maxsize=1000)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds any of the names in a folded text, the longer one first; group "nI" is name number I."""
    choices = []
    for index in sorted(range(len(names)), key=lambda index: len(names[index]), reverse=True):
        words = re.split("[ -]", as_compared(names[index]))
        if not words[-1]:
            continue
        last = "|".join(map(re.escape, forms(words[-1])))
        body = "[ -]?".join([*map(re.escape, words[:-1]), f"(?:{last})"])
        before = rf"(?<!{LETTER})(?<!^{LETTER}-)(?<![\W_]{LETTER}-)" if re.match(LETTER, words[0]) else ""
        after = rf"(?!{LETTER})" if re.search(LETTER + "$", words[-1]) else ""
        choices.append(f"(?P<n{index}>{before}{body}{after})")
    return re.compile("|".join(choices)) if choices else None


def parts_of(name: str) -> list[str]:
    """The parts of a joint name, which a text names if it names each of them; of any other name, the name itself.

    >>> parts_of("pencil sketch + sneaker"), parts_of("sneaker")
    (['pencil sketch', 'sneaker'], ['sneaker'])
    """
    return [part.strip() for part in name.split(JOINT)]


def find_names(text: str, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where a text names what: (number of the name, start, end in `text`), from left to right, the longest first.

    A joint name ("red + sneaker") reaches from the first of its parts to the last.
    """
    joint = [number for number, name in enumerate(names) if JOINT in name]
    if joint:
        return _find_joint(text, names, joint)
    pattern = _pattern(tuple(names))
    if pattern is None:
        return []
    plain, starts = folded(text)
    found = []
    for match in pattern.finditer(plain):
        assert match.lastgroup is not None
        end = starts[match.end()]
        while end > starts[match.start()] and text[end - 1].isspace():  # that are no character of the folded text
            end -= 1
        found.append((int(match.lastgroup[1:]), starts[match.start()], end))
    return found


def _find_joint(text: str, names: Sequence[str], joint: Sequence[int]) -> list[tuple[int, int, int]]:
    others = [number for number in range(len(names)) if number not in joint]
    found = [(others[at], start, end) for at, start, end in find_names(text, [names[number] for number in others])]
    for number in joint:
        places = [find_names(text, [part])[:1] for part in parts_of(names[number])]
        if all(places):
            found.append((number, min(place[0][1] for place in places), max(place[0][2] for place in places)))
    return sorted(found, key=lambda match: (match[1], -match[2]))


def mentions(text: str, name: str) -> bool:
    """Whether the text names it.

    >>> mentions("Two  T-Shirts", "t shirt"), mentions("a t-shirt", "shirt")
    (True, False)
    """
    return bool(find_names(text, [name]))


def similar_words(text: str, names: Sequence[str]) -> list[str]:
    """Words of a text that name nothing and may be the last word of a name in another form, as they are compared.

    They begin like it and end differently: one letter of it may be gone, two where it has letters beyond English ones,
    and three at most have come. Whether they mean it is for people to say.

    >>> similar_words("две красные кроссовки", ["кроссовка"]), similar_words("in den Schuhen", ["Schuh"])
    (['кроссовки'], ['schuhen'])
    >>> similar_words("two sneakers in a booth", ["sneaker", "boot"])
    ['booth']
    """
    lasts = [re.split("[ -]", as_compared(name))[-1] for name in names]
    found = []
    for word in re.findall(rf"{LETTER}+", as_compared(text)):
        for last in lasts:
            common = len(os.path.commonprefix([word, last]))
            needed = max(4, len(last) - (1 if last.isascii() else 2))
            if common >= needed and len(word) - common <= 3 and not find_names(word, [*names, *lasts]):
                found.append(word)
                break
    return found


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same word or words.

    >>> same_name("Van  Gogh", "van-gogh"), same_name("sneaker", "Sneakers"), same_name("boot", "ankle boot")
    (True, True, False)
    """
    return any((start, end) == _extent(one) for _, start, end in find_names(one, [other]))


def _extent(text: str) -> tuple[int, int]:
    return len(text) - len(text.lstrip()), len(text.rstrip())


def replace_names(text: str, names: Sequence[str], replacement: str) -> str | None:
    """The text with other words wherever it names something by one of its names, in the plural where the text has it;
    None: it does not.

    >>> replace_names("two red sneakers", ["sneaker", "gym shoe"], "boot")
    'two red boots'

    Of a joint name each part is replaced by that of the replacement, if it has as many.

    >>> replace_names("a pencil sketch of a red sneaker", ["pencil sketch + sneaker"], "photo + sneaker")
    'a photo of a red sneaker'
    """
    for name in names:
        pairs = list(zip(parts_of(name), parts_of(replacement), strict=False))
        if JOINT in name and len(pairs) == len(parts_of(name)) == len(parts_of(replacement)) and mentions(text, name):
            for part, other in pairs:
                text = text if part == other else replace_names(text, [part], other) or text
            return text
    spans = find_names(text, names)
    if not spans:
        return None
    parts, position = [], 0
    for number, start, end in spans:
        last_word = re.split("[ -]", as_compared(names[number]))[-1]
        shown = re.split("[ -]", as_compared(text[start:end]))[-1]
        plurals = (plural(last_word), *(form for form in forms(last_word) if len(form) > len(last_word)))
        many = shown.endswith(plurals) and not shown.endswith(last_word)
        parts += [text[position:start], _in_plural(replacement) if many else replacement]
        position = end
    return "".join([*parts, text[position:]])


def _in_plural(words: str) -> str:
    head, space, last = words.rpartition(" ")
    return head + space + plural(last) if last.isascii() and last.isalpha() and last.islower() else words
