"""Tables that verbs print."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["make_console", "make_table"]

FILE_WIDTH = 120  # columns where the output is no terminal


def make_console() -> "Console":
    """Returns where tables are printed."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=True, width=None if terminal else FILE_WIDTH)


def make_table(title: str, *columns: str, texts: int = 2) -> "Table":
    """Returns a table without rows.

    Args:
      title: stands above it.
      columns: their headings.
      texts: how many columns, from the left, hold text and no numbers.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right")
    return table
