"""What is true in the kitchen: dishes and foods, what suits them, and why.

A *subject* (a dish, an ingredient, a food) belongs to a family; a family has four *choices* for each kind of question.
Of these, one holds dairy, one nuts, one takes time and one is always fine, so that a guest's wish rules out one of the
four; for keeping food, two of four places are cold. Each choice has two reasons that are true of it.
"""

from __future__ import annotations

from dataclasses import dataclass

REASONS = {
    "light": "it is light and fresh",
    "mild": "it is soft and mild",
    "crunch": "it adds some crunch",
    "fat": "it cuts the fat",
    "salt": "it balances the salt",
    "sweet": "it brings out the sweetness",
    "sauce": "it soaks up the sauce",
    "rich": "it makes every bite richer",
    "warm": "it warms everybody",
    "moist": "it keeps the crumb moist",
    "taste": "it has the same taste",
    "air": "it lets some air in",
    "dry": "it stays dry there",
    "cold": "the cold slows decay",
    "damp": "it must not dry out",
    "dark": "it does not like light",
}


@dataclass(frozen=True)
class Choice:
    """Something that can be answered: its name, the two reasons true of it, and the wish that rules it out."""

    name: str
    reasons: tuple[str, str]
    conflict: str = ""


def _choices(*rows: tuple[str, str, str, str]) -> tuple[Choice, ...]:
    return tuple(Choice(name, (REASONS[a], REASONS[b]), conflict) for name, a, b, conflict in rows)


# family -> subjects
DISHES: dict[str, tuple[str, ...]] = {
    "fish": ("grilled salmon", "baked cod", "fish pie"),
    "meat": ("roast lamb", "beef stew", "meat loaf"),
    "soup": ("tomato soup", "pea soup", "onion soup"),
    "breakfast": ("porridge", "omelette", "french toast"),
    "dessert": ("apple pie", "plum tart", "lemon cake"),
}
FOODS: dict[str, tuple[str, ...]] = {
    "herbs": ("basil", "parsley", "mint"),
    "roots": ("garlic", "ginger", "beetroot"),
    "bakery": ("bread", "brioche", "sponge cake"),
    "greens": ("lettuce", "spinach", "kale"),
}

SIDES = {
    "fish": _choices(
        ("cucumber salad", "light", "fat", ""),
        ("dill cream", "mild", "rich", "dairy"),
        ("almond rice", "crunch", "sauce", "nuts"),
        ("baked fennel", "sweet", "mild", "hurry"),
    ),
    "meat": _choices(
        ("braised cabbage", "fat", "warm", "hurry"),
        ("mashed potato", "sauce", "mild", "dairy"),
        ("walnut slaw", "crunch", "light", "nuts"),
        ("red sauerkraut", "fat", "salt", ""),
    ),
    "soup": _choices(
        ("rye bread", "sauce", "salt", ""),
        ("cheese toast", "rich", "salt", "dairy"),
        ("hazelnut pesto", "crunch", "rich", "nuts"),
        ("sourdough bread", "sauce", "warm", "hurry"),
    ),
    "breakfast": _choices(
        ("berry compote", "sweet", "fat", "hurry"),
        ("sour cream", "mild", "rich", "dairy"),
        ("pecan butter", "crunch", "rich", "nuts"),
        ("orange salad", "light", "sweet", ""),
    ),
    "dessert": _choices(
        ("fruit sorbet", "light", "sweet", "hurry"),
        ("whipped cream", "rich", "mild", "dairy"),
        ("pistachio crumb", "crunch", "salt", "nuts"),
        ("raspberry sauce", "sweet", "light", ""),
    ),
}
DRINKS = {
    "fish": _choices(
        ("mint water", "light", "salt", ""),
        ("salted lassi", "mild", "salt", "dairy"),
        ("almond tonic", "fat", "light", "nuts"),
        ("slow cider", "fat", "sweet", "hurry"),
    ),
    "meat": _choices(
        ("ginger beer", "fat", "sweet", ""),
        ("cool buttermilk", "mild", "salt", "dairy"),
        ("walnut punch", "rich", "warm", "nuts"),
        ("mulled juice", "warm", "sweet", "hurry"),
    ),
    "soup": _choices(
        ("apple juice", "sweet", "light", ""),
        ("warm milk", "mild", "warm", "dairy"),
        ("hazelnut cocoa", "warm", "rich", "nuts"),
        ("barley tea", "warm", "salt", "hurry"),
    ),
    "breakfast": _choices(
        ("orange juice", "light", "sweet", ""),
        ("vanilla shake", "rich", "sweet", "dairy"),
        ("pecan latte", "warm", "rich", "nuts"),
        ("drip coffee", "warm", "fat", "hurry"),
    ),
    "dessert": _choices(
        ("green tea", "light", "fat", ""),
        ("hot chocolate", "rich", "warm", "dairy"),
        ("pistachio cooler", "sweet", "light", "nuts"),
        ("chai", "warm", "sweet", "hurry"),
    ),
}
PLACES = {
    "herbs": _choices(
        ("a glass of water", "damp", "air", ""),
        ("a damp cloth", "damp", "mild", ""),
        ("the fridge door", "cold", "damp", "fridge"),
        ("the ice tray", "cold", "taste", "fridge"),
    ),
    "roots": _choices(
        ("a paper bag", "dark", "air", ""),
        ("a box of sand", "dark", "damp", ""),
        ("the fridge drawer", "cold", "dark", "fridge"),
        ("the cool box", "cold", "dry", "fridge"),
    ),
    "bakery": _choices(
        ("a linen bag", "air", "dry", ""),
        ("a clay pot", "air", "dark", ""),
        ("the freezer", "cold", "taste", "fridge"),
        ("the deep freeze", "cold", "moist", "fridge"),
    ),
    "greens": _choices(
        ("a bowl of water", "damp", "crunch", ""),
        ("a wet towel", "damp", "air", ""),
        ("the salad drawer", "cold", "crunch", "fridge"),
        ("the lowest shelf", "cold", "dark", "fridge"),
    ),
}


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: of the kind.
        subjects: family -> what may be asked about.
        choices: family -> what may be answered.
        questions: templates with {subject}.
        answers: templates with {choice} and {subject}.
        wishes: which wishes make sense here ("" = none).
    """

    name: str
    subjects: dict[str, tuple[str, ...]]
    choices: dict[str, tuple[Choice, ...]]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    wishes: tuple[str, ...]


KINDS = (
    Kind(
        "side",
        DISHES,
        SIDES,
        ("What should I serve with {subject}?", "What goes well with {subject}?", "I am making {subject}. Any side?"),
        (
            "Serve {choice} with the {subject}",
            "Try {choice} with the {subject}",
            "I would add {choice} to the {subject}",
        ),
        ("", "dairy", "nuts", "hurry"),
    ),
    Kind(
        "drink",
        DISHES,
        DRINKS,
        ("Which drink suits {subject}?", "What should we drink with {subject}?", "I am making {subject}. Any drink?"),
        (
            "Pour {choice} with the {subject}",
            "Drink {choice} with the {subject}",
            "I would pour {choice} for the {subject}",
        ),
        ("", "dairy", "nuts", "hurry"),
    ),
    Kind(
        "storage",
        FOODS,
        PLACES,
        ("How do I keep {subject} fresh?", "Where should I store {subject}?", "My {subject} goes bad. What can I do?"),
        ("Keep the {subject} in {choice}", "Put the {subject} in {choice}", "I would store the {subject} in {choice}"),
        ("", "fridge"),
    ),
)

# wish -> how guests say it
WISHES = {
    "dairy": ("No dairy, please.", "I cannot eat dairy."),
    "nuts": ("No nuts, please.", "One guest cannot eat nuts."),
    "hurry": ("I am in a hurry.", "It has to be quick."),
    "fridge": ("I have no fridge.", "My fridge is broken."),
}
OCCASIONS = ("", "My parents visit tonight.", "We are two people.", "It is my first try.", "Hello there.")

POLITE_OPENERS = ("With pleasure.", "Thank you for asking.", "What a good question.", "I am happy to help.")
RUDE_OPENERS = ("Not again.", "Everybody knows that.", "What a silly question.", "Leave me alone.")
POLITE_CLOSERS = ("Enjoy your meal.", "I hope this helps.", "Please ask me again.", "All the best to your guests.")
FILLERS = (
    "There are many ways to see this.",
    "Some people like it and some people do not.",
    "My grandmother spent her whole life in a kitchen.",
    "Food is a matter of taste.",
    "A kitchen is always a busy place.",
    "It depends on many things.",
)
