"""``python -m rootflow`` does what ``rootflow`` does."""

from rootflow.cli import main

if __name__ == "__main__":
    main()
