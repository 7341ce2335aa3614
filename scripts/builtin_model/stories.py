# ruff: noqa: E501 - a slot of a form stays on one line
"""Free forms of the corpus: stories, letters, reviews, lists and the life of a request.

A form is a run of slots, one a line; of a slot's sentences, divided by ` / `, one is drawn. All are filled from one
cast of names, so that the sentences of a document fit together.
"""

from __future__ import annotations

from random import Random

from facts import BOYS, DAYS, GIRLS, LISTS

Slots = tuple[tuple[str, ...], ...]


def slots(table: str) -> Slots:
    return tuple(tuple(line.split(" / ")) for line in table.strip().splitlines())


PETS = ("dog", "cat", "rabbit", "duck", "mouse", "frog", "bear", "horse", "fox", "owl", "bird", "lamb")
THINGS = ("ball", "hat", "book", "kite", "key", "red boat", "blue cup", "small bell", "toy train", "umbrella")
PLACES = ("forest", "garden", "park", "village", "town", "farm", "valley", "house by the sea")
FEELINGS = ("happy", "glad", "proud", "cheerful", "calm")
TRAITS = ("kind", "curious", "brave", "clever", "quiet", "young", "little", "funny")
FOODS = ("bread", "soup", "cake", "apples", "cheese", "pancakes", "berries", "honey")
SKIES = ("sunny", "cloudy", "rainy", "windy", "warm", "cold", "bright", "foggy")
ACTIVITIES = (
    "read books",
    "play in the park",
    "walk by the river",
    "cook soup",
    "bake bread",
    "swim in the lake",
    "listen to music",
    "draw pictures",
    "ride a bicycle",
    "learn new words",
    "play football",
    "look at the stars",
    "work in the garden",
    "write programs",
)
JOBS = ("teacher", "doctor", "baker", "farmer", "student", "driver", "painter", "nurse", "cook", "programmer")
TOWNS = (
    "San Francisco",
    "Paris",
    "Berlin",
    "London",
    "Rome",
    "Tokyo",
    "Lisbon",
    "Madrid",
    "Oslo",
    "New York",
)

OPENING = slots("""
Once upon a time, there was a {trait} {pet} named {name} who lived in a {place}. / Once upon a time, there was a {trait} {pet} who lived in a {place}. {Their} name was {name}. / Once upon a time, a {trait} {pet} named {name} lived in a {place}. / Long ago, in a {place}, there lived a {trait} {pet} named {name}. / There once was a {trait} {pet} called {name}. / In a {place} far away lived a {pet} named {name}. / Once there was a {trait} {person} named {name} who had a {pet}. / Once upon a time, there was a {trait} {person} named {name}. / {name} was a {trait} {person} who lived in a {place}.
""")
LOST = slots("""
One {sky} day, {name} lost {their} {thing}. / One {day} morning, {name} could not find {their} {thing}.
{They} looked under the bed and behind the door. / {They} looked everywhere, but it was not there. / {name} was very sad.
{They} asked {friend}, "Have you seen my {thing}?" / Then {friend} came by and asked, "What is wrong?"
"Let us look for it together," said {friend}. / "I will help you," said {friend}. / {friend} said, "Do not be sad. We will find it."
They walked through the {place} until it was dark. / They looked near the river and under the big tree. / They looked for a long time.
At last they found the {thing} under a tree. / In the end the {thing} was in the kitchen. / Then {name} saw the {thing} on the grass.
{name} was very {feeling} and said, "Thank you, {friend}!" / {name} and {friend} were {feeling} and ate some {food}. / From that day on, {name} and {friend} were good friends.
""")
RAIN = slots("""
One day it began to rain. / One {day} the rain came down and did not stop. / One evening a great storm came.
{name} ran home, but the way was long. / {name} was wet and cold. / {They} had no umbrella.
{They} saw a small house with a light in the window. / {They} came to the house of {friend}.
{friend} opened the door and said, "Come in and get warm." / "Come in!" said {friend}. "There is room for two."
They sat by the fire and ate {food}. / They drank hot tea and told stories. / They ate {food} and listened to the rain.
In the morning the sun was shining. / When the rain stopped, there was a rainbow in the sky. / The next day the sky was blue again.
{name} said, "A friend is better than an umbrella." / {name} went home and was {feeling}. / And {name} never forgot how kind {friend} was.
""")
SHARE = slots("""
One morning {name} made some {food}. / One day {name} found a basket of {food}. / {name} loved {food} more than anything.
{They} wanted to eat it all alone. / It smelled so good that {friend} came to look. / Soon {friend} knocked on the door.
"I am hungry," said {friend}. / {friend} asked, "May I have a little?" / {friend} had nothing to eat.
{name} thought for a moment. / At first {name} said no. / {name} looked at the {food} and then at {friend}.
Then {they} gave {friend} half of it. / Then {they} smiled and said, "Yes, let us share." / "There is enough for both of us," said {name}.
They ate together in the sun. / They sat down and ate until nothing was left. / It tasted better with a friend.
{name} learned that it is good to share. / After that they ate together every {day}. / That night {name} slept well and was {feeling}.
""")
LEARN = slots("""
{name} wanted to learn how to {activity}. / More than anything, {name} wanted to {activity}. / One {day} {name} said, "I want to {activity}."
The first try was bad. / At first it was very hard. / {They} tried and failed.
"Try again," said {friend}. / {friend} said, "Everything is hard before it is easy." / {friend} showed {them} how to do it.
So {name} tried again and again. / {name} tried every day for a week. / {They} did not give up.
Step by step it went better. / On {day} it went a little better. / After many days it was easy.
At last {name} could do it. / In the end it worked, and everybody was {feeling}. / Now {name} could do it alone.
{name} was {feeling} and thanked {friend}. / "You see," said {friend}, "you only had to try." / Now {name} teaches others.
""")
TRAVEL = slots("""
One {sky} day, {name} wanted to see the world. / One day {name} packed a bag and left home.
{They} took the train to {town}. / {They} went to {town} by ship. / {They} walked for three days and came to {town}.
There {they} met {friend}. / In the station {they} met {friend}, who knew the way. / {friend} showed {them} the city.
They saw bridges, markets and tall houses. / They ate {food} in the market. / They walked along the streets and listened to music.
But at night {name} thought of home. / It was beautiful, but it was not home. / After a week {name} was tired.
So {they} said goodbye and went back. / "Come again," said {friend} when {name} left. / {They} took the next train back.
At home everybody was {feeling} to see {them}. / {name} was {feeling} to be home again. / And {they} told this story to everybody.
""")
EVERYDAY = slots("""
Hello, my name is {name} and I live in {town}. / Hello, my name is {name}. / My name is {name}, and I am a {job}. / Hello! I am {name} from {town}.
I am a {job}. / I work as a {job} in {town}. / I have a {pet}. / I am {age} years old. / My best friend is called {other}.
I like to {activity}. / On {day} I {activity}. / Every morning I eat {food} and drink {drink}. / In the evening I like to {activity}.
Yesterday I went to {town} with {other}. / Yesterday it was {sky}, so we stayed at home. / Last {day} we went to the market to buy {food}. / My favorite food is {food}. / I would like to visit {town} one day. / I want to {activity} and to eat {food}.
Today the weather is {sky}. / Today is {day}. / Today I want to {activity}. / Tomorrow I will visit {other}.
What do you like to do? / How are you today? / It is nice to meet you. / Have a nice day! / Thank you for reading.
""")
SOMEBODY = slots("""
{name} is a {job} in {town}. / {name} lives in {town} with a {pet}. / {name} is a {trait} {job}. / {name} and {other} are good friends.
Every {day} {they} likes to {activity}. / In the morning {they} drinks {drink} and eats {food}. / {They} gets up early and goes to work.
{They} has a {pet} and a {thing}. / {Their} friend {other} is a {job}. / {They} likes {food}, and {other} likes {drink}.
When it is {sky}, {they} stays at home. / On {day} {they} goes to the market to buy {food}. / {They} wants to learn how to {activity}.
{name} is {feeling} today. / At night {they} reads a book and goes to sleep. / Life in {town} is good.
""")
LETTER = slots("""
Dear {other},{br} / Hello {other},{br} / Hi {other},{br}
Thank you for your letter. / How are you? I am fine. / I am writing to you from {town}. / I hope you are well.
Here in {town} the weather is {sky}. / Yesterday I went to {town}. / On {day} I will {activity}. / My {pet} is well and eats too much.
Please come and visit me soon. / Can you come on {day}? / Do you still like to {activity}? / Please send me your {thing}.
{br}Best wishes,{br}{name} / {br}Yours,{br}{name} / {br}See you soon,{br}{name}
""")
REQUEST = slots("""
A client sends a prompt to the server. / First, a client sends a job. / A request begins at the client. / The life of a job begins when a client sends it.
The server checks the job and stores it. / The server gives the job a name and puts it in the queue. / The job is stored and waits in the queue.
A worker takes the job from the queue. / Then a free worker claims the job and holds a lease. / Soon a worker asks the queue for work.
The engine reads the prompt and keeps it in the cache. / The engine runs the prompt on the GPU. / In the first step the engine reads the whole prompt.
In every step each request of the batch gets one token. / Then the model makes one token after another. / Many requests share each step, so the GPU is busy.
When the last token is made, the worker sends the result. / The result goes back to the client. / At the end the job is completed and the client gets its text.
The trace shows how long each part took. / One trace shows the whole way, from the client to the last token. / If a worker stops, the job goes back to the queue.
""")
COUNSEL = slots("""
The best way to learn is to try. / The best way to {activity} is to begin early. / If you want to {activity}, begin today. / The best time to {activity} is on {day}.
Take your time and do one thing after another. / Ask a friend when you need help. / Do a little every day. / First think, then act.
Drink enough water and sleep well. / Eat {food} and go for a walk. / When you are tired, rest. / Be kind to others.
The future of work is in good tools and good friends. / The future of computing is fast, small and open. / The meaning of life is to be kind and to learn. / In the end, small steps go a long way.
""")
STORIES = (LOST, RAIN, SHARE, LEARN, TRAVEL)

GOOD = ("wonderful", "great", "excellent", "very good", "lovely", "delicious", "perfect", "fast and friendly")
BAD = ("terrible", "awful", "bad", "very slow", "dirty", "boring", "too loud", "cold and rude")
REVIEWED = (
    "food",
    "soup",
    "room",
    "film",
    "book",
    "service",
    "music",
    "hotel",
    "staff",
    "coffee",
    "trip",
    "view",
)
GOOD_END = ("I loved it.", "I will come back.", "I was very happy.", "Thank you!", "I can recommend it.")
BAD_END = (
    "I did not like it.",
    "Never again.",
    "I was very sad.",
    "I want my money back.",
    "I will not come back.",
)
LABEL_FORMS = (
    "Review: {text}\nSentiment: {label}",
    "Text: {text}\nLabel: {label}",
    "{text} This review is {label}.",
    "Is this review positive or negative? {text}\nAnswer: {label}",
)


def cast(rng: Random) -> dict[str, str]:
    """One consistent filling for every slot of a document."""
    is_girl = rng.random() < 0.5
    name, other = rng.sample(GIRLS if is_girl else BOYS, 2)
    they, them, their, person = ("she", "her", "her", "girl") if is_girl else ("he", "him", "his", "boy")
    friend = rng.choice((other, rng.choice(GIRLS), rng.choice(BOYS), f"the {rng.choice(PETS)}"))
    fill = {
        "name": name,
        "friend": friend if friend != name else "the old owl",
        "other": other,
        "they": they,
        "They": they.capitalize(),
        "them": them,
        "their": their,
        "Their": their.capitalize(),
        "person": person,
        "day": rng.choice(DAYS),
        "age": str(rng.randint(8, 60)),
        "drink": rng.choice(LISTS["drinks"]),
        "br": "\n",
    }
    pools = {
        "pet": PETS,
        "thing": THINGS,
        "place": PLACES,
        "feeling": FEELINGS,
        "trait": TRAITS,
        "food": FOODS,
        "sky": SKIES,
        "activity": ACTIVITIES,
        "job": JOBS,
        "town": TOWNS,
    }
    return fill | {slot: rng.choice(pool) for slot, pool in pools.items()}


def told(rng: Random, slots: Slots) -> str:
    fill = cast(rng)
    lines = [rng.choice(slot).format(**fill) for slot in slots]
    # A name that opens a sentence may be "the fox".
    return " ".join(line[:1].upper() + line[1:] for line in lines).replace("\n ", "\n").replace(" \n", "\n")


def story(rng: Random) -> str:
    return told(rng, OPENING + rng.choice(STORIES))


def everyday(rng: Random) -> str:
    return told(rng, rng.choice((EVERYDAY, SOMEBODY, LETTER, COUNSEL)))


def request(rng: Random) -> str:
    return told(rng, REQUEST)


def weather_sentence(rng: Random, town: str) -> str:
    first, second = rng.sample(SKIES, 2)
    forms = (
        f"The weather in {town} is {first} today.",
        f"Today it is {first} in {town}.",
        f"Today it is {first} and {second} in {town}.",
        f"It is {rng.randint(-5, 35)} degrees and {first} in {town}.",
        f"Tomorrow it will be {first} in {town}.",
        f"On {rng.choice(DAYS)} it was {first} in {town}.",
    )
    return rng.choice(forms)


def review(rng: Random) -> str:
    """One to four labelled opinions in one form."""
    form = rng.choice(LABEL_FORMS)
    lines = []
    for _ in range(rng.randint(1, 4)):
        label = rng.choice(("positive", "negative"))
        words, ends = (GOOD, GOOD_END) if label == "positive" else (BAD, BAD_END)
        a, b = rng.sample(REVIEWED, 2)
        text = rng.choice(
            (
                f"The {a} was {rng.choice(words)}.",
                f"The {a} was {rng.choice(words)} and the {b} was {rng.choice(words)}.",
                f"The {a} was {rng.choice(words)}. {rng.choice(ends)}",
                f"{rng.choice(ends)} The {a} was {rng.choice(words)}.",
            )
        )
        lines.append(form.format(text=text, label=label))
    return "\n".join(lines)


def listing(rng: Random) -> str:
    kind = rng.choice(tuple(LISTS))
    count = rng.randint(2, min(5, len(LISTS[kind])))
    members = rng.sample(LISTS[kind], count)
    word = {2: "two", 3: "three", 4: "four", 5: "five"}[count]
    joined = f"{', '.join(members[:-1])} and {members[-1]}"
    forms = (
        f"List {word} {kind}: {joined}.",
        f"Q: Name {word} {kind}.\nA: {joined[:1].upper()}{joined[1:]}.",
        f"Here are {word} {kind}: {joined}.",
        f"Some {kind} are {joined}.",
        f"I know {word} {kind}: {joined}.",
        f"Name {word} {kind}.\n" + "\n".join(f"- {member}" for member in members),
    )
    return rng.choice(forms)


FREE_FORMS = (story, story, story, story, everyday, everyday, request, review, listing)
