"""``python -m tokenyard_train`` is the `tokenyard` command."""

from tokenyard_train.cli.main import main

if __name__ == "__main__":
    main()
