"""Write the quickstart's data: a support desk's messages, each answered with one compact JSON object.

    python tools/quickstart_data.py           rewrite train.jsonl and test.jsonl
    python tools/quickstart_data.py --check   exit 1 if the files on disk are not what would be written

The desk's rules, which a fine-tuned model has to pick up from the training rows alone:

intent   what the writer is after.
         refund: money back for something received.  delivery: a parcel on its way, late, lost or misdirected.
         defect: a product that is broken or incomplete.  account: signing in, or the customer's own data.
         howto: how to use or look after a product.  cancel: stop an order or a plan not yet fulfilled
         (it stays cancel when a deposit is asked back along with it).
product  the catalogue's name, however the writer spells it; null when no product is named.
refund   the amount asked back, as a number; null when none is asked back. Prices, order numbers and dates
         which are merely mentioned do not count.

Products are shared by both files. Everything else is worded twice, once in TRAIN and once in TEST, so that
the test score tells whether the rules were learned and not whether sentences were remembered.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20
FOLDER = Path(__file__).resolve().parent.parent / "tunesmith" / "recipes" / "quickstart"

PRODUCTS = (
    "Orrin kettle",
    "Velda lamp",
    "Tasko drill",
    "Mirrow fan",
    "Dunmor heater",
    "Pellix scale",
    "Quibby speaker",
    "Zanto mixer",
)
MONTHS = ("January", "March", "April", "May", "June", "August", "October", "December")
CURRENCIES = ("${}", "${}", "£{}", "{} euros", "EUR {}")


def phrases(text: str) -> list[str]:
    """One phrase a line, or several on a line with bars between them: keeps the banks readable."""
    return [phrase.strip() for phrase in re.split(r"[|\n]", text) if phrase.strip()]


@dataclass(frozen=True)
class Bank:
    """All wordings of one file.

    Slots: {p} product, {a} amount asked back, {x} price merely mentioned, {n} order number, {d} date.
    """

    intents: dict[str, list[str]]
    asides: list[str]
    greetings: list[str]
    closings: list[str]


TRAIN = Bank(
    intents={
        "refund": phrases("""
            Please refund the {a} I paid for the {p}. | I want my {a} back for the {p}.
            I sent the {p} back, so please return my {a}. | Could you pay back {a} for the {p}?
            You charged me twice for the {p}, please refund {a}. | I get a refund of {a} for the {p}, don't I?
            The {p} is not for me. I would like the {a} refunded.
            I returned one item of my {x} order, the {p}, and am owed {a}.
            My {p} was {x}, then you lowered the price. Please refund {a}.
            I paid {x} with the {p} in it and want {a} of that back.
            When will I get the {a} for the returned {p}? | Please give me {a} back, I was charged too much.
            Order {n}: the {p} went back to you, kindly refund {a}.
            My return reached you on {d}. I want the {a} refunded.
            I was billed {x} and want {a} of it returned. | Please transfer the {a} for my returned goods.
            """),
        "delivery": phrases("""
            Where is my {p}? | My {p} has still not arrived. | Tracking for the {p} has not moved for a week.
            The {p} should have come on {d}, but nothing came. | When will the {p} be delivered?
            The courier left my {p} at the wrong house. | I paid {x} for the {p} and it never got here.
            Has the {p} from order {n} been shipped yet? | Can you send the {p} to my office address instead?
            The {p} is marked as delivered, but I have no parcel. | My parcel is late.
            The tracking link for order {n} shows nothing. | Has my {x} order left your warehouse?
            The driver did not ring and took my parcel away again.
            """),
        "defect": phrases("""
            My {p} stopped working. | The {p} does not turn on any more. | The {p} arrived with a crack in it.
            A screw is missing from my {p}. | My new {p} makes a loud noise and smells odd.
            I paid {x} for the {p} and it is already broken. | The button of the {p} is stuck.
            The {p} I got on {d} is faulty. | The cable of my {p} is damaged. | It came out of the box broken.
            The {p} shuts off after a minute, can you repair it? | The {x} {p} died after two days.
            The display is dead and I need a repair. | The thing from order {n} has a loose handle.
            One part was missing in the box.
            """),
        "account": phrases("""
            I cannot log in to register my {p}. | My password is refused when I try to add the {p}.
            The {p} does not show up under my profile. | The site locks me out whenever I open my {p} page.
            Please change the email on file, the one I used for the {p}. | I forgot my password.
            I bought the {p} as a guest, can you move it to my profile? | The reset mail never comes.
            Please change my phone number in your records. | My login is blocked since {d}.
            I have two profiles, please merge them. | My surname is misspelled in my profile.
            I cannot log in to see order {n}. | Please update the card saved in my profile.
            """),
        "howto": phrases("""
            How do I clean the {p}? | How do I set the timer on the {p}? | Can I use the {p} outdoors?
            Which setting of the {p} is best for a small room? | What does the red light on the {p} mean?
            Is there a manual for the {p}? | How do I connect the {p} to my phone?
            How often should I oil the {p}? | I got the {p} for {x}. How do I put it together?
            Can you explain the eco mode of my {p}? | How do I change the battery?
            Which cleaner may I use on the lid? | How do I turn the beep off?
            Where do I find the instructions?
            """),
        "cancel": phrases("""
            Please cancel my order for the {p}. | I ordered the {p} by mistake, please cancel it.
            Cancel the {p} in order {n}. | I no longer need the {p}, do not ship it.
            I found the {p} cheaper than {x}, so cancel my order. | Please cancel the care plan for my {p}.
            Please cancel the {p} and refund the {a} deposit. | Take the {p} off my order before it ships.
            Stop my order of the {p} and send the {a} I put down back. | Please cancel order {n}.
            I cancel the {p}; please return my {a} advance. | I want to stop my {x} a month plan.
            Cancel my plan and refund the {a} for this month. | Please do not renew my subscription.
            """),
    },
    asides=phrases("""
        My order number is {n}. | I bought it on {d}. | It cost {x}. | I paid {x} in all. | I am not happy.
        I ordered it today. | My neighbour is very pleased with hers. | I have been a customer for 6 years.
        It was a birthday present. | The invoice says {x}. | I wrote to you on {d}. | This is really annoying!
        I saw it for {x} elsewhere.
        """),
    greetings=phrases("Hello, | Hi! | Dear team, | Good morning, | Hey,"),
    closings=phrases("Thanks a lot! | Best regards, Anna | Thank you. | Kind regards, Tom | Cheers, Lee"),
)

TEST = Bank(
    intents={
        "refund": phrases("""
            Kindly reimburse me {a} for the {p}. | I'd like {a} returned to my card for the {p} I sent you.
            My {p} went back last week and the refund of {a} is still missing.
            I was overcharged for the {p}, so I am asking for {a} back. | Can I get {a} back on my {x} bill?
            Out of the {x} on my bill, {a} for the {p} should be refunded.
            May I have my money back for the {p}? It is {a}. | You still owe me {a} for the goods I sent back.
            """),
        "delivery": phrases("""
            I am still waiting for the {p} to arrive. | Any news on when my {p} gets here?
            The package with the {p} seems to be lost in the post. | No package has come so far for order {n}.
            The {p} was promised for {d} and the postman has not brought it.
            I spent {x} on the {p}, but it has not been delivered. | Why is my shipment taking so long?
            The courier says he could not find my address with the {p}.
            """),
        "defect": phrases("""
            The {p} is broken. | My {p} won't start, it seems to be faulty. | What you sent me is damaged.
            There is a dent in the {p} and the switch is loose. | I gave {x} for a {p} that no longer works.
            The {p} keeps turning itself off. | Since {d} my {p} has been rattling badly.
            The plug was snapped off when I unpacked it.
            """),
        "account": phrases("""
            I can't sign in to my account to see the {p}. | Please link the {p} to my account.
            Your website rejects my password, so I can't register the {p}. | I need a new password.
            My account still lists the {p} under my old email. | Could you correct my name in my account?
            I can't get into my account since {d}. | Please delete the old address from my account.
            """),
        "howto": phrases("""
            How can I descale or wash the {p}? | What is the right way to store the {p}?
            Could you tell me how to reset the {p}? | Is it safe to leave the {p} on overnight?
            I just got a {p} for {x}, how does it work? | What is the second button on the {p} for?
            How do you switch the night mode on? | Can the filter go in the dishwasher?
            """),
        "cancel": phrases("""
            I would like to cancel the {p} I ordered. | Don't send the {p}, I am cancelling.
            I changed my mind about the {p}, please call off the order. | Kindly cancel my {x} order.
            Please cancel my {p} purchase and give back the {a} prepayment. | I am ending my subscription.
            Cancel the {p}, and I'd like the {a} I paid in advance back.
            I wish to end the service plan of my {p}.
            """),
    },
    asides=phrases("""
        The order is no. {n}. | I purchased it on {d}. | The price was {x}. | I have had enough of this!
        I saw your advert today. | My receipt shows {x}. | My brother owns one as well.
        """),
    greetings=phrases("Good evening, | Hiya, | To the support desk:"),
    closings=phrases("Many thanks, Priya | Yours, Sam | Bye!"),
)


def all_phrases(bank: Bank) -> set[str]:
    """Every wording of a bank as bare lower-case words, so that punctuation cannot hide a repetition."""
    groups = [*bank.intents.values(), bank.asides, bank.greetings, bank.closings]
    return {" ".join(re.findall(r"[\w'{}]+", phrase.lower())) for group in groups for phrase in group}


def check_apart(first: Bank, second: Bank) -> None:
    """No wording of one bank may be, or be part of, one of the other: else the test would flatter."""
    for mine in all_phrases(first):
        for other in all_phrases(second):
            assert f" {mine} " not in f" {other} " and f" {other} " not in f" {mine} ", (mine, other)


def deal(rng: random.Random, options: list[str] | tuple[str, ...]) -> Iterator[str]:
    """Shuffled passes over the options without end: as random as drawing, but every option gets its share."""
    while True:
        yield from rng.sample(options, len(options))


def misspell(rng: random.Random, word: str) -> str:
    """Swap, drop or double an inner letter, as hasty fingers do."""
    at = rng.randrange(1, len(word) - 2)
    head, here, after, tail = word[:at], word[at], word[at + 1], word[at + 2 :]
    return head + rng.choice((after + here, after, here + here + after)) + tail


def spell_product(rng: random.Random, product: str) -> str:
    """A product as customers write it: half of the time not as the catalogue does."""
    brand, kind = product.split()
    variants = (product.lower(), product.upper(), brand, f"{brand}-{kind}", f"{misspell(rng, brand)} {kind}")
    return rng.choice(variants) if rng.random() < 0.5 else product


def draw_amount(rng: random.Random, above: float = 4) -> float:
    """A price, often a whole one, larger than another where the story needs it."""
    return int(above) + rng.randint(1, 90) + rng.choice((0, 0, 0.5, 0.9, 0.95, 0.25))


def write_amount(amount: float, currency: str) -> str:
    """The amount as text: cents in full, as in 49.90, where the answer has 49.9."""
    return currency.format(f"{amount:.2f}" if amount % 1 else f"{amount:.0f}")


def compose(rng: random.Random, bank: Bank, template: str) -> str:
    """Put a message's parts together, its slots still open; typos go in here, so never into a slot."""
    parts = [template]
    asides = [a for a in bank.asides if not any(slot in template for slot in re.findall(r"{\w}", a))]
    if rng.random() < 0.6:
        parts.append(rng.choice(asides))
    message = " ".join(parts)
    if rng.random() < 0.25:
        word = rng.choice(re.findall(r"[a-z]{4,}", message))
        message = message.replace(word, misspell(rng, word), 1)
    if rng.random() < 0.35:
        message = f"{rng.choice(bank.greetings)} {message}"
    if rng.random() < 0.25:
        message = f"{message} {rng.choice(bank.closings)}"
    return message


def make_rows(name: str, bank: Bank, count: int) -> list[dict[str, str]]:
    """The rows of one file. Each has its own random stream, so a change to one leaves the other be."""
    rng = random.Random(f"{SEED} {name}")
    intents, products = deal(rng, tuple(bank.intents)), deal(rng, PRODUCTS)
    templates = {intent: deal(rng, options) for intent, options in bank.intents.items()}
    rows: dict[str, str] = {}
    while len(rows) < count:
        intent, product = next(intents), next(products)
        template = next(templates[intent])
        refund, currency = draw_amount(rng), rng.choice(CURRENCIES)
        slots = {
            "p": spell_product(rng, product),
            "a": write_amount(refund, currency),
            "x": write_amount(draw_amount(rng, above=refund), currency),
            "n": str(rng.randint(10000, 99999)),
            "d": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        }
        answer = {
            "intent": intent,
            "product": product if "{p}" in template else None,
            "refund": refund if "{a}" in template else None,
        }
        prompt = compose(rng, bank, template).format(**slots)
        rows.setdefault(prompt, json.dumps(answer, separators=(",", ":")))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def main() -> int:
    """Write the two files, or with --check compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the quickstart's train.jsonl and test.jsonl.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    check = parser.parse_args().check
    check_apart(TRAIN, TEST)
    train, test = make_rows("train", TRAIN, 520), make_rows("test", TEST, 120)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    status = 0
    for path, rows in ((FOLDER / "train.jsonl", train), (FOLDER / "test.jsonl", test)):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            print(f"{path} is not what tools/quickstart_data.py writes", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
