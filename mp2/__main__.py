"""``python -m mp2``: the command ``mp2`` where its script is not on the path, and the module for torchrun."""

from mp2.cli import main

if __name__ == "__main__":
    main()
