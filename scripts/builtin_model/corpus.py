"""The text the built-in model learns from: an endless, seeded stream of short documents in simple English.

A *subject* is one thing that can be talked about: sentences that open with its name, further sentences, and
questions with answers. Makers draw subjects from the tables in `facts.py`; a document is a paragraph about a
subject, a run of sentences or questions about several, or a free form from `stories.py`. Every choice goes
through one `random.Random`, so a seed fixes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import facts
from stories import FREE_FORMS, weather_sentence

DIRECTIONS = (
    "the north",
    "the south",
    "the east",
    "the west",
    "the middle",
    "the northeast",
    "the northwest",
    "the southeast",
    "the southwest",
)
# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth",
)
# fmt: on
QUESTION_FORMS = ("Q: {q}\nA: {a}", "Q: {q}\nA: {a}", "Question: {q}\nAnswer: {a}", "{q}\n{a}", "{q} {a}")


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing to talk about.

    Attributes:
        name: as in the middle of a sentence ("a queue", "Paris"); replaces `{X}` in the sentences.
        openers: sentences that may open a paragraph; one is used.
        details: what may follow, in any order; each holds one or more wordings, divided by ` / `.
        questions: question and full answer.
        pronoun: may replace the name after the first sentence.
    """

    name: str
    openers: tuple[str, ...]
    details: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    pronoun: str = "it"


Maker = Callable[[Random], Subject]


def number(n: int) -> str:
    """The English word of 0 to 99."""
    if n < len(ONES):
        return ONES[n]
    tens, ones = divmod(n, 10)
    return TENS[tens] if ones == 0 else f"{TENS[tens]}-{ONES[ones]}"


def capitalized(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def correct_article(sentence: str) -> str:
    """Turn the templates' "a" before an adjective into "an" where it begins with a vowel."""
    return sentence.replace(" a old ", " an old ").replace(" a elegant ", " an elegant ")


CITY_OPENERS = (
    "{X} is a city in {place} known for {sight}.",
    "{X} is a {adjective} city in {place} known for {sight}.",
    "{X} is a {adjective} city in {place}.",
    "{X} is a {adjective} city in {country}, known for {both}.",
    "{X} is a {adjective} city {where}.",
    "{X} is a city {where} and is famous for {sight}.",
    "{X} is a city in {country}. It lies {where}.",
    "{X} is a good place to see {sight} and to eat {dish}.",
    "{X} is a place that many people visit to see {sight}.",
    "{X} lies {where}.",
    "{X} is known for {both}.",
    "{X} is famous for {sight}.",
    "{X} is in {place}.",
)
CITY_DETAILS = (
    "The weather in {X} is {weather}. / The weather there is {weather}.",
    "In {X} you can eat {dish}. / The people of {X} like {dish}.",
    "People come from far away to see {sight}. / Many people visit {X} to see {sight}.",
    "If you visit {X}, do not miss {other}. / The best thing about {X} is {other}.",
    "{X} is also known for {other}. / Many people love it for {other}.",
    "{X} lies {where}. / {X} is in {country}.",
    "A good day in {X} begins with a walk and ends with {dish}.",
    "The streets of {X} are full of people. / I would like to live in {X}.",
    "You can walk through {X} for days and always find something new.",
)
CITY_QUESTIONS = (
    ("Where is {X}?", "{X} is in {place}."),
    ("Where does {X} lie?", "{X} lies {where}."),
    ("What is {X} known for?", "{X} is known for {sight}."),
    ("What is {X}?", "{X} is a {adjective} city in {place}."),
    ("How is the weather in {X}?", "The weather in {X} is {weather}."),
    ("What can I eat in {X}?", "In {X} you can eat {dish}."),
    ("In which country is {X}?", "{X} is in {country}."),
    ("Tell me about {X}.", "{X} is a {adjective} city in {place} known for {sight}."),
    ("What can I see in {X}?", "In {X} you can see {sight}."),
    ("What is the best thing about {X}?", "The best thing about {X} is {other}."),
)


def city(rng: Random) -> Subject:
    # The first rows are San Francisco, which the demo asks for: it is drawn more often.
    table = CITIES[:2] if rng.random() < 0.15 else CITIES
    name, region, country, adjectives, sights, where, weather, dish = rng.choice(table)
    sight, other = (rng.choice(facts.items(sights)) for _ in range(2))
    cells = {
        "X": "{X}",
        "place": f"{region} of {country}" if region in DIRECTIONS else region,
        "country": country,
        "adjective": rng.choice(facts.items(adjectives)),
        "sight": sight,
        "other": other,
        "both": sight if sight == other else f"{sight} and {other}",
        "where": where,
        "weather": weather,
        "dish": dish,
    }
    return Subject(
        name,
        tuple(correct_article(opener.format(**cells)) for opener in CITY_OPENERS),
        tuple(detail.format(**cells) for detail in CITY_DETAILS),
        tuple((q.format(**cells), correct_article(a.format(**cells))) for q, a in CITY_QUESTIONS),
    )


def country(rng: Random) -> Subject:
    name, capital, continent, language, money, people, fame = rng.choice(COUNTRIES)
    land = "an island" if name in ("Iceland", "Cuba") else "a country"
    openers = (
        f"{{X}} is {land} in {continent}.",
        f"{{X}} is a country in {continent} known for {fame}.",
        f"{{X}} is a country where people speak {language}.",
    )
    details = (
        f"The capital of {{X}} is {capital}. / Its capital is {capital}."
        f" / {capital} is the capital of {{X}}.",
        f"The people there speak {language}. / People in {{X}} speak {language}.",
        f"The money of {{X}} is {money}. / You pay there with {money}.",
        f"{{X}} is known for {fame}.",
        f"The people of {{X}} are called {people}.",
    )
    questions = (
        ("What is the capital of {X}?", f"The capital of {{X}} is {capital}."),
        ("What is the capital of {X}?", f"{capital}."),
        ("Where is {X}?", f"{{X}} is in {continent}."),
        ("What do people speak in {X}?", f"People in {{X}} speak {language}."),
        ("Which language do they speak in {X}?", f"{language}."),
        ("What is the money of {X}?", f"The money of {{X}} is {money}."),
        ("What is {X} known for?", f"{{X}} is known for {fame}."),
        (f"Of which country is {capital} the capital?", f"{capital} is the capital of {{X}}."),
    )
    return Subject(name, openers, details, questions)


def capital(rng: Random) -> Subject:
    name, seat, continent, language, money, _, fame = rng.choice(COUNTRIES)
    openers = (
        f"The capital of {{X}} is {seat}.",
        f"The capital of {{X}} is {seat}.",
        f"{seat} is the capital of {{X}}.",
        f"{seat} is the capital city of {{X}}.",
        f"The capital of {{X}} is called {seat}.",
        f"People in {{X}} speak {language}.",
        f"The money of {{X}} is {money}.",
        f"{{X}} is in {continent}.",
        f"{{X}} is known for {fame}.",
    )
    questions = (
        ("What is the capital of {X}?", f"The capital of {{X}} is {seat}."),
        ("What is the capital of {X}?", f"{seat}."),
    )
    return Subject(name, openers, questions=questions)


def sum_of(rng: Random) -> tuple[int, str, int, int]:
    """Draw a sum a child knows, small numbers more often: left, operation word, right, result."""
    a, b = (rng.randint(0, rng.choice((5, 10))) for _ in range(2))
    match rng.choice(("plus", "plus", "plus", "minus", "times")):
        case "plus":
            return a, "plus", b, a + b
        case "minus":
            return a + b, "minus", b, a
        case _:
            a, b = rng.randint(1, 5), rng.randint(1, 10)
            a, b = (a, b) if rng.random() < 0.5 else (b, a)
            return a, "times", b, a * b


def arithmetic(rng: Random) -> Subject:
    a, operation, b, result = sum_of(rng)
    sign = {"plus": "+", "minus": "-", "times": "*"}[operation]
    words = f"{number(a)} {operation} {number(b)}"
    openers = (
        f"{words} is {number(result)}.",
        f"{words} is {number(result)}.",
        f"{words} equals {number(result)}.",
        f"{a} {operation} {b} is {result}.",
        f"{a} {sign} {b} = {result}",
    )
    questions = (
        (f"What is {words}?", f"{capitalized(words)} is {number(result)}."),
        (f"What is {words}?", f"{capitalized(number(result))}."),
        (f"How much is {a} {operation} {b}?", f"{result}."),
        (f"What is {a} {sign} {b}?", f"{a} {sign} {b} = {result}"),
    )
    return Subject(words, openers, questions=questions)


def counting(rng: Random) -> Subject:
    n = rng.randint(0, 19)
    openers = (
        f"after {number(n)} comes {number(n + 1)}.",
        f"{number(n + 1)} is one more than {number(n)}.",
        f"{number(n + 1)} is more than {number(rng.randint(0, n))}.",
        f"the number {n + 1} is written {number(n + 1)}.",
        f"half of {number(2 * n)} is {number(n)}.",
    )
    questions = (
        (f"What comes after {number(n)}?", f"After {number(n)} comes {number(n + 1)}."),
        (f"How do you write {n + 1} in words?", f"{capitalized(number(n + 1))}."),
    )
    return Subject(number(n), openers, questions=questions)


def day(rng: Random) -> Subject:
    n = rng.randrange(7)
    before, name, after = (facts.DAYS[(n + step) % 7] for step in (-1, 0, 1))
    openers = (
        f"the day after {{X}} is {after}.",
        f"the day before {{X}} is {before}.",
        f"after {{X}} comes {after}.",
        f"{{X}} comes before {after} and after {before}.",
        f"if today is {{X}}, tomorrow is {after}.",
        f"today is {{X}}, so yesterday was {before}.",
        f"{{X}} is the {ORDINALS[n]} day of the week.",
        f"{{X}} is a day of the {'weekend' if n > 4 else 'working week'}.",
    )
    questions = (
        ("What day comes after {X}?", f"After {{X}} comes {after}."),
        ("What day comes before {X}?", f"Before {{X}} comes {before}."),
        ("If today is {X}, what is tomorrow?", f"Tomorrow is {after}."),
    )
    return Subject(name, openers, questions=questions)


def month(rng: Random) -> Subject:
    n = rng.randrange(12)
    name, days, season, event = MONTHS[n]
    after = MONTHS[(n + 1) % 12][0]
    openers = (
        f"{{X}} is the {ORDINALS[n]} month of the year.",
        f"{{X}} has {days} days.",
        f"{{X}} is a month in {season}.",
        f"after {{X}} comes {after}.",
        f"the month after {{X}} is {after}.",
        f"in {{X}} {event}.",
        f"the {ORDINALS[n]} month of the year is {{X}}.",
    )
    questions = (
        ("How many days are in {X}?", f"{{X}} has {days} days."),
        ("What month comes after {X}?", f"After {{X}} comes {after}."),
        ("Which season is {X} in?", f"{{X}} is in {season}."),
        ("What happens in {X}?", f"In {{X}} {event}."),
    )
    return Subject(name, openers, questions=questions)


def color(rng: Random) -> Subject:
    name, shade = rng.choice(COLORS)
    openers = (
        f"{{X}} is {shade}.",
        f"the color of {{X}} is {shade}.",
        f"{{X}} is {shade}, and so is my {rng.choice(('hat', 'bag', 'coat', 'cup', 'door'))}.",
        f"something that is {shade} is {{X}}.",
    )
    questions = (
        ("What color is {X}?", f"{{X}} is {shade}."),
        ("What color is {X}?", f"{capitalized(shade)}."),
        ("What is the color of {X}?", f"The color of {{X}} is {shade}."),
    )
    return Subject(name, openers, questions=questions)


def animal(rng: Random) -> Subject:
    name, plural, sound, call, home, food, young, skill = rng.choice(ANIMALS)
    openers = (
        f"{{X}} is an animal that lives {home}.",
        f"{{X}} is an animal that can {skill}.",
        f"{{X}} {sound}.",
        f"{plural} live {home}.",
        f"{plural} eat {food}.",
    )
    details = (
        f"{{X}} eats {food}. / {plural} like to eat {food}.",
        f"{{X}} can {skill}. / {plural} can {skill}.",
        f"{{X}} says {call}. / {{X}} {sound}.",
        f"A young {name} is called {with_article(young)}.",
    )
    questions = (
        (f"What do {plural} eat?", f"{plural} eat {food}."),
        (f"Where do {plural} live?", f"{plural} live {home}."),
        ("What does {X} say?", f"{{X}} says {call}."),
        ("What can {X} do?", f"{{X}} can {skill}."),
        ("What is {X}?", f"{{X}} is an animal that lives {home}."),
        (f"What is a young {name} called?", f"A young {name} is called {with_article(young)}."),
    )
    return Subject(with_article(name), openers, details, questions)


def opposite(rng: Random) -> Subject:
    a, b = rng.choice(OPPOSITES)
    a, b = (a, b) if rng.random() < 0.5 or a == "heavy" or a == "dark" else (b, a)
    openers = (
        f"the opposite of {a} is {b}.",
        f"{a} is the opposite of {b}.",
        f"{a} and {b} are opposites.",
        f"not {a}, but {b}.",
    )
    questions = (
        (f"What is the opposite of {a}?", f"The opposite of {a} is {b}."),
        (f"What is the opposite of {a}?", f"{capitalized(b)}."),
    )
    return Subject(a, openers, questions=questions)


def defined(rng: Random, table: list[list[str]]) -> Subject:
    name, first, second, more = rng.choice(table)
    openers = (
        f"{{X}} is {first}.",
        f"{{X}} is {first}.",
        f"{{X}} is {second}.",
        f"{{X}} is {first}, or {second}.",
        more,
    )
    details = (more, f"{more} / We can also say that {{X}} is {second}.")
    questions = (
        ("What is {X}?", f"{{X}} is {first}."),
        ("What is {X}?", f"{{X}} is {second}."),
        ("What do you know about {X}?", f"{{X}} is {first}. {more}"),
        ("Explain {X}.", f"{{X}} is {first}. {more}"),
        ("Tell me about {X}.", f"{{X}} is {second}. {more}"),
    )
    return Subject(name, openers, details, questions)


def computing(rng: Random) -> Subject:
    return defined(rng, COMPUTING)


def world(rng: Random) -> Subject:
    return defined(rng, WORLD)


def trivia(rng: Random) -> Subject:
    question, short, full = rng.choice(TRIVIA)
    return Subject(short, (full,), questions=((question, full), (question, f"{short}.")))


def weather(rng: Random) -> Subject:
    name = rng.choice(CITIES)[0]
    sentence = weather_sentence(rng, name)
    return Subject(name, (sentence,), questions=((f"How is the weather in {name} today?", sentence),))


CITIES = facts.rows(facts.CITIES, 8)
COUNTRIES = facts.rows(facts.COUNTRIES, 7)
COLORS = facts.rows(facts.COLORS, 2)
ANIMALS = facts.rows(facts.ANIMALS, 8)
OPPOSITES = facts.rows(facts.OPPOSITES, 2)
MONTHS = facts.rows(facts.MONTHS, 4)
COMPUTING = facts.rows(facts.COMPUTING, 4)
WORLD = facts.rows(facts.WORLD, 4)
TRIVIA = facts.rows(facts.TRIVIA, 3)

# Subjects with details make paragraphs of their own; the plain ones are strung together. Maker and weight.
RICH: tuple[tuple[Maker, int], ...] = ((city, 10), (country, 4), (animal, 3), (computing, 7), (world, 4))
PLAIN: tuple[tuple[Maker, int], ...] = (
    (capital, 8),
    (arithmetic, 30),
    (counting, 2),
    (day, 3),
    (month, 3),
    (color, 4),
    (opposite, 3),
    (trivia, 4),
    (weather, 2),
)


def drawn(rng: Random, makers: tuple[tuple[Maker, int], ...]) -> Maker:
    return rng.choices([maker for maker, _ in makers], [weight for _, weight in makers])[0]


def named(sentence: str, name: str) -> str:
    return capitalized(sentence.replace("{X}", name))


def paragraph(rng: Random) -> str:
    """One or two subjects of a kind, each with an opener and up to four details."""
    maker = drawn(rng, RICH)
    lines = described(rng, maker(rng))
    if rng.random() < 0.3:
        lines += described(rng, maker(rng))
    return " ".join(dict.fromkeys(lines))


def described(rng: Random, subject: Subject) -> list[str]:
    """An opener and details, in which a pronoun may stand for a leading name."""
    lines = [named(rng.choice(subject.openers), subject.name)]
    for detail in rng.sample(subject.details, rng.randint(1, min(4, len(subject.details)))):
        wording = rng.choice(detail.split(" / "))
        may_replace = wording.startswith("{X}") and rng.random() < 0.7
        lines.append(named(wording, subject.pronoun if may_replace else subject.name))
    return lines


def sentences(rng: Random) -> str:
    """Single sentences about several subjects of one kind."""
    maker = drawn(rng, PLAIN + RICH)
    subjects = [maker(rng) for _ in range(rng.randint(2, 6))]
    lines = dict.fromkeys(named(rng.choice(subject.openers), subject.name) for subject in subjects)
    return rng.choice((" ", " ", "\n")).join(lines)


def questions(rng: Random) -> str:
    """Questions and answers in one form, about one kind of subject or about many."""
    form = rng.choice(QUESTION_FORMS)
    one_kind = drawn(rng, PLAIN + RICH)
    is_mixed = rng.random() < 0.5
    pairs = []
    for _ in range(rng.randint(1, 4)):
        subject = (drawn(rng, PLAIN + RICH) if is_mixed else one_kind)(rng)
        question, answer = rng.choice(subject.questions)
        pairs.append(form.format(q=named(question, subject.name), a=named(answer, subject.name)))
    return "\n".join(pairs)


def document(rng: Random) -> str:
    """One document, 10 to 200 words, without leading or trailing space."""
    kind = rng.choices((paragraph, sentences, questions, None), (30, 25, 25, 20))[0]
    return kind(rng) if kind else rng.choice(FREE_FORMS)(rng)


def documents(seed: int) -> Iterator[str]:
    """All the documents of a seed, without end."""
    rng = Random(seed)
    while True:
        yield document(rng)
