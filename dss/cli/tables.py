"""Tables printed by commands."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["make_console", "make_table"]

FILE_WIDTH = 120  # characters per line if the output is not a terminal


def make_console() -> "Console":
    """Returns the console that tables are printed to."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=True, width=None if terminal else FILE_WIDTH)


def make_table(title: str, *columns: str, texts: int = 2) -> "Table":
    """Returns a table without rows.

    Args:
      title: title above the table.
      columns: headings of the columns.
      texts: number of text columns, left-aligned; the columns after them are numbers.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right")
    return table
