"""The reward of the critic-free jobs: a function of the text that costs nothing, the same for every tool."""


def letters(prompts, responses, **fields):
    """Share of letters and blanks, less a charge for being far from 120 characters; one score a response."""
    return [
        sum(sign.isalpha() or sign == " " for sign in text) / max(len(text), 1) - abs(len(text) - 120) / 240
        for text in responses
    ]
