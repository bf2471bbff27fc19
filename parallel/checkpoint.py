"""Checkpoints: written by all ranks at once, complete or not there, checked to the bit when read, and for any mesh.

    save(folder, step, mine, state, control)               # mine: the pieces of whole arrays that this rank writes
    checkpoint = Checkpoint(latest(folder), control)       # on any number of ranks
    part = checkpoint.read(name, layout, rank, dtype)

    folder/step-00000123/rank-0000-of-0002.safetensors     # one ordinary safetensors file a rank
                         rank-0001-of-0002.safetensors
                         manifest.json                     # state; SHA-256 of each file; where each array's pieces are

A step is written in a folder with a leading dot, flushed, and renamed: a folder `step-...` is complete, whatever was killed
and when. All ranks must see the same folder, and one job at a time may write to it. In the files a piece is named like an
index in NumPy, `W1[:, 4:8]`, or `W1` where it is the whole array. https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Buffer, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallel.control import Control
from parallel.shard import Cut, Layout
