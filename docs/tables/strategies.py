"""The table of strategies is what the classes say about themselves."""

from lightning_bilevel.strategies import table


def tables() -> dict[str, str]:
    """Return the table of facts."""
    return {"strategies": table.markdown()}
