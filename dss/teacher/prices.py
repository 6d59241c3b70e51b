"""Token prices from a file of the user. Without a price, costs are unknown."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from dss.errors import TeacherError
from dss.teacher.journal import Usage

__all__ = ["Price", "load_price", "tokens_per_character", "total_cost"]

CHARACTERS_PER_TOKEN = 4  # estimate before the endpoint's first count
MILLION = 1e6
MAX_PRICE = 1e12  # per million tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """A model's prices, in `currency` per million tokens.

    Attributes:
      currency: currency, as written in the file.
      input: price of prompt tokens.
      output: price of completion tokens.
      cached_input: price of prompt tokens from the endpoint's cache; None for that of `input`.
      batch_input: price of prompt tokens in a batch; None if unknown.
      batch_output: price of completion tokens in a batch; None if unknown.
    """

    input: float
    output: float
    cached_input: float | None = None
    batch_input: float | None = None
    batch_output: float | None = None
    currency: str = ""

    def cost(self, usage: Usage, *, batch: bool = False) -> float | None:
        """Returns the cost of counted tokens; None if a batch price is needed and unknown."""
        if batch:
            if self.batch_input is None or self.batch_output is None:
                return None if usage.prompt or usage.completion else 0.0
            cost = usage.prompt * self.batch_input + usage.completion * self.batch_output
            return cost / MILLION
        cached = self.input if self.cached_input is None else self.cached_input
        cost = (usage.prompt - usage.cached) * self.input + usage.cached * cached
        return (cost + usage.completion * self.output) / MILLION

    def text(self, cost: float) -> str:
        """Returns a cost as text, with its currency."""
        return f"{cost:.4f} {self.currency}".strip() if cost < 1 else f"{cost:,.2f} {self.currency}"


def load_price(path: Path, model: str) -> Price | None:
    """Returns a model's price from a YAML file; None if the file lacks the model.

        currency: EUR
        models:
          my-model: {input: 0.5, output: 1.5, cached_input: 0.25}

    Raises:
      TeacherError: if the file is missing or malformed.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(f"{path}: no such file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TeacherError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict):
        raise TeacherError(f"{path}: has no `models`, with an input and output price for each")
    if model not in models:
        return None
    return _price(f"{path}: {model}", models[model], str(content.get("currency", "")))


def _price(where: str, value: Any, currency: str) -> Price:
    names = [field.name for field in dataclasses.fields(Price) if field.name != "currency"]
    if not isinstance(value, dict) or not {"input", "output"} <= set(value) <= set(names):
        raise TeacherError(f"{where}: give input and output, and optionally {', '.join(names[2:])}")
    for name, number in value.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number < MAX_PRICE:
            raise TeacherError(f"{where}: {name} is {number!r}; give a price per million tokens")
    return Price(currency=currency, **value)


def total_cost(price: Price | None, sent: Usage, batch: Usage) -> float | None:
    """Returns the cost of a teacher's attempts; None if a price is missing.

    Args:
      price: price of the model; None if unknown.
      sent: usage of attempts sent directly. Those without a token count are charged with the
        longest possible answer.
      batch: usage of imported attempts.
    """
    if price is None:
        return None
    prompt = sent.uncounted_characters * tokens_per_character(sent)
    uncounted = Usage(prompt=round(prompt), completion=sent.uncounted_completion)
    costs = price.cost(sent), price.cost(uncounted), price.cost(batch, batch=True)
    return None if None in costs else sum(costs)  # type: ignore[arg-type]


def tokens_per_character(usage: Usage) -> float:
    """Returns the mean tokens per character of prompts; an estimate before the first count."""
    return usage.prompt / usage.characters if usage.prompt else 1 / CHARACTERS_PER_TOKEN
