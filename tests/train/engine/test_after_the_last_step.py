"""What fails after the last step is a warning: the run is trained and saved."""

import pytest

from tokenyard_train import Callback
from tokenyard_train.checkpoint import newest_good
from tokenyard_train.commands.train import train
from tokenyard_train.engine.finish import softly


def test_pictures_and_callbacks_that_fail_are_warnings(config, console, tmp_path, caplog, drawn):
    class Broken(Callback):
        def end(self, run):
            raise RuntimeError("no more")

    for name in ("loss.png", "experts.png"):
        (tmp_path / "run" / name).mkdir(parents=True)
    result = train(config(max_duration="1ba"), console, [Broken()])
    assert result.batches == 1
    assert newest_good(result.folder) is not None
    for sentence in ("loss.png failed after", "experts.png failed", "Broken failed after"):
        assert sentence in caplog.text


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("x"), KeyError("y")])
def test_any_error_is_a_warning(error, caplog):
    def call():
        raise error

    softly("a picture", call)
    assert "a picture failed after the last step" in caplog.text
