"""``python -m memad_fast``: the ``memad-fast`` command where its script is not on the PATH."""

from memad_fast.cli import main

if __name__ == "__main__":
    main()
