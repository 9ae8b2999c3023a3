"""`python -m kwsearch` is the `kwsearch` command."""

from kwsearch.cli import main

if __name__ == "__main__":
    main()
