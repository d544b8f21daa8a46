"""`python -m jalign` is the `jalign` command."""

from jalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
