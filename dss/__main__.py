"""`python -m dss` is the `dss` command."""

from dss.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
