"""``python -m kvtool`` is the same as the console script ``kvtool``."""

from kvtool.cli import main

if __name__ == "__main__":
    main()
