"""What a file of models/families says of its family: how its models are stored in both formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.config import Config
from models.piece import Tensors
from models.roles import Names, Shapes
from models.settings import Settings

# Keys of a GGUF file (those led by its architecture), and its tensors -> Config. Raises ModelError for what we cannot do.
Architecture = Callable[[Settings, Tensors], Config]


@dataclass(frozen=True)
class ModelType:
    """How Hugging Face folders store models of one `model_type`.

    `config`: settings of config.json -> Config; raises ModelError for what we cannot do. `names`: the tensors' names by role,
    given the shapes of those that the files have. `harmless`: whether a tensor of this name, which the model doesn't need, may
    be in its files. `turned`: whether matrices are stored (out, in), as PyTorch's linear layers are. `base`: what leads the
    names of the model without its head; it may be left out in the files. `settings`: Config -> what config.json says of it, as
    far as the family can, or None for one that is not written; whoever writes it compares what is read back. `architecture`:
    the name of transformers' class.
    """

    config: Callable[[Settings], Config]
    names: Callable[[Shapes], Names]
    harmless: Callable[[str, Config], bool]
    turned: bool = True
    base: str = "model."
    settings: Callable[[Config], dict] | None = None
    architecture: str = ""


@dataclass(frozen=True)
class Family:
    """`model_types`: by config.json's model_type. `architectures`: by GGUF's general.architecture."""

    model_types: dict[str, ModelType]
    architectures: dict[str, Architecture]
