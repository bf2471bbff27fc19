"""An expression as a formula would have it, for what is said of it."""

from __future__ import annotations

import ast
import copy
import re


def plain(node: ast.AST) -> str:
    """Names without their shapes, functions without their module."""
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).partition("\n")[0]
    text = re.sub(r"\b([A-Za-z]\w*?)_[A-Za-z0-9]{1,4}\b(?!\()", r"\1", text)
    return re.sub(r"\b(np|math)\.", "", text)
