"""Evaluates arithmetic expressions with a parser; no text is executed as code.

    answer  = equal {"and" equal}
    equal   = sum {"=" sum}                   both sides must have one value
    sum     = product {("+" | "-") product}
    product = factor {("*" | "/") factor}
    factor  = ("+" | "-") factor | ("(" answer ")" | number [number "/" number]) ["%"]

Numbers may have thousands separators (1,200), a currency sign before or after ($18, 7 €) and a
fraction (3 1/2). The signs × · ÷ − are read as * * / -.

Some released texts answer with two equations, `(29/2) and (30/2)`. As in the reference
implementation, which evaluates Python's `and`, the last value counts, or the first that is zero.
"""

import re

__all__ = ["EquationError", "evaluate", "plain_equation"]

MAX_LENGTH = 1000  # characters
MAX_DEPTH = 50  # nested parentheses and signs
MAX_DIGITS = 300  # of a number, so that it is within the range of a float

SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"} | dict.fromkeys("$€£¥"))
SEPARATED = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])", re.ASCII)
MIXED = re.compile(r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d./])", re.ASCII)
TOKEN = re.compile(r"\s*(?:(\d+\.\d*|\.\d+|\d+)|([-+*/()=%]|and\b))", re.ASCII)


class EquationError(ValueError):
    """Raised if a text is not an arithmetic expression or has no value."""


def plain_equation(text: str) -> str:
    """Returns a text with its signs as + - * / and without currency and thousands separators.

    >>> plain_equation("($1,200 × 3)")
    '(1200 * 3)'
    """
    text = text.translate(SIGNS)
    return SEPARATED.sub(lambda match: match[1] + match[2].replace(",", ""), text)


def _tokens(text: str) -> list[str]:
    out, position = [], 0
    text = MIXED.sub(r"(\1+\2/\3)", plain_equation(text)).rstrip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise EquationError(f"unexpected {text[position]!r} at {position}")
        out.append(match[1] or match[2])
        position = match.end()
    return out


class _Parser:
    def __init__(self, tokens: list[str]):
        self.tokens, self.position = tokens, 0

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.next
        self.position += 1
        return token

    def answer(self, depth: int) -> int | float:
        value = self.equal(depth)
        while self.next == "and":
            self.take()
            following = self.equal(depth)
            value = following if value else value
        return value

    def equal(self, depth: int) -> int | float:
        value = self.sum(depth)
        while self.next == "=":
            self.take()
            other = self.sum(depth)
            if other != value:
                raise EquationError(f"{value} is not {other}")
        return value

    def sum(self, depth: int) -> int | float:
        value = self.product(depth)
        while self.next in ("+", "-"):
            value = (
                value + self.product(depth) if self.take() == "+" else value - self.product(depth)
            )
        return value

    def product(self, depth: int) -> int | float:
        value = self.factor(depth)
        while self.next in ("*", "/"):
            value = value * self.factor(depth) if self.take() == "*" else value / self.factor(depth)
        return value

    def factor(self, depth: int) -> int | float:
        if depth > MAX_DEPTH:
            raise EquationError("nested too deeply")
        if self.next in ("+", "-"):
            return self.factor(depth + 1) if self.take() == "+" else -self.factor(depth + 1)
        value = self.operand(depth)
        while self.next == "%":
            self.take()
            value = value / 100
        return value

    def operand(self, depth: int) -> int | float:
        token = self.take()
        if token == "(":
            value = self.answer(depth + 1)
            if self.take() != ")":
                raise EquationError("a parenthesis is not closed")
            return value
        if not token or token in ("*", "/", ")", "and", "=", "%"):
            raise EquationError(f"expected a number, got {token or 'the end'!r}")
        if len(token) > MAX_DIGITS:
            raise EquationError("a number is too long")
        if token.isdigit():
            if len(token) > 1 and token[0] == "0" and int(token):
                raise EquationError(f"{token} is not a decimal number")
            return int(token)
        return float(token)


def evaluate(text: str) -> int | float:
    """Returns the value of an expression of numbers, + - * / % =, signs, parentheses and `and`.

    Integers are exact and division gives a float, as in Python.

    Raises:
      EquationError: if the text is not such an expression, divides by zero, has a number out of
        range, or is longer than 1,000 characters or nested deeper than 50 levels.

    >>> evaluate("( 10.0 - ( 6.0 + 3.0 ) )")
    1.0
    >>> evaluate("$1,200 × 50% = 600"), evaluate("3 1/2")
    (600.0, 3.5)
    """
    if len(text) > MAX_LENGTH:
        raise EquationError(f"longer than {MAX_LENGTH} characters")
    parser = _Parser(_tokens(text))
    try:
        value = parser.answer(0)
    except (ZeroDivisionError, OverflowError) as error:
        raise EquationError(str(error)) from None
    if parser.next:
        raise EquationError(f"unexpected {parser.next!r}")
    return value
