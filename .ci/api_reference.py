"""Write the API reference as HTML, from the docstrings: python .ci/api_reference.py DIRECTORY."""

from __future__ import annotations

import os
import sys
import typing
import warnings
from pathlib import Path

import pdoc

from mintjax import losses

PAGES = [
    "mintjax",
    "mintjax.bench",
    "mintjax.client",
    "mintjax.interop",
    "mintjax.local",
    "mintjax.mint",
    "mintjax.protocol.protobuf",
    "mintjax.step.reduction",
    "mintjax.testing",
    "!mintjax.remote_optimizer",  # the function of that name is on the first page
]


class AsWritten(str):
    """An annotation as it stands in the source: ``ArrayLike``, not the union it stands for."""

    __repr__ = str.__str__


def as_written(annotation: object, *_: object) -> object:
    """What pdoc would evaluate, left alone."""
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    return AsWritten(annotation) if isinstance(annotation, str) else annotation


losses.__doc__ = f"{losses.__doc__}\n\n## Conventions\n\n{losses.conventions()}"

warnings.simplefilter("error")
pdoc.doc.safe_eval_type = pdoc.doc_types.safe_eval_type = as_written
pdoc.render.configure(docformat="google", math=True)
directory = Path(sys.argv[1]).absolute()
directory.mkdir(parents=True, exist_ok=True)
os.chdir(directory)  # where no folder is called mintjax, so that it is the installed one
pdoc.pdoc(*PAGES, output_directory=directory)
