"""``python -m mintjax`` is the command line."""

from mintjax.cli import main

if __name__ == "__main__":
    main()
