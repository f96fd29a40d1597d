"""EvalAI answer normalisation, as the public TextVQA (M4C) evaluator does it."""

import re

# Correctly written contractions. The evaluator's table maps each of them from every spelling with exactly one
# apostrophe missing ("couldnt've" and "couldn'tve" for "couldn't've"), so the table is built from this list.
_CONTRACTIONS = (
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
)


CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS
    for place, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the evaluator's table; published scores depend on it

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
# The evaluator passes a flag (re.UNICODE = 32) as the argument `count`, so it removes at most 32 full stops.
FULL_STOP_LIMIT = 32


def normalise(text: str) -> str:
    """Return `text` normalised as the EvalAI evaluator compares it.

    Lower case; without punctuation, articles and most full stops; number words as digits; apostrophes restored.
    Source: TextVQA's M4C evaluator (docs/design.md 6.1), reproduced including its quirks.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if at_word_edge else " ")
    cleaned = FULL_STOP.sub("", cleaned, count=FULL_STOP_LIMIT)
    words = [NUMBERS.get(word, word) for word in cleaned.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
