import pytest

from models.open import open_model
from models.tokenizer_file import open_tokenizer
from tests.launch.serving import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    return open_tokenizer(folder, open_model(folder).metadata)
