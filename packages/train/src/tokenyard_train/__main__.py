"""``python -m tokenyard_train`` is the `tokenyard` command."""

from tokenyard_cli import main

if __name__ == "__main__":
    main()
