"""What every test shares."""

collect_ignore = ["example_plugin"]  # a project of its own; tests/core/test_example_plugin.py installs and runs it
