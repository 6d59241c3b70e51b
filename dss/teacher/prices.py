"""What tokens cost, from a file that the user owns. A price that nobody gave is unknown."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from dss.errors import UserError
from dss.teacher.journal import Usage

__all__ = ["Price", "load_price", "tokens_per_character", "total_cost"]

CHARACTERS_PER_TOKEN = 4  # until the endpoint has counted some
MILLION = 1e6
MOST_EXPENSIVE = 1e12  # for a million tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """A model's price, in `currency` for a million tokens.

    Attributes:
      currency: as the file says.
      input: of a prompt's tokens.
      output: of an answer's.
      cached_input: of those of a prompt that the endpoint had in its cache.
      batch_input: of a prompt's, in a batch.
      batch_output: of an answer's, in a batch.
    """

    input: float
    output: float
    cached_input: float | None = None
    batch_input: float | None = None
    batch_output: float | None = None
    currency: str = ""

    def cost(self, usage: Usage, *, batch: bool = False) -> float | None:
        """Returns what counted tokens cost; None where the file has no price for a batch."""
        if batch:
            if self.batch_input is None or self.batch_output is None:
                return None if usage.prompt or usage.completion else 0.0
            cost = usage.prompt * self.batch_input + usage.completion * self.batch_output
            return cost / MILLION
        cached = self.input if self.cached_input is None else self.cached_input
        cost = (usage.prompt - usage.cached) * self.input + usage.cached * cached
        return (cost + usage.completion * self.output) / MILLION

    def text(self, cost: float) -> str:
        """Returns a cost with its currency."""
        return f"{cost:.4f} {self.currency}".strip() if cost < 1 else f"{cost:,.2f} {self.currency}"


def load_price(path: Path, model: str) -> Price | None:
    """Returns a model's price from a file; None where it has none.

        currency: EUR
        models:
          my-model: {input: 0.5, output: 1.5, cached_input: 0.25}

    Raises:
      UserError: the file is missing or not of this form.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict):
        raise UserError(f"{path}: has no `models`, each with its input and output price")
    if model not in models:
        return None
    return _price(f"{path}: {model}", models[model], str(content.get("currency", "")))


def _price(where: str, value: Any, currency: str) -> Price:
    names = [field.name for field in dataclasses.fields(Price) if field.name != "currency"]
    if not isinstance(value, dict) or not {"input", "output"} <= set(value) <= set(names):
        raise UserError(f"{where}: give input and output, and if you like {', '.join(names[2:])}")
    for name, number in value.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number < MOST_EXPENSIVE:
            raise UserError(f"{where}: {name} is {number!r}; give a price for a million tokens")
    return Price(currency=currency, **value)


def total_cost(price: Price | None, sent: Usage, batch: Usage) -> float | None:
    """Returns what a teacher's attempts cost; None where a price is missing.

    Args:
      price: of the model.
      sent: usage of what was sent from here. Attempts that brought no count are taken as paid for,
        with the longest answer that they could have.
      batch: usage of what came in batches.
    """
    if price is None:
        return None
    prompt = sent.silent_characters * tokens_per_character(sent)
    silent = Usage(prompt=round(prompt), completion=sent.silent_completion)
    costs = price.cost(sent), price.cost(silent), price.cost(batch, batch=True)
    return None if None in costs else sum(costs)  # type: ignore[arg-type]


def tokens_per_character(usage: Usage) -> float:
    """Returns how long a prompt's token is, as far as the endpoint has counted any."""
    return usage.prompt / usage.characters if usage.prompt else 1 / CHARACTERS_PER_TOKEN
