"""`python -m paddlewheel` is the `paddlewheel` command."""

from paddlewheel.cli import main

if __name__ == "__main__":
    main()
