"""`python -m wordsight` is the `wordsight` command."""

from wordsight.cli.main import main

main()
