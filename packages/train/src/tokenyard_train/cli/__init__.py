"""The `tokenyard` command: its subcommands, and how its process ends."""
