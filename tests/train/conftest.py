import pytest
import tiny_training


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder and the result of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with tiny_training.one_thread():
        return output, tiny_training.train(output)
